// Package tasks runs containers: it makes a bundle, spawns a shim, and asks it. The shim knows the truth about a task;
// this package knows where the shims are, also those that lived before this daemon, and what the dead ones left.
package tasks

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/containers"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/shims"
)

const (
	// answer is how long a shim may take to say how its task is, before the task is shown as unknown.
	answer = time.Second
	// ending is how long a shim may take to hand over its last events when its task was deleted.
	ending = 5 * time.Second
)

// containerStore is where the spec and the runtime of a task come from.
type containerStore interface {
	Get(ctx context.Context, id string) (containers.Container, error)
}

// exchange takes events: those of now, and those of the time when no daemon lived.
type exchange interface {
	Forward(*types.Envelope) error
	Recover(*types.Envelope) error
}

// Service keeps the tasks of all namespaces.
type Service struct {
	bundles    *bundle.Store
	shims      *shims.Manager
	containers containerStore
	events     exchange
	log        *slog.Logger

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	work   sync.WaitGroup // what follows shims

	mu    sync.Mutex
	tasks map[key]*Task
}

type key struct{ ns, id string }

// New gives a service without tasks: see Recover.
func New(b *bundle.Store, s *shims.Manager, c containerStore, e exchange, log *slog.Logger) *Service {
	ctx, cancel := context.WithCancel(context.Background())
	return &Service{bundles: b, shims: s, containers: c, events: e, log: log, ctx: ctx, cancel: cancel, tasks: map[key]*Task{}}
}

// Close lets go of every shim; they live on.
func (s *Service) Close() {
	s.cancel()
	s.mu.Lock()
	all := make([]*Task, 0, len(s.tasks))
	for _, t := range s.tasks {
		all = append(all, t)
	}
	s.mu.Unlock()
	for _, t := range all {
		if shim := t.connection(); shim != nil {
			shim.Close()
		}
	}
	s.work.Wait()
}

// CreateRequest is a task to be made.
type CreateRequest struct {
	ID                    string // of the container
	Rootfs                []*types.Mount
	Stdin, Stdout, Stderr string
	Terminal              bool
	Options               *anypb.Any // of the runtime; nil: those of the container
	RuntimePath           string     // another shim binary than the container's runtime names
	Checkpoint            string     // directory; empty: none
}

// Create makes a task, its init parked, and returns the init's pid. On an error nothing is left of it.
func (s *Service) Create(ctx context.Context, r CreateRequest) (_ uint32, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return 0, err
	}
	c, err := s.containers.Get(ctx, r.ID)
	if err != nil {
		return 0, err
	}
	if r.Options == nil {
		r.Options = c.Runtime.Options
	}
	runtime := c.Runtime.Name
	if r.RuntimePath != "" {
		runtime = r.RuntimePath
	}
	t, err := s.reserve(ns, r.ID)
	if err != nil {
		return 0, err
	}
	// A client that goes away half way does not leave half a task: it is made, or undone.
	ctx = context.WithoutCancel(ctx)
	var b *bundle.Bundle
	var shim *shims.Shim
	defer func() {
		if err == nil {
			return
		}
		if shim != nil {
			_ = shim.End(ctx)
			shim.Close()
			shim.Forget()
		}
		if b != nil {
			if rerr := b.Remove(); rerr != nil {
				s.log.Error("cannot remove the bundle of a task that could not be created", "namespace", ns, "id", r.ID, "error", rerr)
			}
		}
		s.drop(t)
		t.settle(nil, nil)
	}()
	if b, err = s.bundles.Create(ns, r.ID, c.Spec.GetValue()); err != nil {
		return 0, err
	}
	if shim, err = s.shims.Spawn(ctx, b, runtime, r.Options); err != nil {
		return 0, err
	}
	resp, err := shim.Create(ctx, &task.CreateTaskRequest{
		ID: r.ID, Bundle: b.Path, Rootfs: r.Rootfs, Terminal: r.Terminal, Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr,
		Checkpoint: r.Checkpoint, Options: r.Options,
	})
	if err != nil {
		return 0, err
	}
	t.settle(shim, nil)
	s.follow(t, b, shim, false)
	return resp.Pid, nil
}

// reserve enters a task that is being made. One whose shim is dead and whose container has ended without anybody's
// interest still counts: it is there until it is deleted.
func (s *Service) reserve(ns, id string) (*Task, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := key{ns, id}
	if s.tasks[k] != nil {
		return nil, fmt.Errorf("task %s: %w", id, errdefs.ErrAlreadyExists)
	}
	t := newTask(k)
	s.tasks[k] = t
	return t, nil
}

func (s *Service) drop(t *Task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tasks[t.key] == t {
		delete(s.tasks, t.key)
	}
}

// find gives the task, once it is known whether its shim lives.
func (s *Service) find(ctx context.Context, id string) (*Task, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	t := s.tasks[key{ns, id}]
	s.mu.Unlock()
	if t == nil {
		return nil, fmt.Errorf("task %s: %w", id, errdefs.ErrNotFound)
	}
	select {
	case <-t.settled:
	case <-ctx.Done():
		return nil, fmt.Errorf("task %s is being made or adopted: %w", id, ctx.Err())
	}
	if t.connection() == nil && t.remains() == nil {
		return nil, fmt.Errorf("task %s: %w", id, errdefs.ErrNotFound) // it could not be made
	}
	return t, nil
}

// living gives the shim of a task, for what needs one.
func (s *Service) living(ctx context.Context, id string) (*shims.Shim, error) {
	t, err := s.find(ctx, id)
	if err != nil {
		return nil, err
	}
	if d := t.remains(); d != nil {
		if d.exited {
			return nil, fmt.Errorf("task %s has ended: process already finished: %w", id, errdefs.ErrNotFound)
		}
		return nil, fmt.Errorf("task %s: its shim is dead: %w", id, errdefs.ErrUnavailable)
	}
	return t.connection(), nil
}

// list gives the tasks of the context's namespace.
func (s *Service) list(ctx context.Context) ([]*Task, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*Task
	for k, t := range s.tasks {
		if k.ns == ns {
			out = append(out, t)
		}
	}
	return out, nil
}

// Delete removes an ended task and says how it ended.
func (s *Service) Delete(ctx context.Context, id string) (*task.DeleteResponse, error) {
	t, err := s.find(ctx, id)
	if err != nil {
		return nil, err
	}
	t.deleting.Lock()
	defer t.deleting.Unlock()
	if _, err := s.find(ctx, id); err != nil {
		return nil, err // somebody else was first
	}
	if t.remains() != nil {
		return s.deleteDead(ctx, t)
	}
	ctx = context.WithoutCancel(ctx)
	shim := t.connection()
	resp, err := shim.Delete(ctx, &task.DeleteRequest{ID: id})
	if err != nil {
		return nil, err
	}
	return resp, s.release(ctx, t, shim)
}

// release ends the shim of a task that is gone, once it has told its last event, and removes the bundle.
func (s *Service) release(ctx context.Context, t *Task, shim *shims.Shim) error {
	t.expectEnd()
	ctx, cancel := context.WithTimeout(ctx, ending)
	defer cancel()
	if err := shim.End(ctx); err != nil {
		s.log.Warn("shim does not shut down", "namespace", t.key.ns, "id", t.key.id, "error", err)
	}
	select {
	case <-t.followed:
	case <-ctx.Done():
		s.log.Warn("shim did not finish its events", "namespace", t.key.ns, "id", t.key.id)
	}
	shim.Close()
	shim.Forget()
	err := shim.Bundle.Remove()
	s.drop(t)
	return err
}
