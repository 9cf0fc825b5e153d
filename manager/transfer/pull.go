package transfer

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/content"
)

// Pull fetches the image that remote, called name, resolves to, unpacks it, and then gives it its names: there is no
// image before all of it is there. Layers are fetched several at the same time, each by several requests, and unpacked
// while they come. What a pull that failed has fetched is kept for the next one. progress, if not nil, is told what
// happens, by one goroutine.
func (s *Service) Pull(ctx context.Context, name string, remote Remote, image Image, progress func(Progress)) ([]Stored, error) {
	var out []Stored
	err := s.leased(ctx, "pull "+name, func(ctx context.Context) (err error) {
		out, err = s.pull(ctx, name, remote, image, progress)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot pull %s: %w", name, err)
	}
	return out, nil
}

// pulling is a pull under way.
type pulling struct {
	s       *Service
	remote  Remote
	image   Image
	tracker *tracker
	group   *errgroup.Group
	slots   chan struct{} // of layers
	small   chan struct{} // of all else
	host    string        // where it comes from
	repo    string

	mu     sync.Mutex
	blobs  map[string]*blob // by digest
	nodes  int
	images int
	match  []platforms.MatchComparer // of image.Unpacks
	found  []bool                    // so
}

func (s *Service) pull(ctx context.Context, name string, remote Remote, image Image, progress func(Progress)) ([]Stored, error) {
	host, repo, err := source(name)
	if err != nil {
		return nil, err
	}
	if len(image.names()) == 0 {
		return nil, invalid("nobody says what the image is to be called")
	}
	if image.MetadataOnly && len(image.Unpacks) > 0 {
		return nil, invalid("there is nothing to be unpacked without layers")
	}
	if len(image.Unpacks) > 0 && s.cfg.Snapshots == nil {
		return nil, fmt.Errorf("there is no snapshotter that works: %w", errdefs.ErrUnavailable)
	}
	t := newTracker(name, progress)
	defer t.end()
	t.say(Progress{Event: "Resolving from OCI Registry (" + name + ")"})
	desc, err := remote.Resolve(ctx)
	if err != nil {
		return nil, err
	}
	if s.cfg.Verify != nil {
		if err := s.cfg.Verify(ctx, name, desc); err != nil {
			return nil, err
		}
	}
	t.say(Progress{Event: "Pulling from OCI Registry (" + name + ")"})
	t.say(Progress{Event: "fetching image content", Name: name, Desc: &desc})
	// Room for the writer of another error, should all fail at the same time.
	group, gctx := errgroup.WithContext(ctx)
	p := &pulling{
		s: s, remote: remote, image: image, tracker: t, group: group, host: host, repo: repo, blobs: map[string]*blob{},
		slots: make(chan struct{}, cmp.Or(image.Concurrent, s.cfg.Downloads)), small: make(chan struct{}, 2*s.cfg.Downloads), found: make([]bool, len(image.Unpacks)),
	}
	for _, u := range image.Unpacks {
		p.match = append(p.match, platforms.Only(u.Platform))
	}
	group.Go(func() error { return p.node(gctx, desc, nil, 0, !image.MetadataOnly) })
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if err := p.complete(desc); err != nil {
		return nil, err
	}
	out, err := s.store(ctx, image.names(), image.Labels, desc)
	if err != nil {
		return nil, err
	}
	for _, i := range out {
		t.say(Progress{Event: "saved", Name: i.Name, Desc: &i.Target})
	}
	t.say(Progress{Event: "Completed pull from OCI Registry (" + name + ")"})
	return out, nil
}

// complete is an error when what was asked for is not in the image.
func (p *pulling) complete(desc ocispec.Descriptor) error {
	if p.images == 0 && !p.image.MetadataOnly {
		return fmt.Errorf("%s has no image for %s: %w", desc.Digest, formatAll(p.image.Platforms), errdefs.ErrNotFound)
	}
	for i, u := range p.image.Unpacks {
		if !p.found[i] {
			return fmt.Errorf("%s has no image for %s that could be unpacked: %w", desc.Digest, platforms.FormatAll(u.Platform), errdefs.ErrNotFound)
		}
	}
	return nil
}

func formatAll(list []ocispec.Platform) string {
	if len(list) == 0 {
		return "any platform"
	}
	var out []string
	for _, p := range list {
		out = append(out, platforms.FormatAll(p))
	}
	return strings.Join(out, " or ")
}

// enter gives the blob of a descriptor, and whether the caller is the first who wants it.
func (p *pulling) enter(desc ocispec.Descriptor, parent *ocispec.Descriptor) (b *blob, first bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if b := p.blobs[desc.Digest.String()]; b != nil {
		return b, false
	}
	b = newBlob(desc, nil, p.tracker.job(desc, parent))
	p.blobs[desc.Digest.String()] = b
	return b, true
}

// have fetches a blob of metadata.
func (p *pulling) have(ctx context.Context, b *blob) error {
	select {
	case p.small <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-p.small }()
	return p.take(ctx, b)
}

// take fetches a blob, and notes where it came from.
func (p *pulling) take(ctx context.Context, b *blob) error {
	b.labels = map[string]string{labelSource + p.host: p.repo}
	if i, err := p.s.cfg.Content.Info(ctx, b.desc.Digest); err == nil {
		b.labels = p.sources(i)
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	return p.s.fetch(ctx, p.remote, b)
}

// sources adds this repository to those a blob is known to be in.
func (p *pulling) sources(i content.Info) map[string]string {
	const maxLabel = 4096 // of key and value
	key := labelSource + p.host
	list := strings.Split(i.Labels[key], ",")
	if i.Labels[key] == "" {
		list = nil
	}
	if slices.Contains(list, p.repo) {
		return nil
	}
	list = append(list, p.repo)
	slices.Sort(list)
	all := strings.Join(list, ",")
	if len(key)+len(all) > maxLabel {
		return nil
	}
	return map[string]string{key: all}
}

// node fetches a manifest or an index, and then what it names. Without whole, no layers.
func (p *pulling) node(ctx context.Context, desc ocispec.Descriptor, parent *ocispec.Descriptor, depth int, whole bool) error {
	if depth > maxDepth {
		return invalid("indexes stand in each other more than %d deep", maxDepth)
	}
	if err := checkNode(desc); err != nil {
		return err
	}
	b, first := p.enter(desc, parent)
	if !first {
		return nil
	}
	kind := archive.KindOf(desc.MediaType)
	p.mu.Lock()
	p.nodes++
	tooMany := p.nodes > maxNodes
	p.mu.Unlock()
	if tooMany {
		return invalid("the image has more than %d manifests", maxNodes)
	}
	if err := p.have(ctx, b); err != nil {
		return err
	}
	if kind != archive.Index && kind != archive.Manifest {
		if depth == 0 {
			return invalid("media type %q of %s is none of an image", desc.MediaType, desc.Digest)
		}
		return nil // something else in an index, which nobody here looks into
	}
	n, err := p.s.read(ctx, desc)
	if err != nil {
		return err
	}
	if err := p.s.blobs.SetLabels(ctx, desc.Digest, n.references()); err != nil {
		return err
	}
	if kind == archive.Manifest {
		return p.manifest(ctx, n, whole)
	}
	all, meta := p.image.choice(n)
	if !whole {
		all, meta = nil, n.manifests
	}
	for _, m := range all {
		p.group.Go(func() error { return p.node(ctx, m, &n.desc, depth+1, true) })
	}
	for _, m := range meta {
		p.group.Go(func() error { return p.node(ctx, m, &n.desc, depth+1, false) })
	}
	return nil
}

// manifest fetches what a manifest names, and unpacks it as it comes.
func (p *pulling) manifest(ctx context.Context, n *node, whole bool) error {
	config, first := p.enter(n.config, &n.desc)
	if first {
		if err := p.have(ctx, config); err != nil {
			return err
		}
	}
	if !whole {
		return nil
	}
	p.mu.Lock()
	p.images++
	p.mu.Unlock()
	layers := &coming{s: p.s, Content: p.s.blobs, blobs: map[string]*blob{}, late: map[string]map[string]string{}}
	var todo []*blob
	for _, l := range n.layers {
		if !archive.Distributable(l.MediaType) {
			continue
		}
		b, first := p.enter(l, &n.desc)
		layers.blobs[l.Digest.String()] = b
		if first {
			todo = append(todo, b)
		}
	}
	select {
	case <-config.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if config.err != nil {
		return config.err
	}
	if err := p.unpack(ctx, n, layers); err != nil {
		return err
	}
	for _, b := range todo {
		select {
		case p.slots <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		p.group.Go(func() error {
			defer func() { <-p.slots }()
			return p.take(ctx, b)
		})
	}
	return nil
}
