package gc

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/mounts"
	records "github.com/managerd/managerd/protos/metadata"
)

// graph is who needs whom in one namespace, as one transaction saw it.
type graph struct {
	refs    map[node][]node // only of those that need something
	back    map[node][]node // the reverse label: who stays if this one does
	parents map[node]node   // of snapshots
	roots   []node
	flat    []node // roots whose own needs do not count
	objects []node // what can be collected: activations, expired leases, expired images, snapshots, content
	active  map[node]mounts.Activation
	next    time.Time     // the earliest expiry still to come; zero: none
	marked  map[node]bool // what stays, and all that it needs
	alone   map[node]bool // what stays by itself
}

// scan reads namespace ns, in which active are the activations of mounts. A record that cannot be read ends it with DataLoss: nobody knows what it refers to.
func scan(tx *metadata.Tx, ns string, now time.Time, active []mounts.Activation) (*graph, error) {
	g := &graph{active: map[node]mounts.Activation{}, refs: map[node][]node{}, back: map[node][]node{}, parents: map[node]node{}, marked: map[node]bool{}, alone: map[node]bool{}}
	for _, part := range []func(*metadata.Tx, string, time.Time) error{
		g.leases, g.images, g.containers, g.sandboxes,
		func(*metadata.Tx, string, time.Time) error { g.mounts(active, now); return nil }, // before the snapshots that they may be of
		g.snapshots, g.content,
	} {
		if err := part(tx, ns, now); err != nil {
			return nil, fmt.Errorf("namespace %q: %w", ns, err)
		}
	}
	return g, nil
}

// expired tells whether what has these labels has ended by itself, and remembers when the next one will.
func (g *graph) expired(labels map[string]string, now time.Time) bool {
	at, ok := leases.Expiry(labels)
	if !ok {
		return false
	}
	if !at.After(now) {
		return true
	}
	if g.next.IsZero() || at.Before(g.next) {
		g.next = at
	}
	return false
}

func (g *graph) leases(tx *metadata.Tx, ns string, now time.Time) error {
	return metadata.EachStrict(tx.Bucket(metadata.Path(ns, metadata.Leases)...), func(id string, r *records.Lease) error {
		n := node{metadata.Leases, id}
		if g.expired(r.Labels, now) {
			g.objects = append(g.objects, n)
			return nil
		}
		g.marked[n] = true
		_, flat := r.Labels[leases.FlatLabel]
		for _, held := range leased(tx, ns, id) {
			if flat {
				g.flat = append(g.flat, held)
			} else {
				g.roots = append(g.roots, held)
			}
		}
		return nil
	})
}

// mounts enters activations. Until its expiry one is a root, as if it had the label of those; it needs nothing.
func (g *graph) mounts(active []mounts.Activation, now time.Time) {
	for _, a := range active {
		n := node{metadata.Mounts, a.Name}
		if _, ok := leases.Expiry(a.Labels); ok && !g.expired(a.Labels, now) {
			g.roots = append(g.roots, n)
		}
		g.root(n, a.Labels)
		g.enter(n, a.Labels, nil)
		g.objects, g.active[n] = append(g.objects, n), a
	}
}

// leased gives what a lease keeps. The types of its resources are named as the kinds of their records.
func leased(tx *metadata.Tx, ns, id string) (out []node) {
	for _, r := range leases.Resources(tx, ns, id) {
		out = append(out, node{r.Type, r.ID})
	}
	return out
}

func (g *graph) images(tx *metadata.Tx, ns string, now time.Time) error {
	return metadata.EachStrict(tx.Bucket(metadata.Path(ns, metadata.Images)...), func(name string, r *records.Image) error {
		n := node{metadata.Images, name}
		if g.expired(r.Labels, now) {
			g.objects = append(g.objects, n)
		} else {
			g.roots = append(g.roots, n)
		}
		g.enter(n, r.Labels, ofImage(r))
		return nil
	})
}

func ofImage(r *records.Image) []node {
	return append(forward(r.Labels), node{metadata.Content, r.Target.GetDigest()})
}

func (g *graph) containers(tx *metadata.Tx, ns string, _ time.Time) error {
	return metadata.EachStrict(tx.Bucket(metadata.Path(ns, metadata.Containers)...), func(id string, r *records.Container) error {
		n := node{metadata.Containers, id}
		g.roots = append(g.roots, n)
		g.enter(n, nil, ofContainer(r))
		return nil
	})
}

func (g *graph) sandboxes(tx *metadata.Tx, ns string, _ time.Time) error {
	return metadata.EachStrict(tx.Bucket(metadata.Path(ns, metadata.Sandboxes)...), func(id string, r *records.Sandbox) error {
		n := node{metadata.Sandboxes, id}
		g.roots = append(g.roots, n)
		g.enter(n, nil, forward(r.Labels))
		return nil
	})
}

func ofContainer(r *records.Container) []node {
	out := forward(r.Labels)
	if r.SnapshotKey != "" {
		out = append(out, node{metadata.SnapshotKind(r.Snapshotter), r.SnapshotKey})
	}
	return out
}

