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
	p, err := tree(ctx, c, target, 0, &count)
	if err != nil {
		return Part{}, fmt.Errorf("cannot read image %s: %w", target.Digest, err)
	}
	return p, nil
}

func tree(ctx context.Context, c Content, desc ocispec.Descriptor, depth int, count *int) (Part, error) {
	p := Part{Descriptor: desc}
	if *count++; *count > maxParts {
		return p, invalid("it has more than %d parts", maxParts)
	}
	if depth > maxDepth {
		return p, invalid("indexes stand in each other more than %d deep", maxDepth)
	}
	_, err := c.Labels(ctx, desc.Digest)
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
	n, err := readNode(ctx, c, desc)
	if err != nil {
		return p, err
	}
	children := n.manifests
	if isManifest(desc.MediaType) {
		children = append([]ocispec.Descriptor{n.config}, n.layers...)
	}
	for _, d := range children {
		child, err := tree(ctx, c, d, depth+1, count)
		if err != nil {
			return p, err
		}
		p.Children = append(p.Children, child)
	}
	return p, nil
}
