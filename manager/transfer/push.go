package transfer

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/content"
)

// Push sends an image to a registry under a name: what is there already is not sent, a blob that another repository of the
// registry has is taken from there, and a manifest comes after all that it names. open gives the repository of a reference,
// NAME[:TAG]@DIGEST. With image.Platforms only these are sent: one of them as itself, several as the index they are in.
func (s *Service) Push(ctx context.Context, name string, open func(ref string) (Remote, error), image Image, progress func(Progress)) error {
	err := s.leased(ctx, "push "+name, func(ctx context.Context) error { return s.push(ctx, name, open, image, progress) })
	if err != nil {
		return fmt.Errorf("cannot push %s: %w", name, err)
	}
	return nil
}

type pushing struct {
	s       *Service
	remote  Remote
	image   Image
	tracker *tracker
	slots   chan struct{}
	host    string
	repo    string

	mu   sync.Mutex
	sent map[string]*sending // by digest
}

// sending is a blob that is sent once, for all who name it.
type sending struct {
	done chan struct{}
	err  error
}

func (s *Service) push(ctx context.Context, name string, open func(string) (Remote, error), image Image, progress func(Progress)) error {
	host, repo, err := source(name)
	if err != nil {
		return err
	}
	target, err := s.pushed(ctx, image)
	if err == nil {
		target, err = s.only(ctx, target, image)
	}
	if err != nil {
		return err
	}
	ref, err := withDigest(name, target)
	if err != nil {
		return err
	}
	remote, err := open(ref)
	if err != nil {
		return err
	}
	t := newTracker(name, progress)
	defer t.end()
	t.say(Progress{Event: "Pushing to OCI Registry (" + name + ")"})
	t.say(Progress{Event: "pushing content", Name: name, Desc: &target})
	p := &pushing{s: s, remote: remote, image: image, tracker: t, slots: make(chan struct{}, cmp.Or(image.Concurrent, s.cfg.Uploads)), host: host, repo: repo, sent: map[string]*sending{}}
	if err := p.once(ctx, target, nil, func(j *job) error { return p.node(ctx, target, j, 0) }); err != nil {
		return err
	}
	t.say(Progress{Event: "pushed content", Name: name, Desc: &target})
	t.say(Progress{Event: "Completed push to OCI Registry (" + name + ")", Desc: &target})
	return nil
}

// pushed is what is to be sent.
func (s *Service) pushed(ctx context.Context, image Image) (ocispec.Descriptor, error) {
	if image.Target == nil {
		found, err := s.lookup(ctx, image)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		return found[0].Target, nil
	}
	t := *image.Target
	if kind := archive.KindOf(t.MediaType); kind != archive.Index && kind != archive.Manifest {
		return t, invalid("media type %q of %s is none of an image", t.MediaType, t.Digest)
	}
	i, err := s.cfg.Content.Info(ctx, t.Digest)
	t.Size = i.Size
	return t, err
}

// only is the one image of an index that image.Platforms asks for; the index itself when it asks for several, or for none.
func (s *Service) only(ctx context.Context, target ocispec.Descriptor, image Image) (ocispec.Descriptor, error) {
	if len(image.Platforms) == 0 || archive.KindOf(target.MediaType) != archive.Index {
		return target, nil
	}
	if len(image.Platforms) == 1 && image.ManifestLimit == 0 {
		image.ManifestLimit = 1
	}
	n, err := s.read(ctx, target)
	if err != nil {
		return target, err
	}
	switch chosen, _ := image.choice(n); len(chosen) {
	case 0:
		return target, fmt.Errorf("index %s has no image for %s: %w", target.Digest, formatAll(image.Platforms), errdefs.ErrNotFound)
	case 1:
		return s.only(ctx, chosen[0], image)
	}
	return target, nil
}

