// Package gc removes what nobody needs: content and snapshots that no image, container or lease leads to, images and
// leases whose time is over, ingests that nobody goes on with. Who needs whom stands in containerd's labels, see labels.go.
//
// Nothing waits for it. It reads a namespace in a transaction that blocks no other, and only the removals, few at a time,
// are writes. What changed between the two is told by package metadata, and is taken to be needed.
package gc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/images"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/mounts"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// batch is how many objects one write transaction removes.
const batch = 100

// idle is how long an ingest that no lease keeps may go without a write.
const idle = 24 * time.Hour

// Publisher is told of what was removed.
type Publisher interface {
	Publish(ctx context.Context, topic string, event proto.Message) error
}

// Collector collects in one daemon's database. Content, Snapshots and Mounts may be nil when the daemon runs without.
type Collector struct {
	DB        *metadata.DB
	Content   *content.Store
	Snapshots *snapshots.Store
	Mounts    *mounts.Store
	Events    Publisher
	Log       *slog.Logger

	one     sync.Mutex // one collection at a time
	between func()     // called after each of its transactions, if set: tests change something there
}

// Result is what a collection did.
type Result struct {
	Removed map[string]int // by kind: content, images, leases, ingests, mounts, snapshots/NAME
	Objects int            // looked at
	Took    time.Duration
	Locked  time.Duration // how much of it others could not write
	Longest time.Duration // the longest of these times at a stretch
	Next    time.Time     // when something expires; zero: nothing does
	Held    bool          // nothing was collected: the database was recovered, and nobody has acknowledged that yet
}

// Collect removes all that nobody needs as of now. What could not be removed is part of the error, and is tried again by
// the next collection; it keeps nothing else.
func (c *Collector) Collect(ctx context.Context) (Result, error) {
	c.one.Lock()
	defer c.one.Unlock()
	began := time.Now()
	res := Result{Removed: map[string]int{}}
	// What led to something may be what was lost.
	if r, err := c.DB.Recovery(); err != nil || r != nil {
		res.Held = true
		return res, err
	}
	var mu sync.Mutex
	var changes []metadata.Change
	stop := c.DB.Watch(func(more []metadata.Change) {
		mu.Lock()
		defer mu.Unlock()
		changes = append(changes, more...)
	})
	defer stop()
	since := func(n int) ([]metadata.Change, int) {
		mu.Lock()
		defer mu.Unlock()
		return changes[n:], len(changes)
	}
	// Before the database is read: what is seen of them here, that has their leases.
	active, err := c.activations()
	if err != nil {
		return res, fmt.Errorf("cannot collect: %w", err)
	}
	names, err := metadata.NewNamespaces(c.DB).List()
	if err != nil {
		return res, fmt.Errorf("cannot collect: %w", err)
	}
	for ns := range active {
		if !slices.Contains(names, ns) {
			names = append(names, ns)
		}
	}
	var errs []error
	for _, ns := range names {
		if err := c.namespace(namespaces.With(ctx, ns), ns, began, active[ns], since, &res); err != nil {
			errs = append(errs, fmt.Errorf("cannot collect in namespace %q: %w", ns, err))
		}
	}
	res.Took = time.Since(began)
	return res, errors.Join(errs...)
}

