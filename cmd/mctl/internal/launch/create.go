package launch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/spec"
)

const (
	specType = "types.containerd.io/opencontainers/runtime-spec/1/Spec"

	// StopSignalLabel on a container is the signal by which its image wants to be stopped.
	StopSignalLabel = "io.containerd.image.config.stop-signal"
)

// cleaning is how long it may take to undo what was half made.
const cleaning = 10 * time.Second

// Container is what was made. Undo takes it away again.
type Container struct {
	ID     string
	Rootfs []*types.Mount // nil: its spec names a directory

	client                *client.Client
	snapshotter, snapshot string
}

// Size of a terminal in characters; zero: unknown.
type Size struct{ Width, Height uint }

// Create makes a container of id: of image (with --rootfs, a directory; with --config, nothing), to run args. On an error
// nothing is left of it. namespace is that of ctx.
func (f *Flags) Create(ctx context.Context, c *client.Client, namespace, image, id string, args []string, size Size) (_ *Container, err error) {
	labels, err := KeyValues(f.Labels)
	if err != nil {
		return nil, err
	}
	record := &containersapi.Container{ID: id, Runtime: &containersapi.Container_Runtime{Name: f.Runtime}}
	if record.Runtime.Options, err = f.runtimeOptions(); err != nil {
		return nil, err
	}
	made := &Container{ID: id, client: c}
	var s *specs.Spec
	var chain string
	switch {
	case f.Config != "":
		s, err = readSpec(f.Config)
	case f.Rootfs:
		s, err = f.ofDirectory(namespace, image, id, args, size)
	default:
		var found *Image
		if found, err = Find(ctx, c, image); err != nil {
			return nil, err
		}
		if made.snapshotter, err = c.DefaultSnapshotter(ctx, namespace, f.Snapshotter); err != nil {
			return nil, err
		}
		if chain, err = found.unpacked(ctx, c, made.snapshotter); err != nil {
			return nil, err
		}
		made.snapshot = id
		record.Image, record.Snapshotter, record.SnapshotKey = found.Name, made.snapshotter, id
		record.Labels = imageLabels(&found.Config.Config)
		s, err = f.ofImage(ctx, c, namespace, id, args, size, &found.Config.Config, made.snapshotter, chain)
	}
	if err == nil && f.Sandbox != "" {
		record.Sandbox = f.Sandbox
		err = f.joinSandbox(ctx, c, id, s)
	}
	if err != nil {
		return nil, err
	}
	if record.Labels == nil {
		record.Labels = map[string]string{}
	}
	maps.Copy(record.Labels, labels)
	data, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	record.Spec = &anypb.Any{TypeUrl: specType, Value: data}
	// The record first: it is what keeps the snapshot from being collected.
	if err := made.record(ctx, record); err != nil {
		return nil, err
	}
	if made.snapshot != "" {
		if err := made.prepare(ctx, chain); err != nil {
			// What stands in the way is not ours to remove.
			if errdefs.IsAlreadyExists(err) {
				made.snapshot = ""
				err = fmt.Errorf("%w; remove what is left of an earlier container with `mctl snapshots rm %s`", err, id)
			}
			return nil, errors.Join(err, made.Undo(ctx))
		}
	}
	return made, nil
}

// record adds the container's record. When a call was lost with the daemon, the record that is there may be ours.
func (made *Container) record(ctx context.Context, r *containersapi.Container) error {
	c := made.client
	return c.Again(ctx, nil, func(ctx context.Context, again bool) error {
		_, err := c.Containers.Create(ctx, &containersapi.CreateContainerRequest{Container: r})
		if again && errdefs.IsAlreadyExists(err) {
			have, gerr := c.Containers.Get(ctx, &containersapi.GetContainerRequest{ID: r.ID})
			if gerr == nil && slices.Equal(have.Container.GetSpec().GetValue(), r.Spec.Value) && have.Container.SnapshotKey == r.SnapshotKey {
				return nil
			}
		}
		if errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("%w; choose another id, or remove it with `mctl containers rm %s`", err, r.ID)
		}
		return err
	})
}

func (made *Container) prepare(ctx context.Context, chain string) error {
	c := made.client
	return c.Again(ctx, nil, func(ctx context.Context, again bool) error {
		r, err := c.Snapshots.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: made.snapshotter, Key: made.snapshot, Parent: chain})
		if again && errdefs.IsAlreadyExists(err) {
			return made.Mounts(ctx)
		}
		made.Rootfs = r.GetMounts()
		return err
	})
}

