package snapshots

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/metadata"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// Store has the snapshotters of a daemon.
type Store struct {
	db  *metadata.DB
	pub Publisher

	mu      sync.RWMutex
	named   map[string]*store
	opening map[string]*opening // those that are not there
}

// NewStore makes a snapshotter of each backend: see Add. The store owns the backends and closes them with Close; db and
// pub stay the caller's.
func NewStore(ctx context.Context, db *metadata.DB, pub Publisher, backends map[string]Backend) (*Store, error) {
	s := &Store{db: db, pub: pub, named: map[string]*store{}, opening: map[string]*opening{}}
	for name, b := range backends {
		if err := s.Add(ctx, name, b); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Add makes a snapshotter of a backend and frees what a crash left half made in it. AlreadyExists for a name that is taken.
func (s *Store) Add(ctx context.Context, name string, b Backend) error {
	if s.find(name) != nil {
		return fmt.Errorf("there is a snapshotter %s already: %w", name, errdefs.ErrAlreadyExists)
	}
	st := &store{name: name, db: s.db, pub: s.pub, backend: b}
	if err := st.open(ctx); err != nil {
		return fmt.Errorf("cannot open snapshotter %s: %w", name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.named[name] = st
	return nil
}

// find finds a store by the name of its snapshotter; nil for none.
func (s *Store) find(name string) *store {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.named[name]
}

// Snapshotter finds one by name; InvalidArgument when there is none, as containerd has it, Unavailable when it does not answer.
func (s *Store) Snapshotter(name string) (Snapshotter, error) {
	if name == "" {
		return nil, fmt.Errorf("a snapshotter must be named: %w", errdefs.ErrInvalidArgument)
	}
	if st := s.find(name); st != nil {
		return st, nil
	}
	if err := s.await(name, arriving); err != nil {
		return nil, err
	}
	if st := s.find(name); st != nil {
		return st, nil
	}
	return nil, fmt.Errorf("snapshotter %q is not loaded, there are %s: %w", name, strings.Join(s.Names(), ", "), errdefs.ErrInvalidArgument)
}

// Names lists the snapshotters.
func (s *Store) Names() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []string
	for name := range s.named {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// Close closes the backends.
func (s *Store) Close() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var errs []error
	for _, st := range s.named {
		_, remote := st.backend.(Remote)
		if !remote {
			st.later.end()
		}
		errs = append(errs, st.backend.Close())
		if remote { // whose calls have ended now
			st.later.end()
		}
	}
	return errors.Join(errs...)
}

// store is one snapshotter.
//
// Storage is made before its record and freed after it, so what a crash leaves is storage without a record, never the
// reverse. The database's transaction is short: it decides, the backend's work is done outside of it.
type store struct {
	name    string
	db      *metadata.DB
	pub     Publisher
	backend Backend
	ids     ids
	later   later // removals that were answered before the storage was free
}

func (s *store) errorf(verb, key string, err error) error {
	return fmt.Errorf("cannot %s %s snapshot %q: %w", verb, s.name, key, err)
}

// publish tells of a change in its transaction.
func (s *store) publish(ctx context.Context, t table, topic string, e proto.Message) error {
	return s.pub.Publish(metadata.In(ctx, t.tx), topic, e)
}

func (s *store) Stat(ctx context.Context, key string) (out Info, err error) {
	err = s.view(ctx, func(t table) error {
		r, err := t.get(key)
		if err == nil {
			out = s.info(key, r)
		}
		return err
	})
	return out, err
}

// info is what clients are told.
func (s *store) info(key string, r *records.Snapshot) Info {
	i := info(key, r)
	if l, ok := s.backend.(Labeler); ok {
		if more := l.Labels(r.Id); len(more) > 0 {
			i.Labels = maps.Clone(i.Labels)
			if i.Labels == nil {
				i.Labels = map[string]string{}
			}
			maps.Copy(i.Labels, more)
		}
	}
	return i
}

func (s *store) view(ctx context.Context, fn func(table) error) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	return s.db.View(func(tx *metadata.Tx) error { return fn(table{tx, ns, s.name}) })
}

// update runs fn in a transaction that may be repeated, see metadata.Batch.
func (s *store) update(ctx context.Context, fn func(table) error) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	return s.db.Batch(func(tx *metadata.Tx) error { return fn(table{tx, ns, s.name}) })
}

func (s *store) Update(ctx context.Context, in Info, fields ...string) (out Info, err error) {
	var ns string
	var changed *records.Snapshot
	err = s.update(ctx, func(t table) error {
		r, err := t.get(in.Name)
		if err != nil {
			return err
		}
		labels := r.Labels
		if len(fields) == 0 {
			labels = in.Labels
		}
		for _, f := range fields {
			key, one := strings.CutPrefix(f, "labels.")
			switch {
			case f == "labels":
				labels = in.Labels
			case one:
				if labels == nil {
					labels = map[string]string{}
				}
				if v, ok := in.Labels[key]; ok && v != "" {
					labels[key] = v
				} else {
					delete(labels, key)
				}
			default:
				return fmt.Errorf("field %q cannot be changed: %w", f, errdefs.ErrInvalidArgument)
			}
		}
		if err := identifiers.ValidateLabels(labels); err != nil {
			return err
		}
		r.Labels, r.UpdatedAt = labels, time.Now().UnixNano()
		out = s.info(in.Name, r)
		ns, changed = t.ns, r
		return t.put(in.Name, r)
	})
	if err != nil {
		return Info{}, s.errorf("update", in.Name, err)
	}
	s.note(ns, in.Name, changed)
	return out, nil
}

// lookup reads a record and what the backend is told of it.
func (s *store) lookup(ctx context.Context, key string) (out Snapshot, r *records.Snapshot, err error) {
	err = s.view(ctx, func(t table) error {
		var err error
		if r, err = t.get(key); err != nil {
			return err
		}
		out, err = t.snapshot(key, r)
		return err
	})
	return out, r, err
}

func (s *store) Usage(ctx context.Context, key string) (Usage, error) {
	snap, r, err := s.lookup(ctx, key)
	if err != nil {
		return Usage{}, err
	}
	if snap.Kind == Committed {
		return Usage{Inodes: r.Inodes, Size: r.Size_}, nil
	}
	u, err := s.backend.Usage(ctx, snap)
	if err != nil {
		return Usage{}, s.errorf("count usage of", key, err)
	}
	return u, nil
}

func (s *store) Mounts(ctx context.Context, key string) ([]*types.Mount, error) {
	snap, _, err := s.lookup(ctx, key)
	if err != nil {
		return nil, err
	}
	if snap.Kind == Committed {
		return nil, fmt.Errorf("%s snapshot %q is committed and cannot be mounted, prepare one on top of it: %w", s.name, key, errdefs.ErrFailedPrecondition)
	}
	return s.mounts(ctx, snap)
}

func (s *store) mounts(ctx context.Context, snap Snapshot) ([]*types.Mount, error) {
	m, err := s.backend.Mounts(ctx, snap)
	if err != nil {
		return nil, s.errorf("find mounts of", snap.Key, err)
	}
	return m, nil
}

func (s *store) Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]*types.Mount, error) {
	return s.create(ctx, Active, key, parent, labels)
}

