package orphans

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/managerd/managerd/manager/mounts/stack"
)

// activations finds mounts that were made for clients, of which nobody could tell any more: half made ones, damaged ones, those
// of another boot.
func (p Places) activations() ([]Orphan, error) {
	boot, err := stack.Boot()
	if err != nil {
		return nil, err
	}
	dirs, err := stack.All(p.State)
	var out []Orphan
	for _, dir := range dirs {
		r, rerr := stack.Read(dir)
		owner, problem := "", ""
		switch fi, serr := os.Stat(dir); {
		case rerr == nil && r.BootId == boot:
			continue
		case rerr == nil:
			owner, problem = r.Namespace, "mounts of another boot"
		case !errors.Is(rerr, fs.ErrNotExist):
			problem = "mounts for a client: " + rerr.Error()
		case serr != nil || time.Since(fi.ModTime()) < p.Older:
			continue // it is gone, or the daemon is at it
		default:
			problem = "mounts for a client that were being made or removed"
		}
		out = append(out, New(Activation, dir, owner, problem, func(context.Context) error { return stack.Undo(dir) }))
	}
	return out, err
}

// loops finds the loop devices of activations that are not there.
func (p Places) loops() ([]Orphan, error) {
	devices, err := stack.Devices(p.State)
	var out []Orphan
	for _, d := range devices {
		if _, err := os.Stat(d.Stack); !errors.Is(err, fs.ErrNotExist) {
			continue // it goes with that
		}
		out = append(out, New(Loop, d.Path, "", "a loop device of mounts for a client that are not there: "+strings.TrimPrefix(d.Stack, p.State+"/"),
			func(context.Context) error { return d.Detach() }))
	}
	return out, err
}
