package mounts

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/leases"
)

// backLabel says that an activation goes with a container, as containerd's collector has it.
const backLabel = "containerd.io/gc.bref.container"

// ActivateFor activates mounts for the task of a container, under its name, in place of those of an earlier task. It gives
// what is left to be mounted.
func (s *Store) ActivateFor(ctx context.Context, container string, mounts []*types.Mount) ([]*types.Mount, error) {
	ctx = leases.With(ctx, "") // the container keeps it
	o := Options{Labels: map[string]string{backLabel: container}}
	a, err := s.Activate(ctx, container, mounts, o)
	if errdefs.IsAlreadyExists(err) && s.DeactivateFor(ctx, container) == nil {
		a, err = s.Activate(ctx, container, mounts, o)
	}
	return a.System, err
}

// DeactivateFor deactivates what ActivateFor has made; NotFound when there is nothing.
func (s *Store) DeactivateFor(ctx context.Context, container string) error {
	a, err := s.Info(ctx, container)
	if err == nil && a.Labels[backLabel] != container {
		return fmt.Errorf("mounts %q are for somebody else: %w", container, errdefs.ErrNotFound)
	}
	if err != nil {
		return err
	}
	return s.Deactivate(ctx, container)
}
