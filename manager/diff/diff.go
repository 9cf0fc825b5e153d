// Package diff turns layers into files and files into layers: Apply unpacks the blob of a layer into a mounted snapshot,
// Diff packs what differs between two of them into a blob. It must not know of images, names or snapshotters.
package diff

import (
	"context"
	_ "crypto/sha256" // go-digest finds it by name
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/diff/internal/layer"
	"github.com/managerd/managerd/shimapi/mount"
)

// LabelUncompressed on a compressed layer holds the digest of what is inside.
const LabelUncompressed = "containerd.io/uncompressed"

// Content is where layers come from and go to.
type Content interface {
	// Open reads a blob from its beginning. The caller closes it.
	Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
	// Create begins to write a blob; ref names the write. What an earlier write of that name left is thrown away;
	// Unavailable when another is under way. The caller closes it.
	Create(ctx context.Context, ref string) (Writer, error)
}

// Writer writes one blob.
type Writer interface {
	io.Writer
	// Digest of what was written until now.
	Digest() digest.Digest
	// Commit keeps the blob, with labels. A size that is not 0 and a digest that is not empty must be right, else it
	// fails with FailedPrecondition. When the blob is there already, it only gets the labels.
	Commit(ctx context.Context, size int64, expected digest.Digest, labels map[string]string) error
	// Close ends the write; what is not committed is thrown away.
	Close() error
}

// ApplyOptions says how Apply works.
type ApplyOptions struct {
	// Sync has everything on disk when Apply returns, so that no power failure leaves a layer with holes.
	Sync bool
	// Processors make layers of what is none.
	Processors Processors
	// Payloads are for processors, by their IDs; ocicrypt's decoders have one without.
	Payloads map[string]*anypb.Any
	Limits   Limits
}

// Apply unpacks the layer that desc describes into mounts: the mounts of an active snapshot on top of that layer's
// parent. It returns the descriptor of the uncompressed layer, whose digest is the layer's diff ID. InvalidArgument for a
// layer that is malformed, cut short, or would leave the snapshot; NotImplemented for a media type that is none of a
// layer and that no processor makes one of; ProcessorError for one that fails; ResourceExhausted for a layer beyond o.Limits. When it fails, the snapshot holds part of the layer and must not be committed.
func Apply(ctx context.Context, c Content, desc ocispec.Descriptor, mounts []*types.Mount, o ApplyOptions) (ocispec.Descriptor, error) {
	fail := func(err error) (ocispec.Descriptor, error) {
		return ocispec.Descriptor{}, fmt.Errorf("cannot apply layer %s: %w", desc.Digest, err)
	}
	chain, err := o.Processors.chain(desc.MediaType)
	if err != nil {
		return fail(err)
	}
	if len(mounts) == 0 {
		return fail(fmt.Errorf("no mounts were given: %w", errdefs.ErrInvalidArgument))
	}
	if last := mounts[len(mounts)-1]; mount.ReadOnly(last) {
		return fail(fmt.Errorf("the mount of %s is read-only: %w", last.Source, errdefs.ErrFailedPrecondition))
	}
	blob, err := c.Open(ctx, desc)
	if err != nil {
		return fail(err)
	}
	defer func() { _ = blob.Close() }()
	asked := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var read atomic.Int64
	payloads, err := chain.withDecoders(desc, o.Payloads)
	if err != nil {
		return fail(err)
	}
	packed, err := chain.start(ctx, desc.MediaType, countRead{blob, &read}, payloads)
	if err != nil {
		return fail(err)
	}
	defer func() { _ = packed.Close() }()
	bad := func(err error) (ocispec.Descriptor, error) {
		var failed *ProcessorError
		var input inputError
		if n := len(chain); n > 0 && !errors.As(err, &failed) && !errors.As(err, &input) && asked.Err() == nil {
			err = &processedError{chain[n-1].ID, err}
		}
		return fail(err)
	}
	plain, _, err := Decompress(packed)
	if err != nil {
		return bad(err)
	}
	defer func() { _ = plain.Close() }()

	var out ocispec.Descriptor
	err = within(mounts, func(root string) error {
		a := readAhead(&expansion{r: plain, in: &read, limits: o.Limits})
		defer func() {
			cancel() // a processor may say nothing any more
			a.stop()
		}()
		if err := layer.Apply(ctx, root, a, layer.Limits{Bytes: o.Limits.Bytes, Entries: o.Limits.Entries}); err != nil {
			return err
		}
		// What follows the archive (padding) is part of what the digest is of.
		if _, err := io.Copy(io.Discard, a); err != nil {
			return err
		}
		d, size := a.sum()
		out = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: d, Size: size}
		if o.Sync {
			return syncfs(root)
		}
		return nil
	})
	if err != nil {
		err = noRoom(mounts[len(mounts)-1], err)
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return fail(err) // no processor's fault
		}
		return bad(err)
	}
	return out, nil
}

