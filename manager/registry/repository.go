package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Repository is one name at a registry, with the endpoints that serve it, for one pull or push. Its methods may be called
// from several goroutines. Their errors are *Error, with every endpoint that was tried, or what the context ended with.
type Repository struct {
	r            *Registry
	opts         Options
	ref          reference.Named
	domain, path string
	tag          string        // "" for none
	digest       digest.Digest // "" for none
	endpoints    []endpoint

	mu    sync.Mutex
	hosts map[*endpoint]*host           // guarded by mu
	bad   map[digest.Digest][]*endpoint // which had other bytes under a digest, guarded by mu
	kept  map[digest.Digest][]byte      // manifests that came with Resolve, guarded by mu
}

// Repository reads a reference, NAME[:TAG][@DIGEST], docker.io's short names too (busybox is
// docker.io/library/busybox:latest), and finds its endpoints. Its error is InvalidArgument, for a reference or a
// hosts.toml that is wrong.
func (r *Registry) Repository(ref string, o Options) (*Repository, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, fmt.Errorf("reference %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	named = reference.TagNameOnly(named)
	for name, values := range o.Headers {
		for _, v := range values {
			if !validHeader(name, v) {
				return nil, fmt.Errorf("header %q cannot be sent over HTTP: %w", name, errdefs.ErrInvalidArgument)
			}
		}
	}
	p := &Repository{
		r: r, opts: o, ref: named, domain: reference.Domain(named), path: reference.Path(named),
		hosts: map[*endpoint]*host{}, bad: map[digest.Digest][]*endpoint{}, kept: map[digest.Digest][]byte{},
	}
	if t, ok := named.(reference.Tagged); ok {
		p.tag = t.Tag()
	}
	if d, ok := named.(reference.Digested); ok {
		p.digest = d.Digest()
	}
	if p.endpoints, err = r.endpoints(p.domain, o); err != nil {
		return nil, err
	}
	return p, nil
}

// Reference is what was asked for, in full.
func (p *Repository) Reference() reference.Named { return p.ref }

// Endpoints are the URLs that are asked, in this order.
func (p *Repository) Endpoints() []string {
	var out []string
	for i := range p.endpoints {
		out = append(out, p.endpoints[i].String())
	}
	return out
}

// able are the endpoints that may be asked for something.
func (p *Repository) able(c capability) []*endpoint {
	var out []*endpoint
	for i := range p.endpoints {
		if e := &p.endpoints[i]; e.capabilities&c != 0 {
			out = append(out, e)
		}
	}
	return out
}

// at is the host of an endpoint; last says that nobody else is asked.
func (p *Repository) at(e *endpoint, last bool) (*host, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	h := p.hosts[e]
	if h == nil {
		var err error
		if h, err = p.host(e); err != nil {
			return nil, err
		}
		p.hosts[e] = h
	}
	out := *h
	out.last = last
	return &out, nil
}

// each asks one endpoint after the other until one serves. A mirror that failed a short while ago is left out, and asked
// at the end if nobody else could be reached.
func (p *Repository) each(ctx context.Context, op, what string, among []*endpoint, ask func(*host) error) error {
	failed := &Error{Op: op, Ref: what}
	if len(among) == 0 {
		return fmt.Errorf("cannot %s %s: no endpoint of %s may be asked for it (capabilities in hosts.toml): %w", op, what, p.domain, errdefs.ErrFailedPrecondition)
	}
	try := func(e *endpoint, last bool) error {
		h, err := p.at(e, last)
		if err == nil {
			err = ask(h)
		}
		return err
	}
	var skipped []*endpoint
	for i, e := range among {
		last := i == len(among)-1
		if wait, why := p.r.breaker.skip(e.String(), time.Now()); wait > 0 && e.mirror && !last {
			skipped = append(skipped, e)
			failed.Failures = append(failed.Failures, Failure{e.String(), fmt.Errorf("left out for another %s, as it failed: %w", wait.Round(time.Second), why)})
			continue
		}
		err := try(e, last)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		p.r.log.Debug("an endpoint did not serve", "op", op, "ref", what, "endpoint", e.String(), "error", err)
		failed.Failures = append(failed.Failures, Failure{e.String(), err})
		failed.cause = err
	}
	if !unreachable(failed.cause) {
		return failed
	}
	for _, e := range skipped {
		err := try(e, false)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		for i := range failed.Failures {
			if failed.Failures[i].Endpoint == e.String() {
				failed.Failures[i].Err = err
			}
		}
	}
	return failed
}

// healthy are the endpoints of which none is known to have other bytes under a digest, or all, if that leaves none.
func (p *Repository) healthy(d digest.Digest, among []*endpoint) []*endpoint {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*endpoint
	for _, e := range among {
		if !slices.Contains(p.bad[d], e) {
			out = append(out, e)
		}
	}
	if len(out) == 0 {
		return among
	}
	return out
}

// distrust notes that an endpoint had other bytes under a digest.
func (p *Repository) distrust(d digest.Digest, e *endpoint) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bad[d] = append(p.bad[d], e)
	p.r.log.Warn("a registry has other bytes under a digest", "endpoint", e.String(), "digest", d, "ref", p.ref.String())
}

// named is the reference with another digest, for messages.
func (p *Repository) named(d digest.Digest) string { return p.ref.Name() + "@" + d.String() }

// ended says whether an error is the caller's own doing.
func ended(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, context.Canceled)
}
