package archive

import (
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// What the manifests and indexes of a stranger may be.
const (
	maxDepth    = 8        // how deep indexes may stand in each other
	maxChildren = 10_000   // what one of them may name
	maxTotal    = 64 << 20 // bytes of all of an image
)

// node is an index or a manifest, read.
type node struct {
	desc      ocispec.Descriptor
	manifests []ocispec.Descriptor // of an index
	config    ocispec.Descriptor   // of a manifest
	layers    []ocispec.Descriptor
}

// parts are the config and the layers of a manifest.
func (n *node) parts() []ocispec.Descriptor {
	return append([]ocispec.Descriptor{n.config}, n.layers...)
}

// walker reads the indexes and manifests below an image, each once: one may stand in many others, many times.
type walker struct {
	ctx   context.Context
	c     Content
	nodes map[string]read[*node]
	plats map[digest.Digest]read[ocispec.Platform] // of configs
	have  map[digest.Digest]error                  // of blobs
	bytes int64
}

// read is what became of reading something.
type read[T any] struct {
	v   T
	err error
}

func newWalker(ctx context.Context, c Content) *walker {
	return &walker{
		ctx: ctx, c: c, nodes: map[string]read[*node]{}, plats: map[digest.Digest]read[ocispec.Platform]{}, have: map[digest.Digest]error{},
	}
}

// once does fn for a key at its first call, and remembers what came of it.
func once[K comparable, T any](m map[K]read[T], key K, fn func() (T, error)) (T, error) {
	r, ok := m[key]
	if !ok {
		r.v, r.err = fn()
		m[key] = r
	}
	return r.v, r.err
}

// deep is an error for an index that stands too deep in others.
func deep(depth int) error {
	if depth > maxDepth {
		return invalid("indexes stand in each other more than %d deep", maxDepth)
	}
	return nil
}

// key names a blob as what it is said to be: the same bytes may be read as an index and as a manifest.
func key(desc ocispec.Descriptor) string { return desc.MediaType + " " + desc.Digest.String() }

// node reads an index or a manifest.
func (w *walker) node(desc ocispec.Descriptor) (*node, error) {
	if err := w.ctx.Err(); err != nil {
		return nil, err
	}
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	n, err := once(w.nodes, key(desc), func() (*node, error) { return w.read(desc) })
	if err != nil {
		return nil, err
	}
	same := *n
	same.desc = desc
	return &same, nil
}

func (w *walker) read(desc ocispec.Descriptor) (*node, error) {
	n := &node{desc: desc}
	var children []ocispec.Descriptor
	if !isIndex(desc.MediaType) && !isManifest(desc.MediaType) {
		return nil, invalid("media type %q of %s is none of an image", desc.MediaType, desc.Digest)
	}
	data, err := readBlob(w.ctx, w.c, desc)
	if err != nil {
		return nil, err
	}
	if w.bytes += int64(len(data)); w.bytes > maxTotal {
		return nil, invalid("the indexes and manifests have more than %d bytes together", maxTotal)
	}
	if isIndex(desc.MediaType) {
		var index ocispec.Index
		if err := decode(desc, data, &index); err != nil {
			return nil, err
		}
		n.manifests = index.Manifests
		children = index.Manifests
	} else {
		var m ocispec.Manifest
		if err := decode(desc, data, &m); err != nil {
			return nil, err
		}
		n.config, n.layers = m.Config, m.Layers
		children = n.parts()
	}
	if len(children) > maxChildren {
		return nil, invalid("%s %s names %d others, the maximum is %d", desc.MediaType, desc.Digest, len(children), maxChildren)
	}
	for _, child := range children {
		if err := checkDescriptor(child); err != nil {
			return nil, fmt.Errorf("%s: %w", desc.Digest, err)
		}
	}
	return n, nil
}

// present is an error when a blob is not there.
func (w *walker) present(d digest.Digest) error {
	err, known := w.have[d]
	if !known {
		_, err = w.c.Labels(w.ctx, d)
		w.have[d] = err
	}
	return err
}

// platform is the one of a manifest, as its config says.
func (w *walker) platform(n *node) (ocispec.Platform, error) {
	return once(w.plats, n.config.Digest, func() (ocispec.Platform, error) {
		var config ocispec.Image
		err := readJSON(w.ctx, w.c, n.config, &config)
		return config.Platform, err
	})
}

func checkDescriptor(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return invalid("digest %q of a %s: %w", d.Digest, d.MediaType, err)
	}
	if d.Size < 0 {
		return invalid("size %d of %s", d.Size, d.Digest)
	}
	return nil
}

// attests tells whether a member of an index is an attestation of BuildKit, which looks like an image.
func attests(m ocispec.Descriptor) bool { return m.Annotations["vnd.docker.reference.type"] != "" }
