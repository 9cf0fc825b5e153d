package archive

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Part is a blob of an image, and those it refers to.
type Part struct {
	ocispec.Descriptor
	Present  bool
	Children []Part // of an index its manifests, of a manifest its config and layers; none if it is not there
}

// maxParts is how many parts of an image are looked at.
const maxParts = 100_000

// Tree gives all parts of an image, for all platforms, whether they are there or not. InvalidArgument for a target, or a
// manifest below it, that is malformed, and for an image of more than 100,000 parts.
func Tree(ctx context.Context, c Content, target ocispec.Descriptor) (Part, error) {
	count := 0
	p, err := newWalker(ctx, c).tree(target, 0, &count)
	if err != nil {
		return Part{}, fmt.Errorf("cannot read image %s: %w", target.Digest, err)
	}
	return p, nil
}

func (w *walker) tree(desc ocispec.Descriptor, depth int, count *int) (Part, error) {
	p := Part{Descriptor: desc}
	if *count++; *count > maxParts {
		return p, invalid("it has more than %d parts", maxParts)
	}
	err := w.present(desc.Digest)
	if errdefs.IsNotFound(err) {
		return p, nil
	}
	if err != nil {
		return p, err
	}
	p.Present = true
	if !isIndex(desc.MediaType) && !isManifest(desc.MediaType) {
		return p, nil
	}
	if err := deep(depth); err != nil {
		return p, err
	}
	n, err := w.node(desc)
	if err != nil {
		return p, err
	}
	children := n.manifests
	if isManifest(desc.MediaType) {
		children = n.parts()
	}
	for _, d := range children {
		child, err := w.tree(d, depth+1, count)
		if err != nil {
			return p, err
		}
		p.Children = append(p.Children, child)
	}
	return p, nil
}
