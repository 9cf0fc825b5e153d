// Package remote lets package archive work over a gRPC connection to managerd, or containerd: its content, image,
// snapshot and diff services. The namespace, and a lease, are those of each call's context.
package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/managerd/managerd/manager/diff"
)

// Content is the content service.
type Content struct {
	api    contentapi.ContentClient
	leases leasesapi.LeasesClient
}

// NewContent uses conn, which stays the caller's.
func NewContent(conn grpc.ClientConnInterface) Content {
	return Content{contentapi.NewContentClient(conn), leasesapi.NewLeasesClient(conn)}
}

// Open reads a blob.
func (c Content) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	s, err := c.api.Read(ctx, &contentapi.ReadContentRequest{Digest: desc.Digest.String()})
	if err != nil {
		cancel()
		return nil, errgrpc.ToNative(err)
	}
	r := &reader{stream: s, cancel: cancel}
	if desc.Size == 0 {
		return r, nil
	}
	if err := r.fill(); err != nil { // here rather than in the first Read: not found is an error of Open
		cancel()
		return nil, err
	}
	return r, nil
}

type reader struct {
	stream contentapi.Content_ReadClient
	cancel context.CancelFunc
	rest   []byte
}

func (r *reader) fill() error {
	for len(r.rest) == 0 {
		m, err := r.stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return io.EOF
			}
			return errgrpc.ToNative(err)
		}
		r.rest = m.Data
	}
	return nil
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.fill(); err != nil {
		return 0, err
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *reader) Close() error { r.cancel(); return nil }

// Create begins to write a blob.
func (c Content) Create(ctx context.Context, ref string) (diff.Writer, error) {
	sctx, cancel := context.WithCancel(ctx)
	s, err := c.api.Write(sctx)
	if err != nil {
		cancel()
		return nil, errgrpc.ToNative(err)
	}
	w := &writer{content: c, ctx: ctx, cancel: cancel, stream: s, ref: ref, digester: digest.Canonical.Digester()}
	there, err := w.ask(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_STAT, Ref: ref})
	if err != nil {
		cancel()
		return nil, err
	}
	if there == 0 {
		return w, nil
	}
	// An earlier write was left; it is not resumed.
	if err := w.Close(); err != nil {
		return nil, err
	}
	return c.Create(ctx, ref)
}

type writer struct {
	content Content
	ctx     context.Context
	cancel  context.CancelFunc
	stream  contentapi.Content_WriteClient
	ref     string
	offset  int64   // behind what was sent
	waiting []int64 // what the answers that have not come will say that the server has
	kept    bool

	digester digest.Digester // the server tells the digest only at the end
}

// send makes one request.
func (w *writer) send(m *contentapi.WriteContentRequest) error {
	if err := w.stream.Send(m); err != nil && !errors.Is(err, io.EOF) { // of an EOF the answer tells what went wrong
		return errgrpc.ToNative(err)
	}
	return nil
}

// answer waits for the answer to the oldest request that has none, and gives how much the server has.
func (w *writer) answer() (int64, error) {
	r, err := w.stream.Recv()
	if errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("the write of %q was ended by the server: %w", w.ref, errdefs.ErrUnavailable)
	}
	if err != nil {
		return 0, errgrpc.ToNative(err)
	}
	return r.Offset, nil
}

// ask makes one request and waits for its answer.
func (w *writer) ask(m *contentapi.WriteContentRequest) (int64, error) {
	if err := w.send(m); err != nil {
		return 0, err
	}
	return w.answer()
}

// settle waits until no more than n answers have not come.
func (w *writer) settle(n int) error {
	for len(w.waiting) > n {
		has, err := w.answer()
		if err != nil {
			return err
		}
		if want := w.waiting[0]; has != want {
			return fmt.Errorf("the server has %d bytes of %q, not %d: %w", has, w.ref, want, io.ErrShortWrite)
		}
		w.waiting = w.waiting[1:]
	}
	return nil
}

const (
	chunk = 1 << 20 // how much one message carries, in bytes
	ahead = 3       // messages that are sent before the first of them is answered
)

// Write sends p, and does not wait for all of the answers: what is wrong, a later call tells.
func (w *writer) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		part := p[done:min(len(p), done+chunk)]
		if err := w.send(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_WRITE, Offset: w.offset, Data: part}); err != nil {
			return done, err
		}
		w.offset += int64(len(part))
		w.waiting = append(w.waiting, w.offset)
		_, _ = w.digester.Hash().Write(part) // a hash never fails
		if err := w.settle(ahead); err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

func (w *writer) Digest() digest.Digest { return w.digester.Digest() }

func (w *writer) Commit(ctx context.Context, size int64, expected digest.Digest, labels map[string]string) error {
	got := w.Digest()
	if err := w.settle(0); err != nil {
		return err
	}
	_, err := w.ask(&contentapi.WriteContentRequest{
		Action: contentapi.WriteAction_COMMIT, Ref: w.ref, Offset: w.offset, Total: size, Expected: expected.String(), Labels: labels,
	})
	if errdefs.IsAlreadyExists(err) {
		w.kept = true
		return w.content.SetLabels(ctx, got, labels)
	}
	w.kept = err == nil
	return err
}

