// Package archive moves images between files and a daemon: Import reads the tars that docker save, skopeo and ctr write,
// Export writes one that they read, Unpack makes snapshots of an image's layers, Convert makes another image of one. All
// work over small interfaces, so that the same code serves a client (archive/remote) and the daemon (archive/local). It
// must not know either.
package archive

import (
	"context"
	_ "crypto/sha256" // go-digest finds them by name
	_ "crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/diff"
)

// Content is where blobs are kept.
type Content interface {
	diff.Content
	// Keep has the context's lease, if there is one, hold on to a blob that is there; NotFound when there is none.
	Keep(ctx context.Context, d digest.Digest) error
	// Labels of a blob; NotFound when there is none.
	Labels(ctx context.Context, d digest.Digest) (map[string]string, error)
	// SetLabels adds to a blob's labels.
	SetLabels(ctx context.Context, d digest.Digest, labels map[string]string) error
}

// Images is where names are kept.
type Images interface {
	// Put has name stand for target, whatever it stood for before, and adds labels.
	Put(ctx context.Context, name string, target ocispec.Descriptor, labels map[string]string) error
}

// Snapshotter is where layers are unpacked.
type Snapshotter interface {
	// Name of the snapshotter.
	Name() string
	// Exists tells whether there is a committed snapshot of that name.
	Exists(ctx context.Context, name string) (bool, error)
	Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]*types.Mount, error)
	Commit(ctx context.Context, name, key string, labels map[string]string) error
	Remove(ctx context.Context, key string) error
	// Apply unpacks a layer of the content store and gives the descriptor of the uncompressed one.
	Apply(ctx context.Context, layer ocispec.Descriptor, mounts []*types.Mount) (ocispec.Descriptor, error)
}

// Image is a name and what it stands for.
type Image struct {
	Name   string
	Target ocispec.Descriptor
}

// Docker's media types, which mean the same as OCI's.
const (
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
)

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerIndex
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == dockerManifest
}

func isConfig(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageConfig || mediaType == dockerConfig
}

// maxJSON is the largest manifest, index or config that is read, in bytes.
const maxJSON = 8 << 20

// readJSON reads a blob into v.
func readJSON(ctx context.Context, c Content, desc ocispec.Descriptor, v any) error {
	data, err := readBlob(ctx, c, desc)
	if err != nil {
		return err
	}
	return decode(desc, data, v)
}

func decode(desc ocispec.Descriptor, data []byte, v any) error {
	if err := json.Unmarshal(data, v); err != nil {
		return invalid("%s %s is no JSON of that kind: %w", desc.MediaType, desc.Digest, err)
	}
	return nil
}

func readBlob(ctx context.Context, c Content, desc ocispec.Descriptor) (_ []byte, err error) {
	if desc.Size > maxJSON {
		return nil, invalid("%s %s has %d bytes, the maximum is %d", desc.MediaType, desc.Digest, desc.Size, maxJSON)
	}
	r, err := c.Open(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return readAll(r, desc.MediaType+" "+desc.Digest.String())
}

func readAll(r io.Reader, what string) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxJSON+1))
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", what, err)
	}
	if len(data) > maxJSON {
		return nil, invalid("%s has more than %d bytes", what, maxJSON)
	}
	return data, nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}
