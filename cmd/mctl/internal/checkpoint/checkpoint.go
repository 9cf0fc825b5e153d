// Package checkpoint makes checkpoints of containers, and containers of checkpoints, as containerd's clients do: a
// checkpoint is an image whose index has criu's files, the container's spec, its runtime options, its image and its
// changes to that. Its annotations name the image, the runtime and the snapshotter.
package checkpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	specsgo "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/manager/checkpoints"
)

const (
	mediaTypeRuntimeOptions = "application/vnd.containerd.container.checkpoint.runtime.options+proto" // a google.protobuf.Any

	imageAnnotation       = ocispec.AnnotationRefName
	runtimeAnnotation     = "io.containerd.checkpoint.runtime"
	snapshotterAnnotation = "io.containerd.checkpoint.snapshotter"
)

// most is the largest spec or index that is read, in bytes.
const most = 8 << 20

// Parts say what goes into a checkpoint beside what always does.
type Parts struct {
	Task    bool       // the running processes
	Options *anypb.Any // of that: containerd.runc.v1.CheckpointOptions
	Image   bool       // the image
	RW      bool       // what the container has changed in its root file system
}

// Make makes a checkpoint of container k, and an image of that name. The caller holds a lease, and has the container
// paused if it is to be of one moment.
func Make(ctx context.Context, c *client.Client, k *containersapi.Container, name string, p Parts) error {
	index := ocispec.Index{
		Versioned: specsgo.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Annotations: map[string]string{
			imageAnnotation: k.Image, runtimeAnnotation: k.Runtime.GetName(), snapshotterAnnotation: k.Snapshotter,
		},
	}
	add := func(d ocispec.Descriptor) {
		d.Platform = &ocispec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}
		index.Manifests = append(index.Manifests, d)
	}
	if p.Task {
		r, err := c.Tasks.Checkpoint(ctx, &tasksapi.CheckpointTaskRequest{ContainerID: k.ID, Options: p.Options})
		if err != nil {
			return err
		}
		for _, d := range r.Descriptors {
			add(client.Descriptor(d))
		}
	} else {
		d, err := putMessage(ctx, c, k.ID+"-spec", checkpoints.MediaTypeSpec, k.Spec)
		if err != nil {
			return err
		}
		add(d)
	}
	if o := k.Runtime.GetOptions(); len(o.GetValue()) > 0 {
		d, err := putMessage(ctx, c, k.ID+"-runtime-options", mediaTypeRuntimeOptions, o)
		if err != nil {
			return err
		}
		add(d)
	}
	if p.RW && k.SnapshotKey != "" {
		d, err := changes(ctx, c, k)
		if err != nil {
			return fmt.Errorf("cannot save the changes of container %s: %w", k.ID, err)
		}
		add(d)
	}
	if p.Image && k.Image != "" {
		i, err := c.Image(ctx, k.Image)
		if err != nil {
			return err
		}
		index.Manifests = append(index.Manifests, i.Target)
	}
	data, err := json.Marshal(index)
	if err != nil {
		return err
	}
	labels := map[string]string{}
	for i, d := range index.Manifests {
		labels[fmt.Sprintf("containerd.io/gc.ref.content.%d", i)] = d.Digest.String()
	}
	target, err := put(ctx, c, k.ID+"-index", ocispec.MediaTypeImageIndex, data, labels)
	if err != nil {
		return err
	}
	return c.Names().Put(ctx, name, target, nil)
}

func putMessage(ctx context.Context, c *client.Client, what, mediaType string, m proto.Message) (ocispec.Descriptor, error) {
	data, err := proto.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return put(ctx, c, what, mediaType, data, nil)
}

func put(ctx context.Context, c *client.Client, what, mediaType string, data []byte, labels map[string]string) (d ocispec.Descriptor, err error) {
	d = ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	w, err := c.Blobs().Create(ctx, fmt.Sprintf("checkpoint-%s-%s", what, d.Digest.Encoded()))
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if _, err := w.Write(data); err != nil {
		return d, err
	}
	if err := w.Commit(ctx, d.Size, d.Digest, labels); err != nil && !errdefs.IsAlreadyExists(err) {
		return d, err
	}
	return d, nil
}

