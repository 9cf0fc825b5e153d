// Package proxy keeps content in another program, which serves containerd's content service on a Unix socket. Calls have
// deadlines, and nothing else waits for it.
package proxy

import (
	"context"
	"errors"
	"io"
	"strings"
	"time"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/peer"
)

// LabelOwner says whose a blob of the other program is, as far as it keeps labels: what has another value, or none, is
// never removed by a sweep.
const LabelOwner = "io.managerd/owner"

// space is the namespace of all calls: a blob is stored once for all namespaces of this daemon.
const space = "default"

// Options says where the program is.
type Options struct {
	Name    string        // what it is called
	Address string        // path of its socket
	Owner   string        // who we are, among those who use it
	Quick   time.Duration // for what only looks something up, or forgets it; 0: 10 s
	Step    time.Duration // for each message of a read or a write; 0: 30 s
	Slow    time.Duration // for what is committed or counted; 0: 10 min
	Back    time.Duration // how long reads and writes wait for a program that does not run; 0: 10 s
}

// Backend implements content.Backend.
type Backend struct {
	cfg    Options
	peer   *peer.Peer
	client api.ContentClient
}

// New does not connect yet, see peer.New. The caller closes it.
func New(o Options) (*Backend, error) {
	if o.Quick == 0 {
		o.Quick = 10 * time.Second
	}
	if o.Step == 0 {
		o.Step = 30 * time.Second
	}
	if o.Back == 0 {
		o.Back = 10 * time.Second
	}
	if o.Slow == 0 {
		o.Slow = 10 * time.Minute
	}
	p, err := peer.New(o.Name, o.Address)
	if err != nil {
		return nil, err
	}
	return &Backend{cfg: o, peer: p, client: api.NewContentClient(p.Conn())}, nil
}

// Close disconnects.
func (b *Backend) Close() error { return b.peer.Close() }

// Trouble says why the program cannot be used now, see peer.Trouble.
func (b *Backend) Trouble() error { return b.peer.Trouble() }

// call does one call with a deadline.
func (b *Backend) call(ctx context.Context, patience time.Duration, fn func(context.Context) error) error {
	return b.peer.Call(ctx, patience, func(ctx context.Context) error { return fn(namespaces.With(ctx, space)) })
}

// again repeats what was answered by Unavailable, for as long as a program takes that is started again.
func (b *Backend) again(ctx context.Context, fn func() error) error {
	const pause = 100 * time.Millisecond
	until := time.Now().Add(b.cfg.Back)
	for {
		err := fn()
		var silent *peer.SilentError
		if !errdefs.IsUnavailable(err) || errors.As(err, &silent) || time.Now().After(until) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// Stat implements content.Backend.
func (b *Backend) Stat(ctx context.Context, d digest.Digest) (size int64, err error) {
	err = b.call(ctx, b.cfg.Quick, func(ctx context.Context) error {
		r, err := b.client.Info(ctx, &api.InfoRequest{Digest: d.String()})
		size = r.GetInfo().GetSize()
		return err
	})
	return size, err
}

// Remove implements content.Backend.
func (b *Backend) Remove(ctx context.Context, d digest.Digest) error {
	err := b.call(ctx, b.cfg.Quick, func(ctx context.Context) error {
		_, err := b.client.Delete(ctx, &api.DeleteContentRequest{Digest: d.String()})
		return err
	})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Blobs implements content.Backend. What the program has from others, or what it has no labels of, is not ours.
func (b *Backend) Blobs(ctx context.Context, ours bool) (map[digest.Digest]int64, error) {
	out := map[digest.Digest]int64{}
	err := b.call(ctx, b.cfg.Slow, func(ctx context.Context) error {
		stream, err := b.client.List(ctx, &api.ListContentRequest{})
		if err != nil {
			return err
		}
		for {
			r, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			for _, i := range r.Info {
				if d := digest.Digest(i.Digest); d.Validate() == nil && (!ours || i.Labels[LabelOwner] == b.cfg.Owner) {
					out[d] = i.Size
				}
			}
		}
	})
	return out, err
}

// reference is what an ingest is called there.
func reference(ns, ref string) string { return ns + "/" + ref }

func ingest(s *api.Status) (i content.Ingest, ok bool) {
	ns, ref, ok := strings.Cut(s.GetRef(), "/")
	i = content.Ingest{Namespace: ns, Status: content.Status{
		Ref: ref, Offset: s.GetOffset(), Total: s.GetTotal(), StartedAt: s.GetStartedAt().AsTime(), UpdatedAt: s.GetUpdatedAt().AsTime(),
	}}
	if d := digest.Digest(s.GetExpected()); d.Validate() == nil {
		i.Expected = d
	}
	return i, ok && identifiers.Validate(ns) == nil
}

// Status implements content.Backend.
func (b *Backend) Status(ctx context.Context, ns, ref string) (content.Status, error) {
	var st content.Status
	err := b.call(ctx, b.cfg.Quick, func(ctx context.Context) error {
		r, err := b.client.Status(ctx, &api.StatusRequest{Ref: reference(ns, ref)})
		i, _ := ingest(r.GetStatus())
		st = i.Status
		return err
	})
	st.Ref = ref
	return st, err
}

// Ingests implements content.Backend.
func (b *Backend) Ingests(ctx context.Context) (out []content.Ingest, err error) {
	err = b.call(ctx, b.cfg.Quick, func(ctx context.Context) error {
		r, err := b.client.ListStatuses(ctx, &api.ListStatusesRequest{})
		for _, s := range r.GetStatuses() {
			if i, ok := ingest(s); ok {
				out = append(out, i)
			}
		}
		return err
	})
	return out, err
}

// Abort implements content.Backend.
func (b *Backend) Abort(ctx context.Context, ns, ref string) error {
	return b.call(ctx, b.cfg.Quick, func(ctx context.Context) error {
		_, err := b.client.Abort(ctx, &api.AbortRequest{Ref: reference(ns, ref)})
		return err
	})
}
