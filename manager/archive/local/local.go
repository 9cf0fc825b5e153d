// Package local lets package archive, and the diff service, work on the stores of the daemon itself.
package local

import (
	"context"
	"io"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/manager/images"
	"github.com/managerd/managerd/manager/snapshots"
)

// Content is a content store as packages diff and archive see it.
type Content struct{ store *content.Store }

// NewContent uses store.
func NewContent(store *content.Store) Content { return Content{store} }

// Open reads a blob.
func (c Content) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	r, err := c.store.ReaderAt(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(r, 0, r.Size()), r}, nil
}

// Create begins to write a blob.
func (c Content) Create(ctx context.Context, ref string) (diff.Writer, error) {
	w, err := c.store.Writer(ctx, ref, "", 0)
	if err != nil {
		return nil, err
	}
	if w.Status().Offset > 0 {
		if err := w.Truncate(0); err != nil {
			_ = w.Close()
			return nil, err
		}
	}
	return &writer{Writer: w, content: c, ctx: ctx, ref: ref}, nil
}

type writer struct {
	*content.Writer
	content Content
	ctx     context.Context // of Create, for Close
	ref     string
	kept    bool
}

func (w *writer) Commit(ctx context.Context, size int64, expected digest.Digest, labels map[string]string) error {
	got := w.Digest()
	err := w.Writer.Commit(ctx, size, expected, labels)
	if errdefs.IsAlreadyExists(err) {
		w.kept = true
		return w.content.SetLabels(ctx, got, labels)
	}
	w.kept = err == nil
	return err
}

func (w *writer) Close() error {
	err := w.Writer.Close()
	if w.kept || err != nil {
		return err
	}
	w.kept = true
	err = w.content.store.Abort(context.WithoutCancel(w.ctx), w.ref)
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Keep has the lease of ctx hold on to a blob.
func (c Content) Keep(ctx context.Context, d digest.Digest) error { return c.store.Keep(ctx, d) }

// Labels of a blob.
func (c Content) Labels(ctx context.Context, d digest.Digest) (map[string]string, error) {
	i, err := c.store.Info(ctx, d)
	return i.Labels, err
}

// SetLabels adds to them.
func (c Content) SetLabels(ctx context.Context, d digest.Digest, labels map[string]string) error {
	if len(labels) == 0 {
		return nil
	}
	paths := make([]string, 0, len(labels))
	for k := range labels {
		paths = append(paths, "labels."+k)
	}
	_, err := c.store.Update(ctx, content.Info{Digest: d, Labels: labels}, paths...)
	return err
}

// Images is an image store as package archive sees it.
type Images struct{ store *images.Store }

// NewImages uses store.
func NewImages(store *images.Store) Images { return Images{store} }

// Put creates an image, or updates its target and these labels.
func (i Images) Put(ctx context.Context, name string, target ocispec.Descriptor, labels map[string]string) error {
	img := images.Image{Name: name, Target: target, Labels: labels}
	_, err := i.store.Create(ctx, img)
	if errdefs.IsAlreadyExists(err) {
		paths := []string{"target"}
		for k := range labels {
			paths = append(paths, "labels."+k)
		}
		_, err = i.store.Update(ctx, img, paths...)
	}
	return err
}

// Differ applies layers of the content store by another program. NotImplemented: another one is to try.
type Differ interface {
	ApplyLayer(ctx context.Context, layer ocispec.Descriptor, mounts []*types.Mount) (ocispec.Descriptor, error)
}

// Options say how layers are applied.
type Options struct {
	diff.ApplyOptions
	// Differs are asked in their order; nil in it stands for package diff. None: that alone.
	Differs []Differ
}

// Snapshotter is a snapshotter as package archive sees it.
type Snapshotter struct {
	snapshots.Snapshotter
	name    string
	content Content
	options Options
}

// NewSnapshotter finds the snapshotter name in store, for layers of content, which are applied with the options and
// synchronously.
func NewSnapshotter(store *snapshots.Store, name string, content Content, options Options) (Snapshotter, error) {
	s, err := store.Snapshotter(name)
	options.Sync = true
	if len(options.Differs) == 0 {
		options.Differs = []Differ{nil}
	}
	return Snapshotter{s, name, content, options}, err
}

// Name of the snapshotter.
func (s Snapshotter) Name() string { return s.name }

// Exists tells whether there is a committed snapshot of that name.
func (s Snapshotter) Exists(ctx context.Context, name string) (bool, error) {
	i, err := s.Stat(ctx, name)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil && i.Kind == snapshots.Committed, err
}

// Streams tells whether no other program applies layers, so that one can be applied of which not all is there: ApplyFrom.
func (s Snapshotter) Streams() bool {
	return len(s.options.Differs) == 1 && s.options.Differs[0] == nil
}

// Apply unpacks a layer, and has it on disk.
func (s Snapshotter) Apply(ctx context.Context, layer ocispec.Descriptor, mounts []*types.Mount) (applied ocispec.Descriptor, err error) {
	for _, d := range s.options.Differs {
		if d == nil {
			applied, err = s.ApplyFrom(ctx, s.content, layer, mounts)
		} else {
			applied, err = d.ApplyLayer(ctx, layer, mounts)
		}
		if !errdefs.IsNotImplemented(err) {
			break
		}
	}
	return applied, err
}

// ApplyFrom unpacks a layer of another content store by package diff, and has it on disk.
func (s Snapshotter) ApplyFrom(ctx context.Context, c diff.Content, layer ocispec.Descriptor, mounts []*types.Mount) (ocispec.Descriptor, error) {
	return diff.Apply(ctx, c, layer, mounts, s.options.ApplyOptions)
}
