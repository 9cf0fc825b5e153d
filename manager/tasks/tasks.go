// Package tasks runs containers: it makes a bundle, spawns a shim, and asks it. The shim knows the truth about a task;
// this package knows where the shims are, also those that lived before this daemon, and what the dead ones left.
package tasks

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/containers"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/shims"
)

const (
	// answer is how long a shim may take to say how its task is, before the task is shown as unknown. It is the whole of what
	// silent shims cost a list, which is to answer within a second with the way to the client and back.
	answer = 700 * time.Millisecond
	// counting is how long a shim may take to read its counters, before its task is left out of the metrics.
	counting = time.Second
	// meters is how many shims read their counters at once, but for those that take longer than metering: a time that is long for
	// one is short for hundreds that share a processor.
	meters   = 16
	metering = 100 * time.Millisecond
	// ending is how long a shim may take to hand over its last events when its task was deleted.
	ending      = 5 * time.Second
	unknownExit = shims.UnknownExit
)

// containerStore is where the spec and the runtime of a task come from.
type containerStore interface {
	Get(ctx context.Context, id string) (containers.Container, error)
}

// exchange takes events.
type exchange interface {
	Forward(*types.Envelope) error
	// ForwardFrom takes event seq of a source, unless it has it; Cursor is the last one that it has.
	ForwardFrom(source string, seq uint64, e *types.Envelope) error
	Cursor(source string) uint64
}

// Service keeps the tasks of all namespaces.
type Service struct {
	bundles    *bundle.Store
	shims      *shims.Manager
	containers containerStore
	events     exchange
	mounts     Mounts // may be nil
	log        *slog.Logger

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	work   sync.WaitGroup // what goes on in the background

	mu     sync.Mutex
	closed bool
	tasks  map[key]*Task
}

type key struct{ ns, id string }

// New gives a service without tasks: see Recover. Close releases it.
func New(b *bundle.Store, s *shims.Manager, c containerStore, e exchange, log *slog.Logger) *Service {
	ctx, cancel := context.WithCancel(context.Background())
	return &Service{bundles: b, shims: s, containers: c, events: e, log: log, ctx: ctx, cancel: cancel, tasks: map[key]*Task{}}
}

// closing is how long Close waits for what goes on in the background; what waits in the kernel ends with the daemon.
const closing = 10 * time.Second

// Close lets go of every shim; they live on. Requests under way fail.
func (s *Service) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	done := make(chan struct{})
	go func() {
		s.work.Wait()
		close(done)
	}()
	late := time.NewTimer(closing)
	defer late.Stop()
	select {
	case <-done:
	case <-late.C:
		s.log.Error("something of tasks does not end; the next daemon goes on with it", "waited", closing)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tasks {
		if shim, _, _ := t.now(); shim != nil {
			shim.Close()
		}
	}
}

// background runs fn until Close, which waits for it. Unavailable after Close.
func (s *Service) background(fn func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("the daemon is ending: %w", errdefs.ErrUnavailable)
	}
	s.work.Add(1)
	go func() {
		defer s.work.Done()
		fn()
	}()
	return nil
}

// in is the context of work that is no client's, in a namespace: it ends with Close.
func (s *Service) in(ns string) context.Context { return namespaces.With(s.ctx, ns) }

// reserve enters a task that is being made. One whose shim is dead and whose container has ended without anybody's
// interest still counts: it is there until it is deleted. Of one that lived before this daemon it is waited until that is
// known: a client that asks again, because the last daemon was killed before it answered, finds either its task or none.
func (s *Service) reserve(ctx context.Context, ns, id string) (*Task, error) {
	k := key{ns, id}
	for {
		s.mu.Lock()
		old := s.tasks[k]
		if old == nil {
			t := newTask(k)
			s.tasks[k] = t
			s.mu.Unlock()
			return t, nil
		}
		s.mu.Unlock()
		if old.adopt != nil {
			if err := s.settled(ctx, old); err != nil {
				return nil, err
			}
			if err := s.decided(ctx, old); err != nil {
				return nil, err
			}
		}
		if s.knows(old) {
			return nil, fmt.Errorf("task %s: %w", id, errdefs.ErrAlreadyExists)
		}
	}
}

