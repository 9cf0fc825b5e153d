package tasks

import (
	"context"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
)

// Mounts makes those mounts of a root file system that no shim can (manager/mounts).
type Mounts interface {
	// ActivateFor gives what is left to be mounted, in place of what is there of an earlier task. NotImplemented: all of them.
	ActivateFor(ctx context.Context, container string, mounts []*types.Mount) ([]*types.Mount, error)
	// DeactivateFor undoes that; NotFound when there is nothing to undo.
	DeactivateFor(ctx context.Context, container string) error
}

// unmounting is how long it is waited for mounts of a task that is gone.
const unmounting = 5 * time.Second

// UseMounts is called before any other method; without it root file systems are for the shims as they are.
func (s *Service) UseMounts(m Mounts) { s.mounts = m }

// activate gives the mounts of a root file system as a shim can make them.
func (s *Service) activate(ctx context.Context, id string, rootfs []*types.Mount) ([]*types.Mount, error) {
	if s.mounts == nil || len(rootfs) == 0 {
		return rootfs, nil
	}
	left, err := s.mounts.ActivateFor(ctx, id, rootfs)
	if errdefs.IsNotImplemented(err) {
		return rootfs, nil
	}
	return left, err
}

// deactivate takes away what activate has made, while the task's name is still taken. What is in use is the collector's when
// the container is gone.
func (s *Service) deactivate(k key) {
	if s.mounts == nil {
		return
	}
	done := make(chan error, 1)
	go func() { done <- s.mounts.DeactivateFor(s.in(k.ns), k.id) }()
	late := time.NewTimer(unmounting)
	defer late.Stop()
	select {
	case err := <-done:
		if err != nil && !errdefs.IsNotFound(err) {
			s.log.Error("mounts of a task that is gone are left", "namespace", k.ns, "id", k.id, "error", err)
		}
	case <-late.C:
		s.log.Error("the mounts of a task that is gone do not answer", "namespace", k.ns, "id", k.id)
	}
}