func (s *store) View(ctx context.Context, key, parent string, labels map[string]string) ([]*types.Mount, error) {
	return s.create(ctx, View, key, parent, labels)
}

func (s *store) create(ctx context.Context, kind Kind, key, parent string, labels map[string]string) ([]*types.Mount, error) {
	if err := validateKey("key", key); err != nil {
		return nil, err
	}
	if err := identifiers.ValidateLabels(labels); err != nil {
		return nil, s.errorf("prepare", key, err)
	}
	snap := Snapshot{Ref: Ref{Key: key}, Kind: kind, Labels: labels}
	// Most refusals are found here, before anything is made.
	check := func(t table) (err error) {
		if target := labels[LabelRef]; target != "" && kind == Active {
			if err := t.absent(target); err != nil {
				return fmt.Errorf("target: %w", err)
			}
		}
		if err := t.absent(key); err != nil {
			return err
		}
		snap.Namespace = t.ns
		snap.Parents, err = t.parents(parent)
		return err
	}
	if err := s.view(ctx, check); err != nil {
		return nil, s.errorf("prepare", key, err)
	}
	expected := snap.Parents

	snap.ID = s.ids.take()
	defer s.ids.done(snap.ID)
	err := s.backend.Create(ctx, snap)
	if errors.Is(err, ErrStored) {
		err = s.adopt(ctx, snap, parent)
	}
	if err != nil {
		return nil, s.errorf("prepare", key, err)
	}
	failpoint.Hit("snapshots.prepare.made")
	now := time.Now().UnixNano()
	r := &records.Snapshot{Id: snap.ID, Kind: string(kind), Parent: parent, Labels: labels, CreatedAt: now, UpdatedAt: now}
	s.note(snap.Namespace, key, r)
	err = s.update(ctx, func(t table) error {
		if err := check(t); err != nil {
			return err
		}
		if !slices.Equal(snap.Parents, expected) {
			return fmt.Errorf("parent %q was replaced meanwhile: %w", parent, errdefs.ErrAborted)
		}
		if err := t.put(key, r); err != nil {
			return err
		}
		if err := t.mark(snap.ID); err != nil {
			return err
		}
		if err := leases.Attach(ctx, t.tx, t.ns, leases.Resource{ID: key, Type: leases.Snapshots + s.name}); err != nil {
			return err
		}
		return s.publish(ctx, t, "/snapshot/prepare", &events.SnapshotPrepare{Key: key, Parent: parent, Snapshotter: s.name})
	})
	if err != nil {
		s.free(snap)
		return nil, s.errorf("prepare", key, err)
	}
	failpoint.Hit("snapshots.prepare.recorded")
	return s.mounts(ctx, snap)
}

