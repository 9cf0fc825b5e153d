package launch

import (
	"context"
	"errors"
	"fmt"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/cmd/mctl/internal/checkpoint"
	"github.com/managerd/managerd/cmd/mctl/internal/client"
)

// Restore makes a container of id as it was when the checkpoint was made; with changes, its root file system too. On an
// error nothing is left of it.
func Restore(ctx context.Context, c *client.Client, namespace, id string, from *checkpoint.Checkpoint, changes bool) (_ *Container, err error) {
	made := &Container{ID: id, client: c}
	record := &containersapi.Container{ID: id, Runtime: &containersapi.Container_Runtime{Name: from.Runtime, Options: from.Options}}
	if record.Spec, err = checkpoint.Renamed(from.Spec, id); err != nil {
		return nil, err
	}
	var chain string
	if from.Image != "" {
		found, err := Find(ctx, c, from.Image)
		if err != nil {
			return nil, err
		}
		if made.snapshotter = from.Snapshotter; made.snapshotter == "" {
			if made.snapshotter, err = c.DefaultSnapshotter(ctx, namespace, ""); err != nil {
				return nil, err
			}
		}
		if chain, err = found.unpacked(ctx, c, made.snapshotter); err != nil {
			return nil, err
		}
		made.snapshot = id
		record.Image, record.Snapshotter, record.SnapshotKey = found.Name, made.snapshotter, id
		record.Labels = imageLabels(&found.Config.Config)
	} else if changes {
		return nil, fmt.Errorf("the checkpoint is of a container without an image: there is nothing that its changes could be made to: %w", errdefs.ErrFailedPrecondition)
	}
	if err := made.record(ctx, record); err != nil {
		return nil, err
	}
	if made.snapshot == "" {
		return made, nil
	}
	if err := made.prepare(ctx, chain); err != nil {
		if errdefs.IsAlreadyExists(err) { // what stands in the way is not ours to remove
			made.snapshot = ""
			err = fmt.Errorf("%w; remove what is left of an earlier container with `mctl snapshots rm %s`", err, id)
		}
		return nil, errors.Join(err, made.Undo(ctx))
	}
	if changes {
		if err := from.Apply(ctx, c, made.Rootfs); err != nil {
			return nil, errors.Join(err, made.Undo(ctx))
		}
	}
	return made, nil
}