func (w *writer) Close() error {
	defer w.cancel()
	if w.kept {
		return nil
	}
	w.kept = true
	// The server must have let go of the write before it can be aborted: it has when it ends the stream.
	if err := w.stream.CloseSend(); err != nil {
		return errgrpc.ToNative(err)
	}
	for {
		if _, err := w.stream.Recv(); err != nil {
			break
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(w.ctx), 10*time.Second)
	defer cancel()
	for began := time.Now(); ; time.Sleep(busyPause) {
		_, err := w.content.api.Abort(ctx, &contentapi.AbortRequest{Ref: w.ref})
		switch err = errgrpc.ToNative(err); {
		case errdefs.IsUnavailable(err) && time.Since(began) < busyFor: // it may be busy still with a call that was cancelled
		case errdefs.IsNotFound(err) || errdefs.IsUnavailable(err): // nothing was written, or nobody is there
			return nil
		default:
			return err
		}
	}
}

const (
	busyFor   = time.Second           // how long a server may be busy with a write that was cancelled
	busyPause = 10 * time.Millisecond // before it is asked again
)

// Keep has the lease of ctx hold on to a blob: first that, so that it stays when it is found then.
func (c Content) Keep(ctx context.Context, d digest.Digest) error {
	md, _ := metadata.FromOutgoingContext(ctx)
	if lease := md.Get("containerd-lease"); len(lease) > 0 {
		_, err := c.leases.AddResource(ctx, &leasesapi.AddResourceRequest{ID: lease[len(lease)-1], Resource: &leasesapi.Resource{ID: d.String(), Type: "content"}})
		if err != nil {
			return errgrpc.ToNative(err)
		}
	}
	_, err := c.Labels(ctx, d)
	return err
}

// Labels of a blob.
func (c Content) Labels(ctx context.Context, d digest.Digest) (map[string]string, error) {
	r, err := c.api.Info(ctx, &contentapi.InfoRequest{Digest: d.String()})
	if err != nil {
		return nil, errgrpc.ToNative(err)
	}
	return r.Info.GetLabels(), nil
}

// SetLabels adds to them.
func (c Content) SetLabels(ctx context.Context, d digest.Digest, labels map[string]string) error {
	if len(labels) == 0 {
		return nil
	}
	mask := &fieldmaskpb.FieldMask{}
	for k := range labels {
		mask.Paths = append(mask.Paths, "labels."+k)
	}
	_, err := c.api.Update(ctx, &contentapi.UpdateRequest{Info: &contentapi.Info{Digest: d.String(), Labels: labels}, UpdateMask: mask})
	return errgrpc.ToNative(err)
}

// Images is the image service.
type Images struct{ api imagesapi.ImagesClient }

// NewImages uses conn, which stays the caller's.
func NewImages(conn grpc.ClientConnInterface) Images { return Images{imagesapi.NewImagesClient(conn)} }

// Put creates an image, or updates its target and these labels.
func (i Images) Put(ctx context.Context, name string, target ocispec.Descriptor, labels map[string]string) error {
	img := &imagesapi.Image{Name: name, Target: descriptor(target), Labels: labels}
	_, err := i.api.Create(ctx, &imagesapi.CreateImageRequest{Image: img})
	if err = errgrpc.ToNative(err); errdefs.IsAlreadyExists(err) {
		mask := &fieldmaskpb.FieldMask{Paths: []string{"target"}}
		for k := range labels {
			mask.Paths = append(mask.Paths, "labels."+k)
		}
		_, err = i.api.Update(ctx, &imagesapi.UpdateImageRequest{Image: img, UpdateMask: mask})
		err = errgrpc.ToNative(err)
	}
	return err
}

func descriptor(d ocispec.Descriptor) *types.Descriptor {
	return &types.Descriptor{MediaType: d.MediaType, Digest: d.Digest.String(), Size: d.Size, Annotations: d.Annotations}
}

// Snapshotter is the snapshot service for one snapshotter, and the diff service.
type Snapshotter struct {
	name string
	api  snapshotsapi.SnapshotsClient
	diff diffapi.DiffClient
}

// NewSnapshotter uses conn, which stays the caller's.
func NewSnapshotter(conn grpc.ClientConnInterface, name string) Snapshotter {
	return Snapshotter{name, snapshotsapi.NewSnapshotsClient(conn), diffapi.NewDiffClient(conn)}
}

// Name of the snapshotter.
func (s Snapshotter) Name() string { return s.name }

// Exists tells whether there is a committed snapshot of that name.
func (s Snapshotter) Exists(ctx context.Context, name string) (bool, error) {
	r, err := s.api.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: s.name, Key: name})
	if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil && r.Info.GetKind() == snapshotsapi.Kind_COMMITTED, err
}

// Prepare makes an active snapshot.
func (s Snapshotter) Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]*types.Mount, error) {
	r, err := s.api.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: s.name, Key: key, Parent: parent, Labels: labels})
	return r.GetMounts(), errgrpc.ToNative(err)
}

// Commit freezes it.
func (s Snapshotter) Commit(ctx context.Context, name, key string, labels map[string]string) error {
	_, err := s.api.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: s.name, Name: name, Key: key, Labels: labels})
	return errgrpc.ToNative(err)
}

// Remove deletes a snapshot.
func (s Snapshotter) Remove(ctx context.Context, key string) error {
	_, err := s.api.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: s.name, Key: key})
	return errgrpc.ToNative(err)
}

// Apply unpacks a layer, and has it on disk.
func (s Snapshotter) Apply(ctx context.Context, layer ocispec.Descriptor, mounts []*types.Mount) (ocispec.Descriptor, error) {
	r, err := s.diff.Apply(ctx, &diffapi.ApplyRequest{Diff: descriptor(layer), Mounts: mounts, SyncFs: true})
	if err != nil {
		return ocispec.Descriptor{}, errgrpc.ToNative(err)
	}
	a := r.Applied
	return ocispec.Descriptor{MediaType: a.GetMediaType(), Digest: digest.Digest(a.GetDigest()), Size: a.GetSize()}, nil
}
