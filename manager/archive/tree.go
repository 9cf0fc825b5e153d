package archive

import (
	"context"
	"fmt"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Labels by which the collector finds what a blob refers to.
const (
	labelRefManifest = "containerd.io/gc.ref.content.m."
	labelRefConfig   = "containerd.io/gc.ref.content.config"
	labelRefLayer    = "containerd.io/gc.ref.content.l."
	labelRefSnapshot = "containerd.io/gc.ref.snapshot."
)

// maxDepth bounds how deep indexes may stand in each other.
const maxDepth = 8

// node is an index or a manifest, read.
type node struct {
	desc      ocispec.Descriptor
	manifests []ocispec.Descriptor // of an index
	config    ocispec.Descriptor   // of a manifest
	layers    []ocispec.Descriptor
}

func readNode(ctx context.Context, c Content, desc ocispec.Descriptor) (*node, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	n := &node{desc: desc}
	var children []ocispec.Descriptor
	switch {
	case isIndex(desc.MediaType):
		var index ocispec.Index
		if err := readJSON(ctx, c, desc, &index); err != nil {
			return nil, err
		}
		n.manifests = index.Manifests
		children = index.Manifests
	case isManifest(desc.MediaType):
		var m ocispec.Manifest
		if err := readJSON(ctx, c, desc, &m); err != nil {
			return nil, err
		}
		n.config, n.layers = m.Config, m.Layers
		children = append([]ocispec.Descriptor{m.Config}, m.Layers...)
	default:
		return nil, invalid("media type %q of %s is none of an image", desc.MediaType, desc.Digest)
	}
	for _, child := range children {
		if err := checkDescriptor(child); err != nil {
			return nil, fmt.Errorf("%s: %w", desc.Digest, err)
		}
	}
	return n, nil
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

// link checks that everything below desc is there, labels each blob with what it refers to, and tells whether something
// was missing. An index may lack some of its images (those of other platforms), an image none of its parts.
func link(ctx context.Context, c Content, desc ocispec.Descriptor, depth int) error {
	if depth > maxDepth {
		return invalid("indexes stand in each other more than %d deep", maxDepth)
	}
	n, err := readNode(ctx, c, desc)
	if err != nil {
		return err
	}
	labels := map[string]string{}
	if isManifest(desc.MediaType) {
		labels[labelRefConfig] = n.config.Digest.String()
		for i, l := range n.layers {
			labels[labelRefLayer+strconv.Itoa(i)] = l.Digest.String()
		}
		for _, part := range append([]ocispec.Descriptor{n.config}, n.layers...) {
			if _, err := c.Labels(ctx, part.Digest); err != nil {
				return fmt.Errorf("manifest %s lacks its %s: %w", desc.Digest, part.MediaType, err)
			}
		}
		return c.SetLabels(ctx, desc.Digest, labels)
	}
	var missing error
	found := 0
	for i, m := range n.manifests {
		err := link(ctx, c, m, depth+1)
		switch {
		case err == nil:
			found++
			labels[labelRefManifest+strconv.Itoa(i)] = m.Digest.String()
		case errdefs.IsNotFound(err):
			missing = err
		default:
			return err
		}
	}
	if found == 0 && missing != nil {
		return fmt.Errorf("index %s has no image that is complete: %w", desc.Digest, missing)
	}
	if len(labels) == 0 {
		return nil
	}
	return c.SetLabels(ctx, desc.Digest, labels)
}

// resolve finds the manifest that suits the platform best, and that is there.
func resolve(ctx context.Context, c Content, desc ocispec.Descriptor, match platforms.MatchComparer, depth int) (*node, error) {
	if depth > maxDepth {
		return nil, invalid("indexes stand in each other more than %d deep", maxDepth)
	}
	n, err := readNode(ctx, c, desc)
	if err != nil || isManifest(desc.MediaType) {
		return n, err
	}
	var best *node
	var rank ocispec.Platform
	var last error
	for _, m := range n.manifests {
		if m.Annotations["vnd.docker.reference.type"] != "" {
			continue // an attestation of BuildKit, no image
		}
		if !isIndex(m.MediaType) && !isManifest(m.MediaType) {
			continue
		}
		if m.Platform != nil && !match.Match(*m.Platform) {
			continue
		}
		found, err := resolve(ctx, c, m, match, depth+1)
		if errdefs.IsNotFound(err) {
			last = err
			continue
		}
		if err != nil {
			return nil, err
		}
		p := m.Platform
		if p == nil {
			var config ocispec.Image
			if err := readJSON(ctx, c, found.config, &config); err != nil {
				return nil, err
			}
			if !match.Match(config.Platform) {
				continue
			}
			p = &config.Platform
		}
		if best == nil || match.Less(*p, rank) {
			best, rank = found, *p
		}
	}
	if best == nil && last != nil {
		return nil, last
	}
	if best == nil {
		return nil, fmt.Errorf("index %s has no image for %s: %w", desc.Digest, platforms.DefaultString(), errdefs.ErrNotFound)
	}
	return best, nil
}
