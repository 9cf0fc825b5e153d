package archive

import (
	"context"
	"fmt"
	"strconv"
	"strings"

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

// DiscardLayers has the collector remove those layers of an image for a platform that nothing else refers to: what is unpacked
// needs them no more. Such an image can be run, not exported or pushed.
func DiscardLayers(ctx context.Context, c Content, target ocispec.Descriptor, platform ocispec.Platform) error {
	n, err := newWalker(ctx, c).resolve(target, wanted{platforms.Only(platform), platforms.FormatAll(platform)})
	if err != nil {
		return err
	}
	labels, err := c.Labels(ctx, n.desc.Digest)
	if err != nil {
		return err
	}
	gone := map[string]string{}
	for name := range labels {
		if strings.HasPrefix(name, labelRefLayer) {
			gone[name] = "" // which removes a label
		}
	}
	return c.SetLabels(ctx, n.desc.Digest, gone)
}

// linker labels blobs with what they refer to.
type linker struct {
	*walker
	done map[string]error // by key
}

func newLinker(ctx context.Context, c Content) *linker {
	return &linker{newWalker(ctx, c), map[string]error{}}
}

// link checks that everything below desc is there, labels each blob with what it refers to, and tells whether something
// was missing. An index may lack some of its images (those of other platforms), an image none of its parts.
func (l *linker) link(desc ocispec.Descriptor, depth int) error {
	if err := deep(depth); err != nil {
		return err
	}
	n, err := l.node(desc)
	if err != nil {
		return err
	}
	err, done := l.done[key(desc)]
	if done {
		return err
	}
	if isManifest(desc.MediaType) {
		err = l.manifest(n)
	} else {
		err = l.index(n, depth)
	}
	l.done[key(desc)] = err
	return err
}

func (l *linker) manifest(n *node) error {
	labels := map[string]string{labelRefConfig: n.config.Digest.String()}
	for i, layer := range n.layers {
		labels[labelRefLayer+strconv.Itoa(i)] = layer.Digest.String()
	}
	for _, part := range n.parts() {
		if err := l.present(part.Digest); err != nil {
			return fmt.Errorf("manifest %s lacks its %s: %w", n.desc.Digest, part.MediaType, err)
		}
	}
	return l.c.SetLabels(l.ctx, n.desc.Digest, labels)
}

func (l *linker) index(n *node, depth int) error {
	labels := map[string]string{}
	var missing error
	for i, m := range n.manifests {
		err := l.link(m, depth+1)
		switch {
		case err == nil:
			labels[labelRefManifest+strconv.Itoa(i)] = m.Digest.String()
		case errdefs.IsNotFound(err):
			missing = err
		default:
			return err
		}
	}
	if len(labels) == 0 && missing != nil {
		return fmt.Errorf("index %s has no image that is complete: %w", n.desc.Digest, missing)
	}
	if len(labels) == 0 {
		return nil
	}
	return l.c.SetLabels(l.ctx, n.desc.Digest, labels)
}
