package tasks

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/shims"
)

// adopters is how many shims are connected to at once after a start.
const adopters = 16

// Recover enters every task that has a bundle, and returns; whether their shims live is found out behind that, and the
// returned channel closed when it is known of all. A request for a task waits for that task alone.
func (s *Service) Recover() (<-chan struct{}, error) {
	found, err := s.bundles.List()
	if err != nil {
		return nil, err
	}
	type job struct {
		t *Task
		b *bundle.Bundle
	}
	jobs := make(chan job, len(found))
	s.mu.Lock()
	for _, b := range found {
		k := key{b.Namespace, b.ID}
		t := newTask(k)
		s.tasks[k] = t
		jobs <- job{t, b}
	}
	s.mu.Unlock()
	close(jobs)
	done := make(chan struct{})
	var adopting sync.WaitGroup
	for range min(adopters, len(found)) {
		adopting.Add(1)
		s.work.Add(1)
		go func() {
			defer s.work.Done()
			defer adopting.Done()
			for j := range jobs {
				s.adopt(j.t, j.b)
			}
		}()
	}
	go func() {
		adopting.Wait()
		close(done)
	}()
	return done, nil
}

// adopt finds out what there is of a task: a living shim, the remains of a dead one, or nothing that anybody was told of.
func (s *Service) adopt(t *Task, b *bundle.Bundle) {
	log := s.log.With("namespace", b.Namespace, "id", b.ID)
	ctx, cancel := context.WithTimeout(s.ctx, 10*time.Second)
	defer cancel()
	shim, err := s.shims.Adopt(ctx, b)
	switch {
	case err == nil:
	case errdefs.IsNotFound(err):
		s.bury(ctx, t, b)
		return
	default:
		log.Error("cannot reach shim; its task is shown as unknown", "error", err)
		t.settle(nil, &remains{bundle: b})
		close(t.followed)
		return
	}
	state, err := shim.State(ctx, &task.StateRequest{ID: b.ID})
	if errdefs.IsNotFound(err) {
		// Killed before it could send Create, or after Delete: nobody was told of a task, or somebody that it is gone.
		log.Info("ending a shim that keeps nothing")
		s.follow(t, b, shim, true)
		if err := s.release(ctx, t, shim); err != nil {
			log.Error("cannot remove bundle", "error", err)
		}
		t.settle(nil, nil)
		return
	}
	if err != nil {
		log.Warn("shim was adopted but does not answer", "error", err)
	} else {
		log.Info("adopted", "pid", state.Pid, "status", state.Status.String())
	}
	t.settle(shim, nil)
	s.follow(t, b, shim, true)
}

// follow hands on what our own shim tells, from where the last daemon stopped, until the shim ends. missed says that its
// older events are of the time when no daemon lived.
func (s *Service) follow(t *Task, b *bundle.Bundle, shim *shims.Shim, missed bool) {
	since := b.Cursor()
	old := uint64(0)
	if missed && shim.Own {
		ctx, cancel := context.WithTimeout(s.ctx, answer)
		if d, err := shim.Shim().Describe(ctx, describe); err == nil {
			old = d.LastSeq
		}
		cancel()
	}
	s.work.Add(1)
	go func() {
		defer s.work.Done()
		defer close(t.followed)
		var err error
		if shim.Own {
			err = shim.Follow(s.ctx, since, func(e *shims.Event) { s.hand(b, e, e.Seq <= old) })
		} else {
			select {
			case <-shim.Gone():
				err = fmt.Errorf("shim has ended: %w", errdefs.ErrUnavailable)
			case <-s.ctx.Done():
				err = s.ctx.Err()
			}
		}
		if s.ctx.Err() != nil || t.endExpected() {
			return
		}
		s.log.Error("a shim has died", "namespace", b.Namespace, "id", b.ID, "error", err)
		shim.Close()
		if dead := s.examine(b); dead != nil {
			t.settle(nil, dead)
		} else {
			t.settle(nil, &remains{bundle: b})
		}
	}()
}

// hand hands an event on, then remembers that it was.
func (s *Service) hand(b *bundle.Bundle, e *shims.Event, missed bool) {
	send := s.events.Forward
	if missed {
		send = s.events.Recover
	}
	if err := send(shims.Envelope(b.Namespace, e)); err != nil {
		s.log.Error("a shim's event is malformed", "namespace", b.Namespace, "id", b.ID, "topic", e.Topic, "error", err)
	}
	if err := b.SetCursor(e.Seq); err != nil && !errors.Is(err, context.Canceled) {
		s.log.Warn("cannot remember which events were handed on", "bundle", b.Path, "error", err)
	}
}

// bury settles a task whose shim is dead. What nobody was ever told of is cleaned up; a container that lives is left
// alone.
func (s *Service) bury(ctx context.Context, t *Task, b *bundle.Bundle) {
	log := s.log.With("namespace", b.Namespace, "id", b.ID)
	defer close(t.followed)
	if dead := s.examine(b); dead != nil {
		log.Warn("the shim of a task is dead", "exited", dead.exited, "pid", dead.pid)
		t.settle(nil, dead)
		return
	}
	if _, err := s.shims.Cleanup(ctx, b); err != nil {
		log.Error("cannot clean up after a dead shim", "error", err)
	}
	if err := b.Remove(); err != nil {
		log.Error("cannot remove bundle", "error", err)
	}
	s.drop(t)
	t.settle(nil, nil)
}

// examine reads what a dead shim has written down, and hands on the events that nobody was told of. nil: it had made no
// container.
func (s *Service) examine(b *bundle.Bundle) *remains {
	records, err := b.Ledger()
	if err != nil {
		s.log.Error("the ledger of a dead shim is damaged; what could be read is used", "bundle", b.Path, "error", err)
	}
	dead := &remains{bundle: b}
	var ticks uint64
	told, cursor := false, b.Cursor()
	for _, r := range records {
		if p := r.Process; p != nil && p.ExecId == "" {
			dead.pid, ticks, dead.terminal = p.Pid, p.StartTicks, p.Terminal
			dead.stdio = [3]string{p.Stdin, p.Stdout, p.Stderr}
		}
		if e := r.Exit; e != nil && e.ExecId == "" {
			dead.exited, dead.status, dead.exitedAt = true, e.Status, time.Unix(0, e.ExitedUnixNano)
		}
		if e := shims.FromLedger(r); e != nil {
			told = told || e.Topic == "/tasks/create"
			if e.Seq > cursor {
				s.hand(b, e, true)
			}
		}
	}
	if !told && !(dead.pid != 0 && bundle.InitAlive(dead.pid, ticks)) {
		return nil
	}
	return dead
}

// deleteDead removes a task whose shim is dead, and whose container has ended.
func (s *Service) deleteDead(ctx context.Context, t *Task) (*task.DeleteResponse, error) {
	d := t.remains()
	records, _ := d.bundle.Ledger()
	for _, r := range records {
		if p := r.Process; !d.exited && p != nil && p.ExecId == "" && bundle.InitAlive(p.Pid, p.StartTicks) {
			return nil, fmt.Errorf("cannot delete task %s: its shim is dead but process %d runs: %w", t.key.id, p.Pid, errdefs.ErrFailedPrecondition)
		}
	}
	resp, err := s.shims.Cleanup(ctx, d.bundle)
	if err != nil {
		return nil, err
	}
	if err := d.bundle.Remove(); err != nil {
		return nil, err
	}
	s.drop(t)
	return resp, s.tellDeleted(t, resp)
}