// changes makes a layer of what differs between a container's snapshot and what it was made of.
func changes(ctx context.Context, c *client.Client, k *containersapi.Container) (d ocispec.Descriptor, err error) {
	st, err := c.Snapshots.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: k.Snapshotter, Key: k.SnapshotKey})
	if err != nil {
		return d, err
	}
	upper, err := c.Snapshots.Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: k.Snapshotter, Key: k.SnapshotKey})
	if err != nil {
		return d, err
	}
	view := fmt.Sprintf("%s-checkpoint-view", k.SnapshotKey)
	remove := func() error {
		_, err := c.Snapshots.Remove(context.WithoutCancel(ctx), &snapshotsapi.RemoveSnapshotRequest{Snapshotter: k.Snapshotter, Key: view})
		return err
	}
	if err := remove(); err != nil && !errdefs.IsNotFound(err) { // of one who was killed
		return d, err
	}
	lower, err := c.Snapshots.View(ctx, &snapshotsapi.ViewSnapshotRequest{Snapshotter: k.Snapshotter, Key: view, Parent: st.Info.Parent})
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	r, err := diffapi.NewDiffClient(c.Conn).Diff(ctx, &diffapi.DiffRequest{
		Left: lower.Mounts, Right: upper.Mounts, MediaType: ocispec.MediaTypeImageLayerGzip, Ref: "checkpoint-rw-" + k.SnapshotKey,
	})
	if err != nil {
		return d, err
	}
	return client.Descriptor(r.Diff), nil
}

// Checkpoint is one that was found.
type Checkpoint struct {
	Image, Runtime, Snapshotter string
	Spec, Options               *anypb.Any         // Options may be nil
	Task                        *types.Descriptor  // nil: the processes are not in it
	changes                     ocispec.Descriptor // Size 0: none
}

// Find reads the checkpoint of that name. InvalidArgument for another image.
func Find(ctx context.Context, c *client.Client, name string) (*Checkpoint, error) {
	i, err := c.Image(ctx, name)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*Checkpoint, error) {
		return nil, fmt.Errorf("image %s is no checkpoint of a container: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	var index ocispec.Index
	data, err := read(ctx, c, i.Target)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &index); err != nil {
		return fail(err)
	}
	f := &Checkpoint{
		Image: index.Annotations[imageAnnotation], Runtime: index.Annotations[runtimeAnnotation], Snapshotter: index.Annotations[snapshotterAnnotation],
	}
	for _, d := range index.Manifests {
		switch d.MediaType {
		case checkpoints.MediaTypeCriu:
			f.Task = &types.Descriptor{MediaType: d.MediaType, Digest: d.Digest.String(), Size: d.Size}
		case checkpoints.MediaTypeSpec:
			if f.Spec, err = readAny(ctx, c, d); err != nil {
				return fail(err)
			}
		case mediaTypeRuntimeOptions:
			if f.Options, err = readAny(ctx, c, d); err != nil {
				return fail(err)
			}
		case ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd:
			f.changes = d
		}
	}
	if f.Spec == nil || f.Runtime == "" {
		return fail(errors.New("it has no spec, or names no runtime"))
	}
	return f, nil
}

func readAny(ctx context.Context, c *client.Client, d ocispec.Descriptor) (*anypb.Any, error) {
	data, err := read(ctx, c, d)
	if err != nil {
		return nil, err
	}
	a := &anypb.Any{}
	return a, proto.Unmarshal(data, a)
}

func read(ctx context.Context, c *client.Client, d ocispec.Descriptor) (_ []byte, err error) {
	if d.Size > most {
		return nil, fmt.Errorf("%s %s has %d bytes: %w", d.MediaType, d.Digest, d.Size, errdefs.ErrInvalidArgument)
	}
	r, err := c.Blobs().Open(ctx, d)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return io.ReadAll(r)
}

// Apply makes the changes of the checkpoint in a root file system.
func (f *Checkpoint) Apply(ctx context.Context, c *client.Client, mounts []*types.Mount) error {
	if f.changes.Size == 0 {
		return fmt.Errorf("the checkpoint has no changes of the root file system; make it with --rw: %w", errdefs.ErrFailedPrecondition)
	}
	_, err := diffapi.NewDiffClient(c.Conn).Apply(ctx, &diffapi.ApplyRequest{
		Diff:   &types.Descriptor{MediaType: f.changes.MediaType, Digest: f.changes.Digest.String(), Size: f.changes.Size},
		Mounts: mounts,
	})
	return err
}

// Renamed is a spec for a container of another id: its cgroup is named after that.
func Renamed(spec *anypb.Any, id string) (*anypb.Any, error) {
	var s, linux map[string]json.RawMessage
	var path string
	if err := json.Unmarshal(spec.Value, &s); err != nil {
		return nil, fmt.Errorf("the checkpoint's spec is malformed: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if json.Unmarshal(s["linux"], &linux) != nil || json.Unmarshal(linux["cgroupsPath"], &path) != nil || path == "" {
		return spec, nil
	}
	at := strings.LastIndexAny(path, "/:") // a path, or SLICE:PREFIX:NAME
	var err error
	if linux["cgroupsPath"], err = json.Marshal(path[:at+1] + id); err != nil {
		return nil, err
	}
	if s["linux"], err = json.Marshal(linux); err != nil {
		return nil, err
	}
	data, err := json.Marshal(s)
	return &anypb.Any{TypeUrl: spec.TypeUrl, Value: data}, err
}
