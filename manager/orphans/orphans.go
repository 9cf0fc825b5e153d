// Package orphans finds what nobody owns any more: shims, mounts, cgroups, bundles, sockets and FIFOs that belonged to
// tasks of one managerd, mounts and loop devices that it made for clients, by its directories alone. It needs no daemon and
// no database; who has them (package fsck) asks for more. It looks only at what carries the marks of this daemon, and what
// it cannot prove to be that it does not touch.
package orphans

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/mount"
)

// The kinds of orphan that are found without a database.
const (
	Shim   = "shim"
	Mount  = "mount"
	Cgroup = "cgroup"
	Bundle = "bundle"
	Socket = "socket"
	FIFO   = "fifo"

	Activation = "activation"
	Loop       = "loop"
)

// Orphan is something without an owner, or whose owner is not what it must be.
type Orphan struct {
	Kind, Object string
	Owner        string // whose it was: NAMESPACE/ID, or a namespace; empty: nobody knows
	Problem      string
	Command      string // what fixes it
	Fix          func(context.Context) error
}

// Name is how a command line names it.
func (o Orphan) Name() string { return o.Kind + ":" + o.Object }

// New gives an orphan that mctl fsck itself fixes.
func New(kind, object, owner, problem string, fix func(context.Context) error) Orphan {
	o := Orphan{Kind: kind, Object: object, Owner: owner, Problem: problem, Fix: fix}
	name := o.Name()
	if strings.ContainsAny(name, " '\"\\$`*?") {
		name = "'" + strings.ReplaceAll(name, "'", `'\''`) + "'"
	}
	o.Command = "mctl fsck --fix " + name
	return o
}

// Task names a task, or a sandbox.
type Task struct {
	Namespace, ID string
	Sandbox       bool
}

func (t Task) String() string {
	if t.Sandbox {
		return t.Namespace + "/sandbox/" + t.ID
	}
	return t.Namespace + "/" + t.ID
}

// kind is what the name is of.
func (t Task) kind() string {
	if t.Sandbox {
		return "sandbox"
	}
	return "task"
}

// Places are where to look.
type Places struct {
	State, Root string
	FIFOs       string        // where mctl makes its FIFOs; empty: nowhere
	Older       time.Duration // FIFOs younger than that may be just being made

	// Tasks are those that the daemon knows, with the paths of the FIFOs that they use; nil when there is no daemon: then a
	// bundle is a task, and nothing that only the daemon knows is judged.
	Tasks map[Task][]string
	// Sandboxes are those that the daemon knows; nil when it has none to ask: then a bundle is a sandbox.
	Sandboxes map[Task]bool
	// Cgroups are paths, below each hierarchy, and the tasks of this daemon that they were made for.
	Cgroups map[string][]Task
}

// Find finds the orphans. What could not be looked at is an error, beside what was found.
func (p Places) Find() ([]Orphan, error) {
	var out []Orphan
	var errs []error
	for _, look := range []func() ([]Orphan, error){p.shims, p.mounts, p.activations, p.loops, p.cgroups, p.bundles, p.sockets, p.fifos} {
		found, err := look()
		out, errs = append(out, found...), append(errs, err)
	}
	return out, errors.Join(errs...)
}

// bundleDir is where the bundles of tasks are, or of sandboxes.
func (p Places) bundleDir(sandbox bool) string {
	if sandbox {
		return filepath.Join(p.State, bundle.SandboxDir)
	}
	return filepath.Join(p.State, bundle.Dir)
}

// told says whether there is a daemon who says which there are.
func (p Places) told(sandbox bool) bool {
	if sandbox {
		return p.Sandboxes != nil
	}
	return p.Tasks != nil
}

// owned says whether a task or a sandbox is there.
func (p Places) owned(t Task) bool {
	if p.told(t.Sandbox) {
		_, ok := p.Tasks[t]
		return ok || p.Sandboxes[t]
	}
	fi, err := os.Stat(filepath.Join(p.bundleDir(t.Sandbox), t.Namespace, t.ID))
	return err == nil && fi.IsDir()
}

// bundles finds directories that were being made or removed, and those of no task and no sandbox.
func (p Places) bundles() ([]Orphan, error) {
	tasks, err := p.bundlesOf(false)
	if err != nil {
		return nil, err
	}
	sandboxes, err := p.bundlesOf(true)
	return append(tasks, sandboxes...), err
}

func (p Places) bundlesOf(sandbox bool) ([]Orphan, error) {
	entries, err := filepath.Glob(filepath.Join(p.bundleDir(sandbox), "*", "*"))
	if err != nil {
		return nil, err
	}
	var out []Orphan
	for _, path := range entries {
		fi, err := os.Lstat(path)
		if err != nil || !fi.IsDir() {
			continue
		}
		name := filepath.Base(path)
		t := Task{filepath.Base(filepath.Dir(path)), name, sandbox}
		half := strings.HasPrefix(name, ".")
		if half {
			_, t.ID, _ = strings.Cut(name[1:], "-")
			if p.owned(t) || time.Since(fi.ModTime()) < p.Older {
				continue // the daemon is at it
			}
		} else if !p.told(sandbox) || p.owned(t) {
			continue
		}
		problem := "no " + t.kind() + " has this bundle"
		if half {
			problem = "a bundle that was being made or removed"
		}
		out = append(out, New(Bundle, path, t.String(), problem, func(context.Context) error {
			if p.busy(path) {
				return fmt.Errorf("a shim works in %s", path)
			}
			if err := bundle.Unmount(path); err != nil {
				return err
			}
			if err := p.nothingMounted(path); err != nil {
				return err
			}
			if err := removeSandboxCgroup(path); err != nil {
				return err
			}
			return os.RemoveAll(path)
		}))
	}
	return out, nil
}

