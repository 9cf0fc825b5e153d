package transfer

import (
	"context"
	"io"
	"sync"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/archive/local"
)

// coming is the content store of an image whose layers are still being fetched: they can be read as they come.
type coming struct {
	local.Content
	s     *Service
	blobs map[string]*blob // by digest

	mu   sync.Mutex
	late map[string]map[string]string // labels of layers, by digest
}

// Open reads a blob as far as it is there, and waits for the rest.
func (c *coming) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	b := c.blobs[desc.Digest.String()]
	if b == nil {
		return c.Content.Open(ctx, desc)
	}
	select {
	case fl := <-b.began:
		b.began <- fl // for the next reader
		select {
		case <-fl.ready:
		case <-fl.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if fl.flying() {
			if r, err := fl.part.Open(ctx); err == nil {
				return r, nil
			}
		}
	case <-b.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if err := b.wait(ctx); err != nil {
		return nil, err
	}
	return c.Content.Open(ctx, desc)
}

// wait is for the end of the fetch.
func (b *blob) wait(ctx context.Context) error {
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// SetLabels keeps a layer's labels until it is there.
func (c *coming) SetLabels(ctx context.Context, d digest.Digest, labels map[string]string) error {
	if c.blobs[d.String()] == nil {
		return c.Content.SetLabels(ctx, d, labels)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.late[d.String()] = labels
	return nil
}

// settle sets the labels that were kept.
func (c *coming) settle(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for d, labels := range c.late {
		if err := c.blobs[d].wait(ctx); err != nil {
			return err
		}
		if err := c.Content.SetLabels(ctx, digest.Digest(d), labels); err != nil {
			return err
		}
	}
	return nil
}

// unpacker is a snapshotter whose layers come from coming.
type unpacker struct {
	local.Snapshotter
	c *coming
}

// Apply unpacks a layer as it comes, or where other programs do that, when it is there. What is wrong with the fetch counts
// more than what that looks like when it is unpacked.
func (u unpacker) Apply(ctx context.Context, layer ocispec.Descriptor, mounts []*types.Mount) (ocispec.Descriptor, error) {
	b := u.c.blobs[layer.Digest.String()]
	if b == nil {
		return u.Snapshotter.Apply(ctx, layer, mounts)
	}
	apply := func() (ocispec.Descriptor, error) { return u.ApplyFrom(ctx, u.c, layer, mounts) }
	if !u.Streams() {
		if err := b.wait(ctx); err != nil {
			return ocispec.Descriptor{}, err
		}
		apply = func() (ocispec.Descriptor, error) { return u.Snapshotter.Apply(ctx, layer, mounts) }
	}
	b.job.unpack(false)
	applied, err := apply()
	if err != nil {
		if ferr := b.wait(ctx); ferr != nil {
			err = ferr
		}
		return applied, err
	}
	b.job.unpack(true)
	return applied, nil
}

// unpack begins to unpack an image for each platform that fits it. The config is there.
func (p *pulling) unpack(ctx context.Context, n *node, layers *coming) error {
	if len(p.image.Unpacks) == 0 || archive.KindOf(n.config.MediaType) != archive.Conf {
		return nil
	}
	var config ocispec.Image
	if err := p.s.readJSON(ctx, n.config, &config); err != nil {
		return err
	}
	platform := config.Platform
	if n.desc.Platform != nil {
		platform = *n.desc.Platform
	}
	for i, u := range p.image.Unpacks {
		if !p.match[i].Match(platform) {
			continue
		}
		s, err := p.s.snapshotter(u)
		if err != nil {
			return err
		}
		p.mu.Lock()
		p.found[i] = true
		p.mu.Unlock()
		p.group.Go(func() error { return layers.unpack(ctx, unpacker{s, layers}, n.desc) })
	}
	return nil
}

// unpack makes snapshots of the layers. A layer that could not be read to its end, because whoever fetched it has failed,
// is unpacked again when we have fetched it; if we fail as well, the error is that of the fetch.
func (c *coming) unpack(ctx context.Context, u unpacker, manifest ocispec.Descriptor) error {
	for {
		_, err := archive.Unpack(ctx, c, u, manifest)
		if err == nil {
			return c.settle(ctx)
		}
		if !errdefs.IsAborted(err) {
			return err
		}
		for _, b := range c.blobs {
			if err := b.wait(ctx); err != nil {
				return err
			}
		}
	}
}
