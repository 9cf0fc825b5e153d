package tasks

import (
	"context"
	"sync"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/shims"
)

const (
	// adopters is how many shims are connected to at once after a start; those that somebody asks for come on top. Few, so that
	// clients have the machine while hundreds are. One that takes longer than slow makes room for another, up to adoptersMost.
	adopters, adoptersMost = 2, 16
	slow                   = 20 * time.Millisecond
)

// Adopt finds out, behind its return, whether the shims live of the tasks that Recover has entered. The channel is closed
// when it is known of all. yield is called before each, and returns when it may go on; nil: at once.
func (s *Service) Adopt(yield func()) (<-chan struct{}, error) {
	var found []*Task
	s.mu.Lock()
	for _, t := range s.tasks {
		if t.adopt != nil {
			found = append(found, t)
		}
	}
	s.mu.Unlock()
	jobs := make(chan *Task, len(found))
	for _, t := range found {
		jobs <- t
	}
	close(jobs)
	done := make(chan struct{})
	room := make(chan struct{}, adoptersMost)
	var work sync.WaitGroup
	for range min(adopters, len(found)) {
		work.Add(1)
		err := s.background(func() {
			defer work.Done()
			for t := range jobs {
				if yield != nil {
					yield()
				}
				s.adoptSoon(t, &work, room)
			}
		})
		if err != nil {
			work.Done()
			return nil, err
		}
	}
	go func() {
		work.Wait()
		close(done)
	}()
	return done, nil
}

// adoptSoon adopts a task, as part of work, and returns when that is done or turns out to be slow. There must be room for it.
func (s *Service) adoptSoon(t *Task, work *sync.WaitGroup, room chan struct{}) {
	done := make(chan struct{})
	room <- struct{}{}
	work.Add(1)
	err := s.background(func() {
		defer work.Done()
		defer func() { <-room }()
		defer close(done)
		t.begin.Do(t.adopt)
	})
	if err != nil { // the daemon is ending
		<-room
		work.Done()
		return
	}
	late := time.NewTimer(slow)
	defer late.Stop()
	select {
	case <-done:
	case <-late.C:
	}
}

// adopt finds out what there is of a task: a living shim, the remains of a dead one, or nothing that anybody was told of. It
// says whether a shim was asked, which is heard when that answers.
func (s *Service) adopt(t *Task, b *bundle.Bundle) (asked bool) {
	log := s.log.With("namespace", b.Namespace, "id", b.ID)
	ctx, cancel := context.WithTimeout(s.in(b.Namespace), connecting)
	defer cancel()
	shim, err := s.shims.Adopt(ctx, b)
	switch {
	case err == nil:
	case s.ctx.Err() != nil:
		t.settle(nil, nil)
		return false
	case errdefs.IsNotFound(err):
		if !b.Doomed() {
			shim = s.succession(b, &deaths{}, 0)
		}
		if shim == nil {
			if s.ctx.Err() != nil {
				t.settle(nil, nil)
				return false
			}
			s.bury(t, b)
			return false
		}
	default:
		log.Error("cannot reach shim; its task is shown as unknown until it can be", "error", err)
		d := s.read(b).remains
		t.settle(nil, &d)
		if s.background(func() { s.reach(t, b) }) != nil {
			close(t.followed)
		}
		return false
	}
	s.follow(t, b, shim)
	// A shim that is wedged holds nobody up: its task is adopted, and its answer judged when it comes.
	late, since := make(chan struct{}), time.Now()
	overdue := time.AfterFunc(hearing, func() { t.owes(t.heard, since) })
	err = s.background(func() {
		state, err := shim.State(s.in(b.Namespace), &task.StateRequest{ID: b.ID})
		overdue.Stop()
		defer close(t.heard)
		switch {
		case errdefs.IsNotFound(err):
			// Killed before it could send Create, or after Delete: nobody was told of a task, or somebody that it is gone.
			s.retire(t, shim)
		case err != nil:
			log.Warn("shim was adopted but does not answer", "error", err)
		default:
			log.Info("adopted", "pid", state.Pid, "status", state.Status.String(), "late", isClosed(late))
		}
	})
	if err != nil {
		overdue.Stop()
		shim.Close()
		t.settle(nil, nil)
		return false
	}
	wait := time.NewTimer(answer)
	defer wait.Stop()
	select {
	case <-t.heard:
	case <-wait.C:
		close(late)
		log.Warn("shim was adopted but has not answered yet")
	}
	t.once.Do(func() { // unless it has been retired, or has died meanwhile
		t.mu.Lock()
		t.shim = shim
		t.mu.Unlock()
		close(t.settled)
	})
	return true
}

// reach goes on trying to connect to a shim that may live, until it is known whether it does, or its task is gone.
func (s *Service) reach(t *Task, b *bundle.Bundle) {
	for s.knows(t) && !s.pause(again) {
		ctx, cancel := context.WithTimeout(s.in(b.Namespace), connecting)
		shim, err := s.shims.Adopt(ctx, b)
		cancel()
		dead := errdefs.IsNotFound(err)
		if dead {
			shim = s.succession(b, &deaths{}, 0)
		}
		switch {
		case shim != nil:
			t.settle(shim, nil)
			s.follow(t, b, shim)
			if _, err := shim.State(s.in(b.Namespace), &task.StateRequest{ID: b.ID}); errdefs.IsNotFound(err) {
				s.retire(t, shim)
			}
			return
		case dead && s.ctx.Err() == nil:
			if !s.bequeath(t, b) {
				s.finish(t, b)
			}
			close(t.followed)
			return
		}
	}
	close(t.followed)
}

// retire ends a shim that keeps nothing. A Create of the last daemon may still be under way in it: then it keeps a task
// after all, or, when it dies meanwhile, leaves half of one, which is taken away.
func (s *Service) retire(t *Task, shim *shims.Shim) {
	ctx, cancel := context.WithTimeout(s.in(t.key.ns), ending)
	defer cancel()
	t.expectEnd(true)
	if err := shim.End(ctx); err == nil {
		if _, err := shim.State(ctx, &task.StateRequest{ID: t.key.id}); err == nil {
			t.expectEnd(false)
			return
		}
	}
	s.log.Info("ended a shim that keeps nothing", "namespace", t.key.ns, "id", t.key.id)
	if s.dismiss(s.in(t.key.ns), t, shim) != nil {
		return // the daemon is ending, too
	}
	if !s.shared(shim) {
		if _, err := s.shims.Cleanup(s.in(t.key.ns), shim.Bundle); err != nil {
			s.log.Error("cannot clean up after a shim that keeps nothing", "namespace", t.key.ns, "id", t.key.id, "error", err)
		}
	}
	s.forget(t, shim)
}