// namespace collects in one, with these activations. since gives the changes behind the first n, and how many there are by now.
func (c *Collector) namespace(ctx context.Context, ns string, now time.Time, active []mounts.Activation, since func(n int) ([]metadata.Change, int), res *Result) error {
	_, seen := since(0)
	var g *graph
	err := c.DB.View(func(tx *metadata.Tx) (err error) {
		g, err = scan(tx, ns, now, active)
		return err
	})
	if err != nil {
		return err
	}
	g.mark()
	res.Objects += len(g.objects)
	if !g.next.IsZero() && (res.Next.IsZero() || g.next.Before(res.Next)) {
		res.Next = g.next
	}
	garbage := g.garbage()
	for len(garbage) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(batch, len(garbage))
		var gone []removed
		var locked time.Time
		err := c.DB.Update(func(tx *metadata.Tx) error {
			locked = time.Now()
			var more []metadata.Change
			more, seen = since(seen)
			g.touch(tx, ns, more)
			g.touch(tx, ns, tx.Changes()) // of those who share this commit
			for _, node := range garbage[:n] {
				if g.stays(node) {
					continue
				}
				r, err := c.forget(tx, ns, node, g)
				if errdefs.IsFailedPrecondition(err) {
					continue // it has a child that stays, for want of a snapshotter say, or somebody works on it
				}
				if err == nil && r.event != nil {
					err = c.Events.Publish(metadata.In(ctx, tx), r.topic, r.event)
				}
				if err != nil {
					return err
				}
				gone = append(gone, r)
			}
			return nil
		})
		if err != nil {
			for _, r := range gone {
				r.keep()
			}
			return err
		}
		failpoint.Hit("gc.forgotten")
		held := time.Since(locked) // with the commit
		res.Locked, res.Longest = res.Locked+held, max(res.Longest, held)
		garbage = garbage[n:]
		for _, r := range gone {
			if r.kind == metadata.Mounts {
				c.unmount(r, res)
				continue
			}
			res.Removed[r.kind]++
			if err := r.free(); err != nil {
				c.Log.Warn("what was collected could not be freed; the next start of the daemon tries again", "kind", r.kind, "name", r.key, "error", err)
			}
			failpoint.Hit("gc.freed")
		}
		if c.between != nil {
			c.between()
		}
	}
	return c.ingests(ctx, ns, now, res)
}

// removed is an object whose record is gone.
type removed struct {
	node
	free  func() error // gives its storage back
	keep  func()       // instead of free, when it was not removed after all
	topic string
	event proto.Message
}

// forget removes the record of n. That of an activation goes when it is unmounted; until then nobody can change it.
func (c *Collector) forget(tx *metadata.Tx, ns string, n node, g *graph) (r removed, err error) {
	r = removed{node: n, free: func() error { return nil }, keep: func() {}}
	switch {
	case n.kind == metadata.Mounts:
		claim := c.Mounts.Claim(ns, g.active[n])
		if claim == nil {
			return r, errdefs.ErrFailedPrecondition
		}
		r.free, r.keep = claim.Remove, claim.Release
		return r, nil
	case n.kind == metadata.Leases:
		return r, leases.Forget(tx, ns, n.key)
	case n.kind == metadata.Images:
		r.topic, r.event = "/images/delete", &events.ImageDelete{Name: n.key}
		return r, images.Forget(tx, ns, n.key)
	case n.kind == metadata.Content && c.Content != nil:
		d := digest.Digest(n.key)
		r.free = func() error { return c.Content.Free(d) }
		r.topic, r.event = "/content/delete", &events.ContentDelete{Digest: n.key}
		return r, content.Forget(tx, ns, d)
	case c.Snapshots != nil && n.kind != metadata.Content:
		name := strings.TrimPrefix(n.kind, metadata.SnapshotKind(""))
		r.free, err = c.Snapshots.Forget(tx, ns, name, n.key)
		r.topic, r.event = "/snapshot/remove", &events.SnapshotRemove{Key: n.key, Snapshotter: name}
		return r, err
	}
	return r, fmt.Errorf("what keeps it is not loaded: %w", errdefs.ErrFailedPrecondition)
}

// ingests aborts what nobody goes on with.
func (c *Collector) ingests(ctx context.Context, ns string, now time.Time, res *Result) error {
	if c.Content == nil {
		return nil
	}
	n, err := c.Content.SweepIdle(ctx, now.Add(-idle), func() (kept map[string]bool, err error) {
		kept = map[string]bool{}
		return kept, c.DB.View(func(tx *metadata.Tx) error {
			b := tx.Bucket(metadata.Path(ns, metadata.Leases)...)
			if b == nil {
				return nil
			}
			return b.ForEach(func(id, _ []byte) error {
				for _, r := range leases.Resources(tx, ns, string(id)) {
					if r.Type == leases.Ingests {
						kept[r.ID] = true
					}
				}
				return nil
			})
		})
	})
	if n > 0 {
		res.Removed[leases.Ingests] += n
	}
	if errdefs.IsUnavailable(err) { // the program that keeps them does not run
		c.Log.Warn("ingests that nobody goes on with could not be looked for", "namespace", ns, "error", err)
		return nil
	}
	return err
}
