// Package proxy is a snapshotter that is another program: it serves containerd's snapshots service on a Unix socket. Calls
// have deadlines, and nothing else waits for it.
package proxy

import (
	"context"
	"errors"
	"io"
	"maps"
	"strconv"
	"strings"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/peer"
	"github.com/managerd/managerd/manager/snapshots"
)

// LabelOwner says whose a snapshot of the other program is: what has another value, or none, is never removed by a sweep.
const LabelOwner = "io.managerd/owner"

// inherited begins the labels that are for the snapshotter, as containerd's clients write them.
const inherited = "containerd.io/snapshot/"

// Options says where the program is.
type Options struct {
	Name    string        // what it is called, here and by itself
	Address string        // path of its socket
	Owner   string        // who we are, among those who use it
	Quick   time.Duration // for what only looks something up, or forgets it; 0: 10 s
	Slow    time.Duration // for what makes or counts something; 0: 10 min
}

// Backend implements snapshots.Backend.
type Backend struct {
	cfg    Options
	peer   *peer.Peer
	client api.SnapshotsClient
}

// New does not connect yet, see peer.New.
func New(o Options) (*Backend, error) {
	if o.Quick == 0 {
		o.Quick = 10 * time.Second
	}
	if o.Slow == 0 {
		o.Slow = 10 * time.Minute
	}
	p, err := peer.New(o.Name, o.Address)
	if err != nil {
		return nil, err
	}
	return &Backend{cfg: o, peer: p, client: api.NewSnapshotsClient(p.Conn())}, nil
}

// Remote says that storage is not on this machine's own disks: nothing waits for it at the start.
func (b *Backend) Remote() {}

// Defers says that clients do not wait for removals.
func (b *Backend) Defers() bool { return true }

// labels are what the program is told.
func (b *Backend) labels(s snapshots.Snapshot) map[string]string {
	out := map[string]string{LabelOwner: b.cfg.Owner}
	for k, v := range s.Labels {
		if strings.HasPrefix(k, inherited) {
			out[k] = v
		}
	}
	if target := s.Labels[snapshots.LabelRef]; target != "" {
		to := s.Ref
		to.Key = target
		out[snapshots.LabelRef] = to.String()
	}
	return out
}

// Create prepares or views. ErrStored: the program has the target of LabelRef without being given its content.
func (b *Backend) Create(ctx context.Context, s snapshots.Snapshot) error {
	parent := ""
	if len(s.Parents) > 0 {
		parent = s.Parents[0].String()
	}
	labels := b.labels(s)
	make := func(ctx context.Context) (err error) {
		if s.Kind == snapshots.View {
			_, err = b.client.View(ctx, &api.ViewSnapshotRequest{Snapshotter: b.cfg.Name, Key: s.String(), Parent: parent, Labels: labels})
		} else {
			_, err = b.client.Prepare(ctx, &api.PrepareSnapshotRequest{Snapshotter: b.cfg.Name, Key: s.String(), Parent: parent, Labels: labels})
		}
		return err
	}
	err := b.call(ctx, s.Namespace, b.cfg.Slow, make)
	if err == nil || !errdefs.IsAlreadyExists(err) {
		return err
	}
	if labels[snapshots.LabelRef] != "" {
		target := s
		target.Key = s.Labels[snapshots.LabelRef]
		if i, serr := b.stat(ctx, target); serr == nil && i.Kind == api.Kind_COMMITTED {
			return snapshots.ErrStored
		}
	}
	// Left of a crash: the ID is new, so nobody has it.
	if err := b.Remove(ctx, s); err != nil {
		return err
	}
	return b.call(ctx, s.Namespace, b.cfg.Slow, make)
}

func (b *Backend) stat(ctx context.Context, s snapshots.Snapshot) (i *api.Info, err error) {
	err = b.call(ctx, s.Namespace, b.cfg.Quick, func(ctx context.Context) error {
		r, err := b.client.Stat(ctx, &api.StatSnapshotRequest{Snapshotter: b.cfg.Name, Key: s.String()})
		i = r.GetInfo()
		return err
	})
	return i, err
}

// Mounts asks.
func (b *Backend) Mounts(ctx context.Context, s snapshots.Snapshot) (m []*types.Mount, err error) {
	err = b.call(ctx, s.Namespace, b.cfg.Quick, func(ctx context.Context) error {
		r, err := b.client.Mounts(ctx, &api.MountsRequest{Snapshotter: b.cfg.Name, Key: s.String()})
		m = r.GetMounts()
		return err
	})
	return m, err
}

