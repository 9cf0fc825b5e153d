// Package checkpoints puts what criu has written of a container into the content store, and takes it out again, in
// containerd's format: a tar of criu's directory, and the container's spec. It knows neither tasks nor shims.
package checkpoints

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/diff"
)

// Media types of the parts of a checkpoint, as containerd's clients know them.
const (
	MediaTypeCriu = "application/vnd.containerd.container.criu.checkpoint.criu.tar"   // criu's images
	MediaTypeSpec = "application/vnd.containerd.container.checkpoint.config.v1+proto" // a google.protobuf.Any
)

// Content is what this package needs of a content store.
type Content interface {
	Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
	// Create begins a blob, anew if one of that name was begun before. Closing it uncommitted removes it.
	Create(ctx context.Context, ref string) (diff.Writer, error)
}

// Save writes the files of dir and the spec of container id. What keeps the two blobs is the caller's lease, and then an
// index that the client makes of the descriptors.
func Save(ctx context.Context, c Content, id, dir string, spec *anypb.Any) ([]*types.Descriptor, error) {
	fail := func(err error) ([]*types.Descriptor, error) {
		return nil, fmt.Errorf("cannot save the checkpoint of task %s: %w", id, err)
	}
	images, err := write(ctx, c, "checkpoint-"+dir, MediaTypeCriu, func(w io.Writer) error { return pack(w, dir) })
	if err != nil {
		return fail(err)
	}
	data, err := proto.Marshal(spec)
	if err != nil {
		return fail(err)
	}
	config, err := write(ctx, c, "checkpoint-spec-"+dir, MediaTypeSpec, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
	if err != nil {
		return fail(err)
	}
	return []*types.Descriptor{images, config}, nil
}

func write(ctx context.Context, c Content, ref, mediaType string, fill func(io.Writer) error) (_ *types.Descriptor, err error) {
	w, err := c.Create(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	counted := &counter{w: w}
	if err := fill(counted); err != nil {
		return nil, err
	}
	d := w.Digest()
	if err := w.Commit(ctx, counted.n, d, nil); err != nil && !errdefs.IsAlreadyExists(err) {
		return nil, err
	}
	return &types.Descriptor{MediaType: mediaType, Digest: d.String(), Size: counted.n}, nil
}

type counter struct {
	w io.Writer
	n int64
}

// Write counts.
func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// pack writes the regular files of a directory; criu makes no others.
func pack(w io.Writer, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	out := tar.NewWriter(w)
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		if err := packFile(out, filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return out.Close()
}

func packFile(out *tar.Writer, name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	h := &tar.Header{Name: fi.Name(), Typeflag: tar.TypeReg, Mode: 0o600, Size: fi.Size(), ModTime: fi.ModTime()}
	if err := out.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(out, f)
	return err
}

// Unpack makes dir with the files of the checkpoint that desc describes. InvalidArgument for one of another kind, or with
// anything in it but files; nothing is written outside of dir.
func Unpack(ctx context.Context, c Content, desc *types.Descriptor, dir string) (err error) {
	invalid := func(format string, a ...any) error {
		return fmt.Errorf("checkpoint %s: "+format+": %w", append(append([]any{desc.Digest}, a...), errdefs.ErrInvalidArgument)...)
	}
	if desc.MediaType != MediaTypeCriu {
		return invalid("its media type is %q, not %q", desc.MediaType, MediaTypeCriu)
	}
	d, err := digest.Parse(desc.Digest)
	if err != nil {
		return invalid("%w", err)
	}
	in, err := c.Open(ctx, ocispec.Descriptor{MediaType: desc.MediaType, Digest: d, Size: desc.Size})
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for archive := tar.NewReader(in); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return ctx.Err()
		}
		if err != nil {
			return invalid("%w", err)
		}
		name := path.Clean(h.Name)
		switch {
		case h.Typeflag == tar.TypeDir && name == ".":
			continue
		case h.Typeflag != tar.TypeReg || name != path.Base(name) || name == ".." || name == "." || name == "/":
			return invalid("%q is not a file of a flat directory", h.Name)
		}
		if err := unpackFile(archive, filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("checkpoint %s: %w", desc.Digest, err)
		}
	}
}

func unpackFile(r io.Reader, name string) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = io.Copy(f, r)
	return err
}