func (s *store) Commit(ctx context.Context, name, key string, labels map[string]string) error {
	if err := validateKey("name", name); err != nil {
		return err
	}
	if err := identifiers.ValidateLabels(labels); err != nil {
		return s.errorf("commit", key, err)
	}
	active := func(t table) (*records.Snapshot, error) {
		r, err := t.get(key)
		if err != nil {
			return nil, err
		}
		if Kind(r.Kind) != Active {
			return nil, fmt.Errorf("it is %s, not active: %w", r.Kind, errdefs.ErrFailedPrecondition)
		}
		return r, t.absent(name)
	}
	var snap Snapshot
	err := s.view(ctx, func(t table) error {
		r, err := active(t)
		if err == nil {
			snap, err = t.snapshot(key, r)
		}
		return err
	})
	if err != nil {
		return s.errorf("commit", key, err)
	}
	to := snap.Ref
	to.Key = name
	var committed *records.Snapshot
	usage, err := s.backend.Commit(ctx, snap, to)
	if err != nil {
		return s.errorf("commit", key, err)
	}
	failpoint.Hit("snapshots.commit.stored")
	err = s.update(ctx, func(t table) error {
		r, err := active(t)
		if err != nil {
			return err
		}
		if r.Id != snap.ID {
			return fmt.Errorf("it was replaced meanwhile: %w", errdefs.ErrAborted)
		}
		if err := t.delete(key, r); err != nil {
			return err
		}
		r.Kind, r.Labels, r.Inodes, r.Size_ = string(Committed), labels, usage.Inodes, usage.Size
		r.UpdatedAt = time.Now().UnixNano()
		r.CreatedAt = r.UpdatedAt
		committed = r
		if err := t.put(name, r); err != nil {
			return err
		}
		if err := leases.Detach(ctx, t.tx, t.ns, leases.Resource{ID: key, Type: leases.Snapshots + s.name}); err != nil {
			return err
		}
		if err := leases.Attach(ctx, t.tx, t.ns, leases.Resource{ID: name, Type: leases.Snapshots + s.name}); err != nil {
			return err
		}
		return s.publish(ctx, t, "/snapshot/commit", &events.SnapshotCommit{Key: key, Name: name, Snapshotter: s.name})
	})
	if err != nil {
		return s.errorf("commit", key, err)
	}
	failpoint.Hit("snapshots.commit.recorded")
	s.note(snap.Namespace, name, committed)
	return nil
}

func (s *store) Remove(ctx context.Context, key string) error {
	var snap Snapshot
	err := s.update(ctx, func(t table) error {
		var err error
		if snap, err = t.forget(key); err != nil {
			return err
		}
		if err := leases.Detach(ctx, t.tx, t.ns, leases.Resource{ID: key, Type: leases.Snapshots + s.name}); err != nil {
			return err
		}
		return s.publish(ctx, t, "/snapshot/remove", &events.SnapshotRemove{Key: key, Snapshotter: s.name})
	})
	if err != nil {
		return s.errorf("remove", key, err)
	}
	failpoint.Hit("snapshots.remove.recorded")
	free := func() {
		s.free(snap)
		failpoint.Hit("snapshots.remove.freed")
	}
	if d, ok := s.backend.(Deferrer); ok && d.Defers() {
		s.later.do(free)
		return nil
	}
	free()
	return nil
}

// Forget removes the record of a snapshot inside a transaction, for those who are in one already. When that is committed,
// they call free. FailedPrecondition: there are children, or no such snapshotter is loaded.
func (s *Store) Forget(tx *metadata.Tx, ns, snapshotter, key string) (free func() error, err error) {
	st := s.find(snapshotter)
	if st == nil {
		return nil, fmt.Errorf("snapshotter %q is not loaded: %w", snapshotter, errdefs.ErrFailedPrecondition)
	}
	snap, err := table{tx, ns, snapshotter}.forget(key)
	if errdefs.IsNotFound(err) {
		return func() error { return nil }, nil
	}
	return func() error { return st.discard(snap) }, err
}

func (s *store) Walk(ctx context.Context, f filters.Filter, fn func(Info) error) error {
	var found []Info // fn may write, which it could not do inside a transaction
	err := s.view(ctx, func(t table) error {
		return metadata.Each(t.bucket(), func(key string, r *records.Snapshot) error {
			if i := s.info(key, r); f.Match(i) {
				found = append(found, i)
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("cannot list %s snapshots: %w", s.name, err)
	}
	for _, i := range found {
		if err := fn(i); err != nil {
			return err
		}
	}
	return nil
}
