package tasks

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/orphans"
	"github.com/managerd/managerd/manager/shims"
)

const (
	// obeying is how long a shim may take for each step of ending its container, before it is ended itself.
	obeying = 3 * time.Second
	// reaping is how often it is looked whether what could not be ended has ended.
	reaping = time.Second
)

// Remove ends a task, whatever state it and its shim are in, and takes away what there is of it. No task is no error, so
// that it may be asked for again and again. A process that even SIGKILL does not end (it waits for a device) is named in
// the error, FailedPrecondition, and the rest is done as soon as it has ended.
func (s *Service) Remove(ctx context.Context, id string) (err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	t := s.tasks[key{ns, id}]
	s.mu.Unlock()
	if t == nil {
		return s.removeLeftover(ctx, ns, id)
	}
	if err := s.settledForced(ctx, t); err != nil {
		return err
	}
	if shim, dead, _ := t.now(); shim == nil && dead == nil {
		return nil // it could not be made, or is gone
	}
	var groups []string
	if _, err := s.bundles.Load(ns, id); errdefs.IsNotFound(err) {
		groups = s.places().Groups(orphans.Task{Namespace: ns, ID: id})
	}
	defer func() { // a shim that has lost its bundle does not know its container's cgroup any more
		if err == nil {
			err = s.places().Clear(context.WithoutCancel(ctx), groups)
		}
	}()
	err = s.removeGently(ctx, t)
	if err == nil || errdefs.IsNotFound(err) || ctx.Err() != nil {
		return s.unlessGone(t, err)
	}
	s.log.Warn("a task cannot be ended by its shim; it is ended without", "namespace", ns, "id", id, "error", err)
	d, mine := t.beginDeletion()
	if !mine { // one that waits for the shim ends when that does
		s.endShim(ctx, t)
		select {
		case <-d.done:
		case <-ctx.Done():
			return fmt.Errorf("task %s is being deleted: %w", id, ctx.Err())
		}
		if d.err == nil {
			return nil
		}
		if d, mine = t.beginDeletion(); !mine {
			return fmt.Errorf("task %s is being deleted by somebody else: %w", id, errdefs.ErrUnavailable)
		}
	}
	d.err = s.removeByForce(t)
	t.endDeletion(d)
	if d.err != nil {
		return s.later(t, d.err)
	}
	return nil
}

// settledForced waits until it is known what there is of a task. One that is being made by a shim that does not get on with
// it is not waited for: without its shim it fails.
func (s *Service) settledForced(ctx context.Context, t *Task) error {
	wait, cancel := context.WithTimeout(ctx, obeying)
	defer cancel()
	err := s.settled(wait, t)
	if err == nil || ctx.Err() != nil {
		return err
	}
	if err := s.endShims(ctx, t.key.ns, t.key.id); err != nil {
		return err
	}
	return s.settled(ctx, t)
}

// endShims ends the shims of a task, as /proc knows them.
func (s *Service) endShims(ctx context.Context, ns, id string) error {
	return s.places().EndShims(ctx, orphans.Task{Namespace: ns, ID: id})
}

func (s *Service) places() orphans.Places { return orphans.Places{State: s.bundles.State()} }

func (s *Service) unlessGone(t *Task, err error) error {
	if !s.knows(t) {
		return nil
	}
	return err
}

// removeGently has the shim do it, as long as it answers.
func (s *Service) removeGently(ctx context.Context, t *Task) error {
	shim, dead, _ := t.now()
	if dead != nil {
		return fmt.Errorf("its shim is dead: %w", errdefs.ErrUnavailable)
	}
	step := func(call func(context.Context) error) error {
		ctx, cancel := context.WithTimeout(namespaces.With(ctx, t.key.ns), obeying)
		defer cancel()
		_, err := ask(ctx, s, t, shim, func(context.Context, *shims.Shim) (struct{}, error) { return struct{}{}, call(ctx) })
		return err
	}
	ended := func(err error) bool {
		return err == nil || errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err)
	}
	kill := func(all bool) error {
		return step(func(ctx context.Context) error {
			_, err := shim.Kill(ctx, &task.KillRequest{ID: t.key.id, Signal: uint32(unix.SIGKILL), All: all})
			return err
		})
	}
	if err := kill(true); !ended(err) || errdefs.IsNotFound(err) { // one whose state is lost knows at least its init
		if err := kill(false); !ended(err) {
			return err
		}
	}
	err := step(func(ctx context.Context) error {
		_, err := shim.Wait(ctx, &task.WaitRequest{ID: t.key.id})
		return err
	})
	if !ended(err) {
		return err
	}
	dctx, cancel := context.WithTimeout(namespaces.With(ctx, t.key.ns), 2*obeying)
	defer cancel()
	_, err = s.Delete(dctx, t.key.id)
	return err
}

