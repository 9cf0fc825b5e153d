package transfer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive"
)

const (
	// maxManifest is the largest manifest or index that is read, in bytes, as registries limit them.
	maxManifest = 4 << 20
	// maxDepth bounds how deep indexes may stand in each other.
	maxDepth = 8
	// maxNodes bounds how many manifests and indexes an image may have.
	maxNodes = 2000
	// maxLayers bounds what a manifest may name.
	maxLayers = 10_000
)

// Docker's manifests before schema 2.
const schema1 = "application/vnd.docker.distribution.manifest.v1"

// The labels by which the collector finds what a blob needs.
const (
	labelConfig   = "containerd.io/gc.ref.content.config"
	labelLayer    = "containerd.io/gc.ref.content.l."
	labelManifest = "containerd.io/gc.ref.content.m."
	labelOther    = "containerd.io/gc.ref.content."
)

// labelSource and a registry's host says in which of its repositories a blob is.
const labelSource = "containerd.io/distribution.source."

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// node is a manifest or an index.
type node struct {
	desc      ocispec.Descriptor
	manifests []ocispec.Descriptor // of an index
	config    ocispec.Descriptor   // of a manifest
	layers    []ocispec.Descriptor
}

// children are all that it names, in order.
func (n *node) children() []ocispec.Descriptor {
	if n.manifests != nil {
		return n.manifests
	}
	return append([]ocispec.Descriptor{n.config}, n.layers...)
}

// checkNode is an error for what cannot be part of an image, before any of it is fetched.
func checkNode(desc ocispec.Descriptor) error {
	if err := checkDescriptor(desc); err != nil {
		return err
	}
	if len(desc.MediaType) >= len(schema1) && desc.MediaType[:len(schema1)] == schema1 {
		return invalid("%s is a manifest of schema 1, which is supported no longer: push the image again with a current client", desc.Digest)
	}
	if desc.Size > maxManifest {
		return invalid("%s %s has %d bytes, the maximum is %d", archive.KindOf(desc.MediaType), desc.Digest, desc.Size, maxManifest)
	}
	return nil
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

// read reads a manifest or an index of the content store.
func (s *Service) read(ctx context.Context, desc ocispec.Descriptor) (*node, error) {
	data, err := s.readAll(ctx, desc)
	if err != nil {
		return nil, err
	}
	return parse(desc, data)
}

// parse is an error, InvalidArgument, for what names something that there cannot be.
func parse(desc ocispec.Descriptor, data []byte) (*node, error) {
	n := &node{desc: desc}
	if archive.KindOf(desc.MediaType) == archive.Index {
		var index ocispec.Index
		if err := decode(desc, data, &index); err != nil {
			return nil, err
		}
		n.manifests = append([]ocispec.Descriptor{}, index.Manifests...)
	} else {
		var m ocispec.Manifest
		if err := decode(desc, data, &m); err != nil {
			return nil, err
		}
		n.config, n.layers = m.Config, m.Layers
	}
	if len(n.manifests) > maxNodes || len(n.layers) > maxLayers {
		return nil, invalid("%s names %d others, which are too many", desc.Digest, len(n.manifests)+len(n.layers))
	}
	for _, c := range n.children() {
		if err := checkDescriptor(c); err != nil {
			return nil, fmt.Errorf("%s %s: %w", archive.KindOf(desc.MediaType), desc.Digest, err)
		}
	}
	return n, nil
}

func (s *Service) readJSON(ctx context.Context, desc ocispec.Descriptor, v any) error {
	data, err := s.readAll(ctx, desc)
	if err != nil {
		return err
	}
	return decode(desc, data, v)
}

func (s *Service) readAll(ctx context.Context, desc ocispec.Descriptor) (data []byte, err error) {
	if desc.Size > maxManifest {
		return nil, invalid("%s has %d bytes, the maximum is %d", desc.Digest, desc.Size, maxManifest)
	}
	r, err := s.blobs.Open(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return io.ReadAll(io.LimitReader(r, maxManifest))
}

func decode(desc ocispec.Descriptor, data []byte, v any) error {
	if err := json.Unmarshal(data, v); err != nil {
		return invalid("%s %s is no JSON of that kind: %w", desc.MediaType, desc.Digest, err)
	}
	return nil
}

// references are the labels of a node, for the collector.
func (n *node) references() map[string]string {
	out := map[string]string{}
	count := map[string]int{}
	for _, c := range n.children() {
		key := labelOther
		switch archive.KindOf(c.MediaType) {
		case archive.Conf:
			out[labelConfig] = c.Digest.String()
			continue
		case archive.Layer:
			key = labelLayer
		case archive.Manifest:
			key = labelManifest
		}
		out[key+strconv.Itoa(count[key])] = c.Digest.String()
		count[key]++
	}
	return out
}

// choice are the parts of an index that count for an image: those to be taken whole, and those whose metadata is.
func (i Image) choice(n *node) (whole, meta []ocispec.Descriptor) {
	if len(i.Platforms) == 0 && i.ManifestLimit == 0 {
		return n.manifests, nil
	}
	match := matcher(i.Platforms)
	fits := func(d ocispec.Descriptor) bool { return d.Platform == nil || match.Match(*d.Platform) }
	for _, m := range n.manifests {
		if fits(m) {
			whole = append(whole, m)
		} else if i.AllMetadata {
			meta = append(meta, m)
		}
	}
	if i.ManifestLimit > 0 && len(whole) > i.ManifestLimit {
		slices.SortStableFunc(whole, func(a, b ocispec.Descriptor) int { return better(match, a, b) })
		if i.AllMetadata {
			meta = append(meta, whole[i.ManifestLimit:]...)
		}
		whole = whole[:i.ManifestLimit]
	}
	return whole, meta
}

// better orders parts of an index: those of the platform that suits best first, those without one last.
func better(match platforms.MatchComparer, a, b ocispec.Descriptor) int {
	switch {
	case a.Platform == nil && b.Platform == nil:
		return 0
	case a.Platform == nil:
		return 1
	case b.Platform == nil:
		return -1
	case match.Less(*a.Platform, *b.Platform):
		return -1
	case match.Less(*b.Platform, *a.Platform):
		return 1
	}
	return 0
}

// matcher takes any of the platforms, the first ones rather; without any, all there are.
func matcher(list []ocispec.Platform) platforms.MatchComparer {
	if len(list) == 0 {
		return platforms.All
	}
	return platforms.Ordered(list...)
}