// decided waits, of a task that lived before this daemon and whose shim has not answered yet, until it is known whether it
// was made: a Create of the last daemon may be under way in the shim, and end either way. What is left of one that was not
// is cleared away by then.
func (s *Service) decided(ctx context.Context, t *Task) error {
	for {
		shim, dead, changed := t.now()
		clearing := dead != nil && dead.told
		if !clearing && (shim == nil || !shim.Own || s.read(shim.Bundle).made) {
			return nil
		}
		over := t.heard
		var late <-chan time.Time
		switch {
		case !isClosed(t.heard):
		case clearing || isClosed(shim.Gone()): // what follows the shim finds out, or clears away
			if over = t.clearing(); over == nil {
				return nil
			}
		default: // it lives, and the answer was lost with a connection
			over, late = nil, time.After(connecting)
		}
		select {
		case <-changed:
		case <-over:
		case <-late:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("shim of task %s does not answer: %w", t.key.id, ctx.Err())
		}
	}
}

// clearing is closed when the deletion that is under way has ended, or, if there is none, when what follows the shim has; nil
// when both have.
func (t *Task) clearing() chan struct{} {
	t.mu.Lock()
	d := t.deletion
	t.mu.Unlock()
	switch {
	case d != nil:
		return d.done
	case isClosed(t.followed):
		return nil
	}
	return t.followed
}

// settled waits until it is known what there is of a task; one that lived before this daemon has its turn now.
func (s *Service) settled(ctx context.Context, t *Task) error {
	if t.adopt != nil {
		if err := s.background(func() { t.begin.Do(t.adopt) }); err != nil {
			return err
		}
	}
	select {
	case <-t.settled:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("task %s is being made or adopted: %w", t.key.id, ctx.Err())
	}
}

// drop takes a task out: it is gone.
func (s *Service) drop(t *Task) {
	s.deactivate(t.key)
	s.mu.Lock()
	if s.tasks[t.key] == t {
		delete(s.tasks, t.key)
	}
	s.mu.Unlock()
	s.shims.Unpark(t.key.ns, t.key.id)
	t.settle(nil, nil)
}

// knows says whether a task is still there.
func (s *Service) knows(t *Task) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tasks[t.key] == t
}

// find gives the task, once it is known whether its shim lives, and a context for calls to the shim.
func (s *Service) find(ctx context.Context, id string) (context.Context, *Task, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, nil, err
	}
	s.mu.Lock()
	t := s.tasks[key{ns, id}]
	s.mu.Unlock()
	if t == nil {
		return nil, nil, fmt.Errorf("task %s: %w", id, errdefs.ErrNotFound)
	}
	if err := s.settled(ctx, t); err != nil {
		return nil, nil, err
	}
	if shim, dead, _ := t.now(); shim == nil && dead == nil {
		return nil, nil, fmt.Errorf("task %s: %w", id, errdefs.ErrNotFound) // it could not be made, or is gone
	}
	return namespaces.With(ctx, ns), t, nil
}

// living gives the shim of a task, for what needs one, and a context for calls to it. That of one which has died is its
// successor, which is waited for.
func (s *Service) living(ctx context.Context, id string) (context.Context, *shims.Shim, error) {
	ctx, t, err := s.find(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	for {
		shim, dead, changed := t.now()
		switch {
		case shim != nil && isClosed(shim.Gone()):
			if err := s.successor(ctx, t, changed); err != nil {
				return nil, nil, err
			}
			continue
		case shim != nil:
			return ctx, shim, nil
		case dead == nil:
			return nil, nil, fmt.Errorf("task %s: %w", id, errdefs.ErrNotFound)
		case dead.exited:
			return nil, nil, fmt.Errorf("task %s has ended: process already finished: %w", id, errdefs.ErrNotFound)
		}
		return nil, nil, fmt.Errorf("task %s: its shim is dead: %w", id, errdefs.ErrUnavailable)
	}
}

// list gives the tasks of the context's namespace, but those that are being made.
func (s *Service) list(ctx context.Context) ([]*Task, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*Task
	for k, t := range s.tasks {
		if k.ns == ns && (t.adopt != nil || isClosed(t.settled)) {
			out = append(out, t)
		}
	}
	return out, nil
}

// All gives namespace and id of every task, also of those that are being made.
func (s *Service) All() (all [][2]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.tasks {
		all = append(all, [2]string{k.ns, k.id})
	}
	return all
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