// endShim kills the shim of a task, if it is one of ours, with what it is the parent of, and settles the task with what it
// leaves; no successor follows. Whoever waits for the shim goes on with that.
func (s *Service) endShim(ctx context.Context, t *Task) {
	shim, _, _ := t.now()
	if shim == nil {
		return
	}
	if shim.Own {
		t.expectEnd(true)
		// By /proc first, which knows whose parent it is; then what that did not show.
		if err := errors.Join(s.endShims(ctx, t.key.ns, t.key.id), unlessNotFound(shim.KillProcess())); err != nil {
			s.log.Error("cannot end shim", "namespace", t.key.ns, "id", t.key.id, "error", err)
		}
		select {
		case <-t.followed:
		case <-time.After(ending):
			s.log.Warn("the events of a shim that was killed do not end", "namespace", t.key.ns, "id", t.key.id)
		}
	}
	shim.Close()
	shim.Forget()
	l := s.read(shim.Bundle)
	l.remains.told = l.deleted || !l.made
	t.settle(nil, &l.remains)
}

func unlessNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// removeByForce takes away what there is, without asking the shim.
func (s *Service) removeByForce(t *Task) error {
	ctx, cancel := context.WithTimeout(s.in(t.key.ns), cleaning)
	defer cancel()
	s.endShim(ctx, t)
	_, d, _ := t.now()
	if d == nil {
		s.drop(t)
		return nil
	}
	resp, err := s.cleanup(ctx, d.bundle)
	if err != nil {
		if d.alive() {
			err = fmt.Errorf("process %d of task %s does not end (%s): %w: %w", d.pid, t.key.id, orphans.Stuck(int(d.pid)), err, errdefs.ErrFailedPrecondition)
		}
		return err
	}
	if !d.told {
		resp.Pid, resp.ExitStatus = max(d.pid, resp.GetPid()), uint32(unknownExit)
		if d.exited {
			resp.ExitStatus, resp.ExitedAt = d.status, timestamppb.New(d.exitedAt)
		} else {
			resp.ExitedAt = timestamppb.Now()
		}
		s.tellEnd(t, d, resp)
	}
	if err := d.bundle.Remove(); err != nil {
		return err
	}
	s.drop(t)
	return nil
}

// cleanup runs the verb delete of the shim's binary. Without a bundle there is nothing that it could go by.
func (s *Service) cleanup(ctx context.Context, b *bundle.Bundle) (*task.DeleteResponse, error) {
	if _, err := os.Stat(b.Path); errors.Is(err, fs.ErrNotExist) {
		return &task.DeleteResponse{}, nil
	}
	return s.shims.Cleanup(ctx, b)
}

// later goes on with a removal that failed because a process does not end, when that has ended.
func (s *Service) later(t *Task, cause error) error {
	_, d, _ := t.now()
	if d == nil || !d.alive() {
		return cause
	}
	t.mu.Lock()
	first := !t.doomed
	t.doomed = true
	t.mu.Unlock()
	if !first {
		return cause
	}
	noted := d.bundle.Doom()
	err := s.background(func() {
		for d.alive() {
			if s.pause(reaping) {
				return
			}
		}
		t.mu.Lock()
		t.doomed = false
		t.mu.Unlock()
		s.removeDoomed(t)
	})
	return errors.Join(cause, noted, err)
}

// removeDoomed removes a task that could not be removed when that was asked for, perhaps of an earlier daemon.
func (s *Service) removeDoomed(t *Task) {
	log := s.log.With("namespace", t.key.ns, "id", t.key.id)
	if err := s.Remove(s.in(t.key.ns), t.key.id); err != nil {
		log.Error("cannot remove a task whose process was to end first", "error", err)
		return
	}
	log.Info("removed a task whose process has ended at last")
}

// removeLeftover takes away a bundle without a task: half created, or half deleted.
func (s *Service) removeLeftover(ctx context.Context, ns, id string) error {
	b, err := s.bundles.Load(ns, id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.endShims(ctx, ns, id); err != nil {
		return err
	}
	if _, err := s.cleanup(namespaces.With(ctx, ns), b); err != nil {
		return fmt.Errorf("cannot remove what is left of task %s: %w", id, err)
	}
	return b.Remove()
}