// Mounts asks for the container's root file system.
func (made *Container) Mounts(ctx context.Context) error {
	r, err := made.client.Snapshots.Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: made.snapshotter, Key: made.snapshot})
	made.Rootfs = r.GetMounts()
	return err
}

// Undo removes the container and its snapshot, also when ctx has ended.
func (made *Container) Undo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleaning)
	defer cancel()
	return made.Remove(ctx)
}

// Remove removes the container and its snapshot.
func (made *Container) Remove(ctx context.Context) error {
	return Remove(ctx, made.client, made.ID, made.snapshotter, made.snapshot)
}

// Remove removes a container and, unless snapshot is empty, its snapshot. What is gone already is no error.
func Remove(ctx context.Context, c *client.Client, id, snapshotter, snapshot string) error {
	err := c.Again(ctx, nil, func(ctx context.Context, _ bool) error {
		_, err := c.Containers.Delete(ctx, &containersapi.DeleteContainerRequest{ID: id})
		return unlessNotFound(err)
	})
	if err != nil || snapshot == "" {
		return err
	}
	return c.Again(ctx, nil, func(ctx context.Context, _ bool) error {
		_, err := c.Snapshots.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: snapshot})
		return unlessNotFound(err)
	})
}

func unlessNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

func (f *Flags) runtimeOptions() (*anypb.Any, error) {
	if f.runcRoot == "" && !f.runcSystemd {
		return nil, nil
	}
	return typeurl.MarshalAnyToProto(&options.Options{Root: f.runcRoot, SystemdCgroup: f.runcSystemd})
}

func (f *Flags) ofDirectory(namespace, dir, id string, args []string, size Size) (*specs.Spec, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
		return nil, fmt.Errorf("root file system %s is no directory: %w", dir, errdefs.ErrNotFound)
	}
	opts, err := f.options(nil, args, size.Width, size.Height)
	if err != nil {
		return nil, err
	}
	return spec.New(id, namespace, append(opts, spec.Rootfs(dir), spec.User(f.user, dir))...)
}

// numeric users need nobody to be looked up.
var numeric = regexp.MustCompile(`^[0-9]+:[0-9]+$`)

func (f *Flags) ofImage(ctx context.Context, c *client.Client, namespace, id string, args []string, size Size, config *ocispec.ImageConfig, snapshotter, chain string) (s *specs.Spec, err error) {
	opts, err := f.options(config, args, size.Width, size.Height)
	if err != nil {
		return nil, err
	}
	user := f.user
	if user == "" {
		user = config.User
	}
	make := func(root string) (err error) {
		s, err = spec.New(id, namespace, append(opts, spec.User(f.user, root))...)
		return err
	}
	if user == "" || numeric.MatchString(user) {
		return s, make("")
	}
	return s, lookIn(ctx, c, snapshotter, chain, make)
}

// imageLabels are what a container takes over from its image.
func imageLabels(config *ocispec.ImageConfig) map[string]string {
	labels := maps.Clone(config.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	if config.StopSignal != "" {
		labels[StopSignalLabel] = config.StopSignal
	}
	return labels
}

// Image is one that was found.
type Image struct {
	archive.Image
	Config ocispec.Image

	chain string
}

// Find finds an image by its full name, or by a short one, as people write it: busybox is
// docker.io/library/busybox:latest.
func Find(ctx context.Context, c *client.Client, name string) (*Image, error) {
	i, err := c.Image(ctx, name)
	if err != nil {
		return nil, err
	}
	found := &Image{Image: i}
	found.Config, found.chain, err = archive.Config(ctx, c.Blobs(), i.Target)
	return found, err
}

// unpacked makes sure that the image's layers are there as a snapshot, and gives its name.
func (i *Image) unpacked(ctx context.Context, c *client.Client, snapshotter string) (string, error) {
	if i.chain == "" {
		return "", nil
	}
	s := c.Snapshotter(snapshotter)
	there, err := s.Exists(ctx, i.chain)
	if err != nil || there {
		return i.chain, err
	}
	return i.chain, c.Leased(ctx, func(ctx context.Context) error {
		_, err := archive.Unpack(ctx, c.Blobs(), s, i.Target)
		return err
	})
}