// within has fn work on mounts; a plain writable bind needs no mount, its source is the same files.
func within(mounts []*types.Mount, fn func(root string) error) error {
	if len(mounts) == 1 && mounts[0].Type == "bind" && mounts[0].Target == "" && !mount.ReadOnly(mounts[0]) && onlyBind(mounts[0].Options) {
		return fn(mounts[0].Source)
	}
	return mount.WithTemp(mounts, fn)
}

func onlyBind(options []string) bool {
	for _, o := range options {
		if o != "rw" && o != "bind" && o != "rbind" {
			return false
		}
	}
	return true
}

func syncfs(root string) error {
	fd, err := unix.Open(root, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: root, Err: err}
	}
	return errors.Join(os.NewSyscallError("syncfs", unix.Syncfs(fd)), unix.Close(fd))
}

// Options says how Diff works.
type Options struct {
	MediaType string            // of the layer to make; empty is gzip
	Ref       string            // of the write to the content store; empty has one chosen
	Labels    map[string]string // for the blob
	// Latest, if not zero, is the time that files which are newer get: SOURCE_DATE_EPOCH of reproducible builds.
	Latest time.Time
}

// Diff packs what makes lower into upper, both mounts of snapshots, into a layer, and gives its descriptor. lower may be
// empty: then the layer is all of upper. Neither is written to, and upper may be in use.
func Diff(ctx context.Context, c Content, lower, upper []*types.Mount, o Options) (ocispec.Descriptor, error) {
	desc, err := diff(ctx, c, lower, upper, o)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("cannot make a layer of changes: %w", err)
	}
	return desc, nil
}

func diff(ctx context.Context, c Content, lower, upper []*types.Mount, o Options) (desc ocispec.Descriptor, err error) {
	if o.MediaType == "" {
		o.MediaType = ocispec.MediaTypeImageLayerGzip
	}
	compression, ok := layerTypes[o.MediaType]
	if !ok {
		return desc, fmt.Errorf("media type %q is none of a layer: %w", o.MediaType, errdefs.ErrNotImplemented)
	}
	if len(upper) == 0 {
		return desc, fmt.Errorf("no mounts were given: %w", errdefs.ErrInvalidArgument)
	}
	if o.Ref == "" {
		o.Ref = "diff-" + unique()
	}
	trees := layer.Trees{Hint: hint(lower, upper), Latest: o.Latest}

	w, err := c.Create(ctx, o.Ref)
	if err != nil {
		return desc, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	counted := &counter{w: w}
	plain := digest.SHA256.Digester()
	packed, err := Compress(compression, counted)
	if err != nil {
		return desc, err
	}
	write := func() error { return layer.Diff(ctx, trees, io.MultiWriter(packed, plain.Hash())) }
	err = mount.WithTemp(readOnly(upper), func(root string) error {
		trees.Upper = root
		if len(lower) == 0 {
			return write()
		}
		return mount.WithTemp(readOnly(lower), func(root string) error {
			trees.Lower = root
			return write()
		})
	})
	if cerr := packed.Close(); err == nil { // also after an error: it may have goroutines
		err = cerr
	}
	if err != nil {
		return desc, err
	}
	labels := map[string]string{}
	for k, v := range o.Labels {
		labels[k] = v
	}
	if compression != none {
		labels[LabelUncompressed] = plain.Digest().String()
	}
	desc = ocispec.Descriptor{MediaType: o.MediaType, Digest: w.Digest(), Size: counted.n}
	return desc, w.Commit(ctx, desc.Size, desc.Digest, labels)
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// readOnly gives mounts that show the same and change nothing. An overlay may be mounted elsewhere at the same time, by
// a container that runs: its upper directory becomes the topmost lower one.
func readOnly(mounts []*types.Mount) []*types.Mount {
	var out []*types.Mount
	for _, m := range mounts {
		c := &types.Mount{Type: m.Type, Source: m.Source, Target: m.Target}
		upper := mount.Option(m, "upperdir")
		for _, o := range m.Options {
			k, v, _ := strings.Cut(o, "=")
			switch {
			case m.Type == "overlay" && upper != "" && (k == "upperdir" || k == "workdir"):
			case m.Type == "overlay" && upper != "" && k == "lowerdir":
				c.Options = append(c.Options, "lowerdir="+upper+":"+v)
			case o == "rw" || o == "ro":
			default:
				c.Options = append(c.Options, o)
			}
		}
		c.Options = append(c.Options, "ro")
		out = append(out, c)
	}
	return out
}

// hint finds the upper directory in which all changes must be, if upper is an overlay on exactly what lower shows.
func hint(lower, upper []*types.Mount) string {
	if len(lower) != 1 || len(upper) != 1 || upper[0].Type != "overlay" || lower[0].Target != "" || upper[0].Target != "" {
		return ""
	}
	dir, below := mount.Option(upper[0], "upperdir"), mount.Option(upper[0], "lowerdir")
	l, path := lower[0], mount.Layers(dir)[0]
	switch {
	case dir == "" || below == "":
		return ""
	case l.Type == "overlay" && mount.Option(l, "upperdir") == "" && mount.Option(l, "lowerdir") == below:
		return path
	case l.Type == "bind" && mount.Escape(l.Source) == below && slices.Contains(l.Options, "ro"):
		return path
	}
	return ""
}
