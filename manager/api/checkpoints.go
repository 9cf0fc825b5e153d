package api

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	api "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/checkpoints"
)

// checkpointOf says what a task is to be restored from: a directory that its own runtime options name (CriuImagePath), or
// else a checkpoint in the content store.
func (a *Tasks) checkpointOf(r *api.CreateTaskRequest) (dir string, unpack func(context.Context, string) error, err error) {
	opts, err := decoded[*options.Options](r.Options)
	if err != nil {
		return "", nil, fmt.Errorf("cannot create task %s: %w", r.ContainerID, err)
	}
	switch {
	case opts.GetCriuImagePath() != "":
		return opts.CriuImagePath, nil, nil
	case r.Checkpoint != nil:
		return "", func(ctx context.Context, dir string) error {
			return checkpoints.Unpack(ctx, a.content, r.Checkpoint, dir)
		}, nil
	}
	return "", nil, nil
}

// decoded gives options of the type T, or nil for others, which are the shim's to understand.
func decoded[T any](a *anypb.Any) (opts T, err error) {
	if a.GetTypeUrl() == "" {
		return opts, nil
	}
	v, err := typeurl.UnmarshalAny(a)
	if errors.Is(err, typeurl.ErrNotFound) {
		return opts, nil
	}
	if err != nil {
		return opts, fmt.Errorf("cannot read options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	opts, _ = v.(T)
	return opts, nil
}

// Checkpoint saves a task: to the directory that the options name (image_path), and returns nothing then, or else to the
// content store.
func (a *Tasks) Checkpoint(ctx context.Context, r *api.CheckpointTaskRequest) (*api.CheckpointTaskResponse, error) {
	resp, err := a.checkpoint(ctx, r)
	if err != nil {
		return nil, toGRPC(err)
	}
	return resp, nil
}

func (a *Tasks) checkpoint(ctx context.Context, r *api.CheckpointTaskRequest) (*api.CheckpointTaskResponse, error) {
	if r.ParentCheckpoint != "" {
		return nil, fmt.Errorf("cannot checkpoint task %s on top of %s: a checkpoint is always a whole one: %w", r.ContainerID, r.ParentCheckpoint, errdefs.ErrNotImplemented)
	}
	opts, err := decoded[*options.CheckpointOptions](r.Options)
	if err != nil {
		return nil, fmt.Errorf("cannot checkpoint task %s: %w", r.ContainerID, err)
	}
	if path := opts.GetImagePath(); path != "" {
		return &api.CheckpointTaskResponse{}, a.tasks.Checkpoint(ctx, r.ContainerID, path, r.Options)
	}
	c, err := a.containers.Get(ctx, r.ContainerID)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(a.scratch, "task-")
	if err != nil {
		return nil, fmt.Errorf("cannot checkpoint task %s: %w", r.ContainerID, err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	images := filepath.Join(dir, "images")
	if err := a.tasks.Checkpoint(ctx, r.ContainerID, images, r.Options); err != nil {
		return nil, err
	}
	ds, err := checkpoints.Save(ctx, a.content, r.ContainerID, images, c.Spec)
	if err != nil {
		return nil, err
	}
	return &api.CheckpointTaskResponse{Descriptors: ds}, nil
}
