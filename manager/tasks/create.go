package tasks

import (
	"context"
	"fmt"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cgroups/early"
	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/containers"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/shims"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/failpoint"
)

const (
	// undoing is how long a shim may take to undo a Create by itself, before it is killed.
	undoing = 3 * time.Second
	// cleaning is how long all of the undoing may take.
	cleaning = 40 * time.Second
)

// CreateRequest is a task to be made.
type CreateRequest struct {
	ID                    string // of the container
	Rootfs                []*types.Mount
	Stdin, Stdout, Stderr string
	Terminal              bool
	Options               *anypb.Any // of the runtime; nil: those of the container
	RuntimePath           string     // another shim binary than the container's runtime names
	TaskAPI               string     // address of the endpoint that is to keep the task; empty: as Options say
	TaskAPIVersion        uint32     // which the endpoint speaks
	Checkpoint            string     // directory of criu's images to restore; empty: none
	// Unpack, if set, makes a directory with criu's images, which are restored. It is removed with the bundle, or once the
	// task has started.
	Unpack func(ctx context.Context, dir string) error
}

// Create makes a task, its init parked, and returns the init's pid. On an error, and when ctx ends before it is done,
// nothing is left of it. Two calls to a shim and one process are all that create and start cost.
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
	end, err := s.endpoint(&r, c, runtime)
	if err != nil {
		return 0, fmt.Errorf("cannot create task %s: %w", r.ID, err)
	}
	t, err := s.reserve(ctx, ns, r.ID)
	if err != nil {
		return 0, err
	}
	early.Attach()
	ctx = namespaces.With(ctx, ns)
	var b *bundle.Bundle
	var shim *shims.Shim
	defer func() {
		if err != nil {
			s.undo(t, b, shim)
		}
	}()
	if b, err = s.makeBundle(ctx, ns, r.ID, c.Spec.GetValue()); err != nil {
		return 0, err
	}
	failpoint.Hit("tasks.create.bundle")
	s.noteContainer(b, c)
	if r.Unpack != nil {
		r.Checkpoint = b.CheckpointDir()
		if err = r.Unpack(ctx, r.Checkpoint); err != nil {
			return 0, fmt.Errorf("cannot create task %s: %w", r.ID, err)
		}
	}
	if end != nil {
		shim, err = s.shims.Join(ctx, b, *end)
	} else {
		shim, err = s.shims.Spawn(ctx, b, runtime, r.Options)
	}
	if err != nil {
		return 0, fmt.Errorf("cannot create task %s: %w", r.ID, err)
	}
	failpoint.Hit("tasks.create.spawned")
	rootfs, err := s.activate(ctx, r.ID, r.Rootfs)
	if err != nil {
		return 0, fmt.Errorf("cannot create task %s: %w", r.ID, err)
	}
	resp, err := shim.Create(ctx, &task.CreateTaskRequest{
		ID: r.ID, Bundle: b.Path, Rootfs: rootfs, Terminal: r.Terminal, Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr,
		Checkpoint: r.Checkpoint, Options: r.Options,
	})
	if err != nil {
		if lost(shim, err) {
			if said := shim.Epitaph(); said != "" {
				err = fmt.Errorf("cannot create task %s: %s: %w", r.ID, said, errdefs.ErrUnavailable)
			}
		}
		return 0, err
	}
	failpoint.Hit("tasks.create.made")
	if end != nil {
		if err = b.SetMade(); err != nil {
			return 0, err
		}
	}
	t.settle(shim, nil)
	s.follow(t, b, shim)
	return resp.Pid, nil
}

// endpoint says which endpoint is to keep a task, nil for a shim that is spawned, and takes it out of the options.
func (s *Service) endpoint(r *CreateRequest, c containers.Container, runtime string) (*shimapi.BootstrapParams, error) {
	address, version, rest, err := shimapi.TaskAPI(r.Options)
	if err != nil {
		return nil, err
	}
	r.Options = rest
	if r.TaskAPI != "" {
		address, version = r.TaskAPI, r.TaskAPIVersion
	}
	_, own, err := s.shims.Resolve(runtime)
	if address == "" || own && c.SandboxID != "" { // a member of a sandbox of ours has a shim of its own, whatever the client thinks
		return nil, err
	}
	p, err := shimapi.Endpoint(address, version)
	return &p, err
}