// once has send called for the first who wants desc sent, and gives its error to all.
func (p *pushing) once(ctx context.Context, desc ocispec.Descriptor, parent *ocispec.Descriptor, send func(*job) error) error {
	p.mu.Lock()
	s := p.sent[desc.Digest.String()]
	if s == nil {
		s = &sending{done: make(chan struct{})}
		p.sent[desc.Digest.String()] = s
		p.mu.Unlock()
		s.err = send(p.tracker.job(desc, parent))
		close(s.done)
		return s.err
	}
	p.mu.Unlock()
	select {
	case <-s.done:
		return s.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// node sends what a manifest or an index names, and then itself.
func (p *pushing) node(ctx context.Context, desc ocispec.Descriptor, j *job, depth int) error {
	if depth > maxDepth {
		return invalid("indexes stand in each other more than %d deep", maxDepth)
	}
	if err := checkNode(desc); err != nil {
		return err
	}
	n, err := p.s.read(ctx, desc)
	if err != nil {
		return err
	}
	below, bctx := errgroup.WithContext(ctx)
	for _, c := range n.children() {
		kind := archive.KindOf(c.MediaType)
		if !p.image.Foreign && !archive.Distributable(c.MediaType) {
			continue
		}
		below.Go(func() error {
			return p.once(bctx, c, &desc, func(j *job) error {
				if kind == archive.Index || kind == archive.Manifest {
					return p.node(bctx, c, j, depth+1)
				}
				select {
				case p.slots <- struct{}{}:
				case <-bctx.Done():
					return context.Cause(bctx)
				}
				defer func() { <-p.slots }()
				return p.blob(bctx, c, j)
			})
		})
	}
	if err := below.Wait(); err != nil {
		if errdefs.IsNotFound(err) && n.manifests != nil {
			return fmt.Errorf("index %s is not complete here, name one of its platforms: %w", desc.Digest, err)
		}
		return err
	}
	return p.send(ctx, desc, j)
}

// blob sends a layer or a config, or has the registry take it from where it has it.
func (p *pushing) blob(ctx context.Context, desc ocispec.Descriptor, j *job) error {
	i, err := p.s.cfg.Content.Info(ctx, desc.Digest)
	if err != nil {
		return err
	}
	there, err := p.remote.Exists(ctx, desc)
	if err != nil {
		return err
	}
	if there {
		j.set(eventExists, desc.Size)
		return nil
	}
	for _, from := range p.elsewhere(i) {
		mounted, err := p.remote.Mount(ctx, desc, from)
		if err != nil && ctx.Err() != nil {
			return err
		}
		if mounted { // one that cannot be mounted is sent, whatever the reason
			j.set(eventExists, desc.Size)
			return nil
		}
	}
	return p.send(ctx, desc, j)
}

// elsewhere are the other repositories of the registry that a blob was fetched from; some may be enough.
func (p *pushing) elsewhere(i content.Info) []string {
	const most = 3
	list := strings.Split(i.Labels[labelSource+p.host], ",")
	list = slices.DeleteFunc(list, func(r string) bool { return r == "" || r == p.repo })
	return list[:min(len(list), most)]
}

// send sends a blob of the content store.
func (p *pushing) send(ctx context.Context, desc ocispec.Descriptor, j *job) error {
	r, err := p.s.cfg.Content.ReaderAt(ctx, desc.Digest)
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	c := &counted{Reader: r}
	j.follow(eventUploading, c.furthest.Load)
	if err := p.remote.Push(ctx, desc, c); err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	j.set(eventComplete, desc.Size)
	return nil
}

// counted notes how far a blob was read.
type counted struct {
	content.Reader
	furthest atomic.Int64
}

func (c *counted) ReadAt(b []byte, off int64) (int, error) {
	n, err := c.Reader.ReadAt(b, off)
	for to := off + int64(n); ; {
		at := c.furthest.Load()
		if to <= at || c.furthest.CompareAndSwap(at, to) {
			return n, err
		}
	}
}