// busy says whether a living shim works in a bundle.
func (p Places) busy(path string) bool {
	return slices.ContainsFunc(p.processes(), func(s process) bool { return s.bundle == path })
}

// nothingMounted: never remove through a mount.
func (p Places) nothingMounted(dir string) error {
	points, err := mountPoints()
	if err != nil {
		return err
	}
	for _, at := range points {
		if at == dir || strings.HasPrefix(at, dir+"/") {
			return fmt.Errorf("%s is mounted", at)
		}
	}
	return nil
}

// mounts finds what is mounted below the bundles of tasks that are not there.
func (p Places) mounts() ([]Orphan, error) {
	points, err := mountPoints()
	if err != nil {
		return nil, err
	}
	var out []Orphan
	for _, at := range points {
		rest, below := strings.CutPrefix(at, p.bundleDir(false)+"/")
		sandbox := false
		if !below {
			rest, sandbox = strings.CutPrefix(at, p.bundleDir(true)+"/")
		}
		parts := strings.Split(rest, "/")
		if !below && !sandbox || len(parts) < 3 {
			continue
		}
		t := Task{parts[0], parts[1], sandbox}
		if strings.HasPrefix(t.ID, ".") {
			_, t.ID, _ = strings.Cut(t.ID[1:], "-")
		} else if p.owned(t) {
			continue
		}
		if p.busy(filepath.Join(p.bundleDir(sandbox), parts[0], parts[1])) {
			continue // its shim is the orphan
		}
		out = append(out, New(Mount, at, t.String(), "it is mounted for a "+t.kind()+" that is not there", func(context.Context) error {
			return mount.Unmount(at)
		}))
	}
	return out, nil
}

func mountPoints() ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, line := range strings.Split(string(data), "\n") {
		if f := strings.Fields(line); len(f) > 4 {
			if at := unescape(f[4]); !slices.Contains(out, at) {
				out = append(out, at)
			}
		}
	}
	slices.Reverse(out) // the latest, and so the innermost, first
	return out, nil
}

// unescape undoes what mountinfo does with blanks and backslashes (proc_pid_mountinfo(5)).
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// sockets finds those on which nobody listens, of tasks that are not there.
func (p Places) sockets() ([]Orphan, error) {
	entries, err := os.ReadDir(filepath.Join(p.State, "s"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return nil, err
	}
	used := map[string]bool{}
	for t := range p.Tasks {
		used[shimapi.SocketPath(p.State, t.Namespace, t.ID)] = true
	}
	bundles, err := bundle.Existing(p.State).List()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, b := range bundles {
		used[shimapi.SocketPath(p.State, b.Namespace, b.ID)] = true
	}
	sandboxes, err := bundle.ExistingSandboxes(p.State).List()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, b := range sandboxes {
		used[shimapi.SandboxSocketPath(p.State, b.Namespace, b.ID)] = true
	}
	var out []Orphan
	for _, e := range entries {
		path := filepath.Join(p.State, "s", e.Name())
		if used[path] || e.Type() != fs.ModeSocket || listened(path) {
			continue
		}
		out = append(out, New(Socket, path, "", "a shim listened on it that is gone", func(context.Context) error {
			if listened(path) {
				return fmt.Errorf("somebody listens on %s", path)
			}
			return os.Remove(path)
		}))
	}
	return out, nil
}

func listened(path string) bool {
	c, err := shimapi.DialSocket(context.Background(), path) // a local connect does not wait
	if err != nil {
		return !errors.Is(err, unix.ECONNREFUSED)
	}
	_ = c.Close()
	return true
}

// fifoPrefix is how mctl begins the names of the directories with a process's FIFOs.
const fifoPrefix = "mctl-"

// fifos finds the FIFOs of clients that are gone, for processes that are gone.
func (p Places) fifos() ([]Orphan, error) {
	if p.FIFOs == "" || p.Tasks == nil {
		return nil, nil // only the daemon knows which are in use
	}
	dirs, err := filepath.Glob(filepath.Join(p.FIFOs, fifoPrefix+"*"))
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, paths := range p.Tasks {
		for _, path := range paths {
			used[filepath.Dir(path)] = true
		}
	}
	opened := openBelow(p.FIFOs)
	var out []Orphan
	for _, dir := range dirs {
		fi, err := os.Lstat(dir)
		if err != nil || !fi.IsDir() || used[dir] || opened[dir] || time.Since(fi.ModTime()) < p.Older {
			continue
		}
		out = append(out, New(FIFO, dir, "", "its process and its client are gone", func(context.Context) error {
			if openBelow(p.FIFOs)[dir] {
				return fmt.Errorf("somebody has opened what is in %s", dir)
			}
			return removeFIFOs(dir)
		}))
	}
	return out, nil
}

// removeFIFOs removes a directory that has nothing but FIFOs.
func removeFIFOs(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Type() != fs.ModeNamedPipe {
			return fmt.Errorf("%s has %s, which is no FIFO", dir, e.Name())
		}
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return os.Remove(dir)
}

// openBelow gives the directories below dir of which some process has a file open.
func openBelow(dir string) map[string]bool {
	out := map[string]bool{}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*") // the pattern is right
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && strings.HasPrefix(to, dir+"/") {
			out[filepath.Dir(to)] = true
		}
	}
	return out
}