// noteContainer keeps the container in the bundle, for the day when the database is lost; the task does not need it.
func (s *Service) noteContainer(b *bundle.Bundle, c containers.Container) {
	note, err := containers.Note(c)
	if err == nil {
		err = b.SetRecord(note)
	}
	if err != nil {
		s.log.Warn("cannot note what a container is", "namespace", b.Namespace, "id", b.ID, "error", err)
	}
}

// makeBundle makes the bundle of a task that was reserved. What an earlier task of the same name left behind, and nobody
// keeps, is cleared away first.
func (s *Service) makeBundle(ctx context.Context, ns, id string, spec []byte) (*bundle.Bundle, error) {
	b, err := s.bundles.Create(ns, id, spec)
	if !errdefs.IsAlreadyExists(err) {
		return b, err
	}
	if err := s.clear(ctx, ns, id); err != nil {
		return nil, fmt.Errorf("cannot clear away what is left of an earlier task %s: %w", id, err)
	}
	return s.bundles.Create(ns, id, spec)
}

// clear removes a bundle without a task. It refuses to when its container lives.
func (s *Service) clear(ctx context.Context, ns, id string) error {
	b, err := s.bundles.Load(ns, id)
	if err != nil {
		return err
	}
	s.log.Warn("clearing away what is left of an earlier task", "namespace", ns, "id", id)
	if shim, err := s.shims.Adopt(ctx, b); err == nil {
		defer shim.Close()
		ctx, cancel := context.WithTimeout(ctx, undoing)
		defer cancel()
		if err := shim.End(ctx); err != nil {
			return err
		}
		// Behind Shutdown: a Create that was under way has decided by now.
		if st, err := shim.State(ctx, &task.StateRequest{ID: id}); err == nil {
			return fmt.Errorf("task %s is kept by a shim, its process is %d: %w", id, st.Pid, errdefs.ErrAlreadyExists)
		}
		shim.Forget()
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	if d := s.examine(b); d != nil && d.alive() {
		return fmt.Errorf("process %d of task %s runs without a shim: %w", d.pid, id, errdefs.ErrFailedPrecondition)
	}
	if _, err := s.shims.Cleanup(ctx, b); err != nil {
		return err
	}
	return b.Remove()
}

// undo takes away what there is of a task that could not be made: b and shim may be nil.
func (s *Service) undo(t *Task, b *bundle.Bundle, shim *shims.Shim) {
	log := s.log.With("namespace", t.key.ns, "id", t.key.id)
	defer s.drop(t)
	// The client's own deadline may be what failed it.
	ctx, cancel := context.WithTimeout(namespaces.With(context.Background(), t.key.ns), cleaning)
	defer cancel()
	if shim != nil {
		if !s.endQuietly(ctx, t.key.id, shim) {
			if err := shim.KillProcess(); err != nil && !errdefs.IsNotFound(err) {
				log.Error("cannot kill the shim of a task that could not be created", "error", err)
			}
			if _, err := s.shims.Cleanup(ctx, b); err != nil {
				log.Error("cannot clean up after a task that could not be created", "error", err)
			}
		}
		shim.Close()
		shim.Forget()
	}
	if b != nil {
		if err := b.Remove(); err != nil {
			log.Error("cannot remove the bundle of a task that could not be created", "error", err)
		}
	}
}

// endQuietly asks a shim to undo a Create by itself and to end. false: it has crashed, or does not.
func (s *Service) endQuietly(ctx context.Context, id string, shim *shims.Shim) bool {
	if isClosed(shim.Gone()) {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, undoing)
	defer cancel()
	// A Create that failed has left nothing: NotFound. One that the client did not wait for may have made a container.
	if _, err := shim.Delete(ctx, &task.DeleteRequest{ID: id}); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
		return false
	}
	if err := shim.End(ctx); err != nil {
		return false
	}
	if s.shared(shim) {
		return true
	}
	select {
	case <-shim.Gone():
		return true
	case <-ctx.Done():
		return false
	}
}

// shared says whether a shim keeps more tasks than its own: those of others can, and an endpoint is meant to.
func (s *Service) shared(shim *shims.Shim) bool {
	if shim.Joined {
		return true
	}
	if shim.Own {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tasks {
		if other, _, _ := t.now(); other != nil && other != shim && other.Address == shim.Address {
			return true
		}
	}
	return false
}
