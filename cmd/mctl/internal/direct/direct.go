// Package direct reaches shims without the daemon: it finds them by the bundles below the daemon's state directory, asks
// them, and reads what they have written down, which needs no answer from anybody. It changes nothing but by a request to
// a shim, and by starting the successor of a dead one.
package direct

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/shims"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/parking"
)

// Shim is a shim as the records of its bundle show it; whether it lives is another question.
type Shim struct {
	*bundle.Bundle
	state string
}

// List finds every bundle below state, in the order of namespaces and ids; those of sandboxes come last. NotFound when there is no such directory.
func List(state string) ([]*Shim, error) {
	state, err := filepath.Abs(state)
	if err != nil {
		return nil, err
	}
	bundles, err := bundle.Existing(state).List()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no managerd has ever kept containers in %s; name its state directory with --state: %w", state, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	boxes, err := bundle.ExistingSandboxes(state).List()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	bundles = append(bundles, boxes...)
	found := make([]*Shim, 0, len(bundles))
	for _, b := range bundles {
		found = append(found, &Shim{b, state})
	}
	return found, nil
}

// Name is what the shim is called: its container's id, or sandbox/ID.
func (s *Shim) Name() string {
	if s.Sandbox {
		return "sandbox/" + s.ID
	}
	return s.ID
}

// Find finds the shim of a container, or with sandbox/ID that of a sandbox. NotFound says in which other namespaces there is one of that name.
func Find(state, namespace, id string) (*Shim, error) {
	all, err := List(state)
	if err != nil {
		return nil, err
	}
	var elsewhere []string
	for _, s := range all {
		if s.Name() == id && s.Namespace == namespace {
			return s, nil
		}
		if s.Name() == id {
			elsewhere = append(elsewhere, "-n "+s.Namespace)
		}
	}
	hint := "`mctl shim ls` lists those there are"
	if len(elsewhere) > 0 {
		hint = "there is one with " + strings.Join(elsewhere, " and with ")
	}
	return nil, fmt.Errorf("container %s has no shim in namespace %s; %s: %w", id, namespace, hint, errdefs.ErrNotFound)
}

// Dial connects to the shim. NotFound when it was never spawned or is dead. The caller closes the client.
func (s *Shim) Dial(ctx context.Context) (*shimapi.Client, error) {
	_, p, err := s.Bundle.Shim()
	if err != nil {
		return nil, err
	}
	c, err := shimapi.Dial(ctx, p)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("shim of container %s is dead: %w: %w", s.Name(), err, errdefs.ErrNotFound)
	}
	return c, err
}

// File is the path of a file of the bundle.
func (s *Shim) File(name string) string { return filepath.Join(s.Path, name) }

// Header is what the shim that kept the bundle last has written about itself. NotFound when none of ours ever did. What
// could be read of a damaged ledger counts.
func (s *Shim) Header() (*ledgerpb.Record, error) {
	records, err := s.Ledger()
	for _, r := range slices.Backward(records) {
		if r.Header != nil {
			return r, nil
		}
	}
	if err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("shim of container %s keeps no ledger, it is not one of ours: %w", s.Name(), errdefs.ErrNotFound)
}

// PID is the process of a shim of ours, whether it answers or not; 0 when it is gone.
func (s *Shim) PID() uint32 {
	h, err := s.Header()
	if err != nil || !s.Keeps(h.Header.ShimPid) {
		return 0
	}
	return h.Header.ShimPid
}

// Adopt starts the successor of a dead shim, with the program at binary, and returns its process when it has taken over.
// FailedPrecondition when the shim lives, when it is not one of ours, or when the daemon lives, which does it itself. What
// the successor logs meanwhile goes to log.
func (s *Shim) Adopt(ctx context.Context, binary string, log *slog.Logger) (uint32, error) {
	refuse := func(why string) error {
		return fmt.Errorf("cannot adopt container %s: %s: %w", s.Name(), why, errdefs.ErrFailedPrecondition)
	}
	m := shims.New(shims.Config{State: s.state, Binary: binary, Log: log})
	if !m.Own(s.Bundle) {
		return 0, refuse("its shim is not one of ours, or --state is not spelt as managerd's")
	}
	if c, err := s.Dial(ctx); err == nil {
		_ = c.Close()
		return 0, refuse("its shim lives")
	} else if !errdefs.IsNotFound(err) {
		return 0, err
	}
	// It holds what the dead shim had parked: a successor of ours would have to do without.
	if c, err := parking.Dial(ctx, filepath.Join(s.state, parking.SocketName)); err == nil {
		_ = c.Close()
		return 0, refuse("managerd runs, and starts successors itself; its log says why it did not")
	}
	next, err := m.Succeed(ctx, s.Bundle)
	if err != nil {
		return 0, err
	}
	defer next.Close()
	return s.PID(), nil
}

// Stacks asks the shim by SIGUSR1 for what its goroutines are doing. Shims of ours that do not know of it, or are stopped,
// let ctx end; NotFound for one that is dead or not ours.
func (s *Shim) Stacks(ctx context.Context) ([]byte, error) {
	h, err := s.Header()
	if err != nil {
		return nil, err
	}
	pid := h.Header.ShimPid
	path := s.File(shimapi.StacksFile)
	before, _ := os.Stat(path) // what is told is another file
	if err := s.SignalShim(pid, unix.SIGUSR1); err != nil {
		return nil, fmt.Errorf("shim of container %s: %w", s.Name(), err)
	}
	for tick := time.NewTicker(5 * time.Millisecond); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			return nil, fmt.Errorf("shim of container %s, process %d in state %s, does not tell its stacks: %w", s.Name(), pid, processState(pid), ctx.Err())
		case <-tick.C:
			if now, err := os.Stat(path); err == nil && !os.SameFile(before, now) {
				tick.Stop()
				return os.ReadFile(path)
			}
		}
	}
}

// processState is the letter that the kernel has for what a process does: R, S, D, T ...; empty when it is gone.
func processState(pid uint32) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, after, _ := strings.Cut(string(data[strings.LastIndexByte(string(data), ')')+1:]), " ")
	letter, _, _ := strings.Cut(after, " ")
	return letter
}
