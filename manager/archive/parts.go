package archive

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
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
	w := newWalker(ctx, c)
	n, err := w.resolve(target, here())
	if err != nil {
		return nil, err
	}
	p := &Parts{Meta: []ocispec.Descriptor{target}}
	if n.desc.Digest != target.Digest {
		p.Meta = append(p.Meta, n.desc)
	}
	seen := map[digest.Digest]bool{}
	for _, d := range n.parts() {
		if !seen[d.Digest] {
			seen[d.Digest] = true
			p.Content = append(p.Content, d)
		}
	}
	l := &platformList{walker: w, indexes: map[digest.Digest]bool{}, known: map[string]bool{}}
	err = l.add(target, 0)
	p.Platforms = l.list
	return p, err
}

// platformList collects the platforms of the images that are there, in order.
type platformList struct {
	*walker
	indexes map[digest.Digest]bool // that were looked into
	known   map[string]bool
	list    []string
}

// add is for an index or a manifest and what is below it. NotFound when it is not there itself.
func (l *platformList) add(desc ocispec.Descriptor, depth int) error {
	if err := deep(depth); err != nil {
		return err
	}
	n, err := l.node(desc)
	if err != nil {
		return err
	}
	if isManifest(desc.MediaType) {
		return l.image(n)
	}
	if l.indexes[desc.Digest] {
		return nil
	}
	l.indexes[desc.Digest] = true
	for _, m := range n.manifests {
		if attests(m) || !isIndex(m.MediaType) && !isManifest(m.MediaType) {
			continue
		}
		if err := l.add(m, depth+1); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

func (l *platformList) image(n *node) error {
	p := n.desc.Platform
	if p == nil {
		own, err := l.platform(n)
		if errdefs.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		p = &own
	}
	if name := platforms.Format(*p); !l.known[name] {
		l.known[name] = true
		l.list = append(l.list, name)
	}
	return nil
}