func (g *graph) snapshots(tx *metadata.Tx, ns string, _ time.Time) error {
	all := tx.Bucket(metadata.Path(ns, metadata.Snapshots)...)
	if all == nil {
		return nil
	}
	return all.ForEachBucket(func(name []byte) error {
		kind := metadata.SnapshotKind(string(name))
		var found []node
		err := metadata.EachStrict(all.Bucket(name), func(key string, r *records.Snapshot) error {
			n := node{kind, key}
			g.root(n, r.Labels)
			if r.Parent != "" {
				g.parents[n] = node{kind, r.Parent}
			}
			g.enter(n, r.Labels, ofSnapshot(kind, r))
			found = append(found, n)
			return nil
		})
		g.objects = append(g.objects, g.childrenFirst(found)...)
		return err
	})
}

func ofSnapshot(kind string, r *records.Snapshot) []node {
	out := forward(r.Labels)
	if r.Parent != "" {
		out = append(out, node{kind, r.Parent})
	}
	return out
}

// childrenFirst orders snapshots so that each stands before the one below it.
func (g *graph) childrenFirst(nodes []node) []node {
	depth := map[node]int{}
	for _, n := range nodes {
		var chain []node
		at := n
		for depth[at] == 0 {
			chain = append(chain, at)
			up, ok := g.parents[at]
			if !ok || len(chain) > len(nodes) { // the latter: a circle, which no request can make
				break
			}
			at = up
		}
		below := depth[at]
		for _, c := range slices.Backward(chain) {
			below++
			depth[c] = below
		}
	}
	slices.SortStableFunc(nodes, func(a, b node) int { return depth[b] - depth[a] })
	return nodes
}

func (g *graph) content(tx *metadata.Tx, ns string, _ time.Time) error {
	return metadata.EachStrict(tx.Bucket(metadata.Path(ns, metadata.Content)...), func(d string, r *records.Blob) error {
		n := node{metadata.Content, d}
		g.root(n, r.Labels)
		g.enter(n, r.Labels, forward(r.Labels))
		g.objects = append(g.objects, n)
		return nil
	})
}

func (g *graph) root(n node, labels map[string]string) {
	if _, ok := labels[labelRoot]; ok {
		g.roots = append(g.roots, n)
	}
}

func (g *graph) enter(n node, labels map[string]string, refs []node) {
	if len(refs) > 0 {
		g.refs[n] = refs
	}
	for _, b := range backward(labels) {
		g.back[b] = append(g.back[b], n)
	}
}

// mark marks all that the roots reach.
func (g *graph) mark() {
	g.reach(g.roots, func(n node) []node { return g.refs[n] })
	for _, n := range g.flat { // itself, and what it stands on, which it cannot be without
		for ok := true; ok && !g.alone[n]; n, ok = g.parents[n] {
			g.alone[n] = true
		}
	}
}

func (g *graph) reach(from []node, refs func(node) []node) {
	todo := slices.Clone(from)
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if g.marked[n] {
			continue
		}
		g.marked[n] = true
		todo = append(append(todo, refs(n)...), g.back[n]...)
	}
}

func (g *graph) stays(n node) bool { return g.marked[n] || g.alone[n] }

// garbage is what was not marked, in an order in which it can be removed.
func (g *graph) garbage() (out []node) {
	for _, n := range g.objects {
		if !g.stays(n) {
			out = append(out, n)
		}
	}
	return out
}

// touch marks what changed since the scan, and what it refers to now: somebody may count on it by now. What becomes
// garbage meanwhile stays for the next collection.
func (g *graph) touch(tx *metadata.Tx, ns string, changes []metadata.Change) {
	for _, c := range changes {
		if c.Namespace != ns || c.Removed {
			continue
		}
		n := node{c.Kind, c.Key}
		delete(g.marked, n) // it may need others than it did
		g.reach([]node{n}, func(n node) []node { return current(tx, ns, n) })
	}
}

// current reads what an object needs as of this transaction. What is not there, or cannot be read, needs nothing: the next
// scan tells of the latter.
func current(tx *metadata.Tx, ns string, n node) []node {
	get := func(r metadata.Record) bool {
		return metadata.Get(tx.Bucket(metadata.Path(append([]string{ns}, strings.Split(n.kind, "/")...)...)...), n.key, r) == nil
	}
	switch n.kind {
	case metadata.Leases:
		return leased(tx, ns, n.key)
	case metadata.Images:
		var r records.Image
		if get(&r) {
			return ofImage(&r)
		}
	case metadata.Containers:
		var r records.Container
		if get(&r) {
			return ofContainer(&r)
		}
	case metadata.Sandboxes:
		var r records.Sandbox
		if get(&r) {
			return forward(r.Labels)
		}
	case metadata.Mounts: // they need nothing
	case metadata.Content:
		var r records.Blob
		if get(&r) {
			return forward(r.Labels)
		}
	default:
		var r records.Snapshot
		if get(&r) {
			return ofSnapshot(n.kind, &r)
		}
	}
	return nil
}
