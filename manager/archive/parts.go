package archive

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Parts is what an image consists of on this machine's platform.
type Parts struct {
	Meta      []ocispec.Descriptor // the target and, if that is an index, the manifest
	Content   []ocispec.Descriptor // config and layers, each once
	Platforms []string             // of all images of the target whose manifests are there
}

// Size of all, in bytes.
func (p *Parts) Size() int64 {
	var n int64
	for _, list := range [][]ocispec.Descriptor{p.Meta, p.Content} {
		for _, d := range list {
			n += d.Size
		}
	}
	return n
}

// Inspect reads what an image consists of; whether its config and layers are there it does not ask, but for the config of
// an image outside an index, which tells its platform. NotFound when the target, or a manifest for this platform, is not
// there.
func Inspect(ctx context.Context, c Content, target ocispec.Descriptor) (*Parts, error) {
	p, err := inspect(ctx, c, target)
	if err != nil {
		return nil, fmt.Errorf("cannot read image %s: %w", target.Digest, err)
	}
	return p, nil
}

func inspect(ctx context.Context, c Content, target ocispec.Descriptor) (*Parts, error) {
	n, err := resolve(ctx, c, target, platforms.Default(), 0)
	if err != nil {
		return nil, err
	}
	p := &Parts{Meta: []ocispec.Descriptor{target}}
	if n.desc.Digest != target.Digest {
		p.Meta = append(p.Meta, n.desc)
	}
	seen := map[string]bool{}
	for _, d := range append([]ocispec.Descriptor{n.config}, n.layers...) {
		if !seen[d.Digest.String()] {
			seen[d.Digest.String()] = true
			p.Content = append(p.Content, d)
		}
	}
	p.Platforms, err = platformsOf(ctx, c, target, 0)
	return p, err
}

// platformsOf gives the platforms of the images that are there, in order.
func platformsOf(ctx context.Context, c Content, desc ocispec.Descriptor, depth int) (found []string, err error) {
	if depth > maxDepth {
		return nil, invalid("indexes stand in each other more than %d deep", maxDepth)
	}
	n, err := readNode(ctx, c, desc)
	if err != nil {
		return nil, err
	}
	if isManifest(desc.MediaType) {
		p := desc.Platform
		if p == nil {
			var config ocispec.Image
			if err := readJSON(ctx, c, n.config, &config); err != nil {
				if errdefs.IsNotFound(err) {
					return nil, nil
				}
				return nil, err
			}
			p = &config.Platform
		}
		return []string{platforms.Format(*p)}, nil
	}
	for _, m := range n.manifests {
		if m.Annotations["vnd.docker.reference.type"] != "" || !isIndex(m.MediaType) && !isManifest(m.MediaType) {
			continue
		}
		below, err := platformsOf(ctx, c, m, depth+1)
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		for _, b := range below {
			known := false
			for _, f := range found {
				known = known || f == b
			}
			if !known {
				found = append(found, b)
			}
		}
	}
	return found, nil
}