// Usage asks.
func (b *Backend) Usage(ctx context.Context, s snapshots.Snapshot) (u snapshots.Usage, err error) {
	err = b.call(ctx, s.Namespace, b.cfg.Slow, func(ctx context.Context) error {
		r, err := b.client.Usage(ctx, &api.UsageRequest{Snapshotter: b.cfg.Name, Key: s.String()})
		u = snapshots.Usage{Inodes: r.GetInodes(), Size: r.GetSize()}
		return err
	})
	return u, err
}

// Commit commits, unless a commit that was not recorded has done so.
func (b *Backend) Commit(ctx context.Context, s snapshots.Snapshot, to snapshots.Ref) (snapshots.Usage, error) {
	labels := b.labels(s)
	delete(labels, snapshots.LabelRef)
	err := b.call(ctx, s.Namespace, b.cfg.Slow, func(ctx context.Context) error {
		_, err := b.client.Commit(ctx, &api.CommitSnapshotRequest{Snapshotter: b.cfg.Name, Name: to.String(), Key: s.String(), Labels: labels})
		return err
	})
	committed := s
	committed.Ref = to
	if errdefs.IsNotFound(err) {
		if i, serr := b.stat(ctx, committed); serr == nil && i.Kind == api.Kind_COMMITTED {
			err = nil
		}
	}
	if err != nil {
		return snapshots.Usage{}, err
	}
	return b.Usage(ctx, committed)
}

// Remove removes. When the record was dropped before a commit of it was recorded, there may be none of that name; a sweep
// finds it.
func (b *Backend) Remove(ctx context.Context, s snapshots.Snapshot) error {
	err := b.remove(ctx, s.Namespace, s.String())
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

func (b *Backend) remove(ctx context.Context, ns, key string) error {
	return b.call(ctx, ns, b.cfg.Quick, func(ctx context.Context) error {
		_, err := b.client.Remove(ctx, &api.RemoveSnapshotRequest{Snapshotter: b.cfg.Name, Key: key})
		return err
	})
}

// Sweep removes what is ours and nobody keeps, children first, and lets the program clean up.
func (b *Backend) Sweep(ctx context.Context, keep func(id uint64) bool) error {
	for {
		doomed, err := b.ours(ctx)
		if err != nil {
			return err
		}
		maps.DeleteFunc(doomed, func(_ string, id uint64) bool { return keep(id) })
		removed := 0
		var stays error
		for key := range doomed {
			ns, _, _ := strings.Cut(key, "/")
			switch err := b.remove(ctx, ns, key); {
			case err == nil, errdefs.IsNotFound(err):
				removed++
			case errdefs.IsFailedPrecondition(err): // it has children
				stays = err
			default:
				return err
			}
		}
		if stays == nil {
			break
		}
		if removed == 0 {
			return stays
		}
	}
	err := b.call(ctx, "", b.cfg.Slow, func(ctx context.Context) error {
		_, err := b.client.Cleanup(ctx, &api.CleanupRequest{Snapshotter: b.cfg.Name})
		return err
	})
	if errdefs.IsNotImplemented(err) {
		return nil
	}
	return err
}

// ours lists what the program stores for us, by the name it has there, with its ID.
func (b *Backend) ours(ctx context.Context) (map[string]uint64, error) {
	out := map[string]uint64{}
	err := b.call(ctx, "", b.cfg.Slow, func(ctx context.Context) error {
		stream, err := b.client.List(ctx, &api.ListSnapshotsRequest{Snapshotter: b.cfg.Name})
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
				f := strings.SplitN(i.Name, "/", 3)
				if len(f) < 3 || i.Labels[LabelOwner] != b.cfg.Owner {
					continue
				}
				if id, err := strconv.ParseUint(f[1], 10, 64); err == nil {
					out[i.Name] = id
				}
			}
		}
	})
	return out, err
}

// call does one call in the namespace, with a deadline.
func (b *Backend) call(ctx context.Context, ns string, patience time.Duration, fn func(context.Context) error) error {
	return b.peer.Call(ctx, patience, func(ctx context.Context) error {
		if ns != "" {
			ctx = namespaces.With(ctx, ns)
		}
		return fn(ctx)
	})
}

// Close disconnects.
func (b *Backend) Close() error { return b.peer.Close() }
