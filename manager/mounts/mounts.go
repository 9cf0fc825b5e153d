// Package mounts makes mounts for clients that cannot, or that want them to outlive themselves: those of a list that others
// of the list are made of, such as the layers of an overlay, files with a file system, loop devices. They are in STATE/mounts
// and outlive the daemon, not the boot. It must not know what is mounted.
package mounts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/mounts/stack"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/mounts"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/mount"
)

// schema is the version of a record.
const schema = 1

// Activation is what was mounted under a name, and what is left for the client.
type Activation struct {
	Name   string
	Labels map[string]string
	Active []Active
	System []*types.Mount
	lease  string
}

// Active is a mount that was made, or a loop device.
type Active struct {
	Mount *types.Mount
	At    time.Time
	Point string            // where it is mounted; a link to a loop device
	Data  map[string]string // DataDevice
}

// DataDevice is the loop device.
const DataDevice = "device"

// Options of an activation.
type Options struct {
	Labels map[string]string
	// Temporary is for who needs the mounts for a moment: all are made, and what is left is a bind mount of the last one.
	Temporary bool
}

// Field lets filters look at an activation: name, labels.KEY.
func (a Activation) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "name":
		return a.Name, true
	case "labels":
		v, ok := a.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// Store makes mounts. Its methods work in the namespace of their context.
type Store struct {
	state, boot string
	db          *metadata.DB
	log         *slog.Logger

	mu   sync.Mutex
	busy map[string]chan struct{} // the stacks that somebody works on, by directory; closed when he has done
}

// New uses the directory state/mounts, and db for what leases keep. What a daemon that was killed left half mounted is
// unmounted, and what is of another boot forgotten; what cannot be is logged, and left for mctl fsck.
func New(state string, db *metadata.DB, log *slog.Logger) (*Store, error) {
	boot, err := stack.Boot()
	if err != nil {
		return nil, err
	}
	s := &Store{state: filepath.Clean(state), boot: boot, db: db, log: log, busy: map[string]chan struct{}{}}
	if err := os.MkdirAll(filepath.Join(s.state, stack.Dir), 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the directory of mounts: %w", err)
	}
	dirs, err := stack.All(s.state)
	if err != nil {
		return nil, err
	}
	for _, dir := range dirs {
		if r, err := stack.Read(dir); err == nil && r.BootId == s.boot {
			continue
		}
		if err := stack.Undo(dir); err != nil {
			log.Error("half made mounts are left", "directory", dir, "error", err)
		}
	}
	return s, nil
}

func (s *Store) path(ns, name string) string { return stack.Path(s.state, ns, name) }

// lock waits until nobody else works on a stack.
func (s *Store) lock(ctx context.Context, dir string) (unlock func(), err error) {
	for {
		unlock, wait := s.tryLock(dir)
		if unlock != nil {
			return unlock, nil
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// tryLock gives what to wait for when somebody else works on the stack.
func (s *Store) tryLock(dir string) (unlock func(), wait <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if wait, taken := s.busy[dir]; taken {
		return nil, wait
	}
	done := make(chan struct{})
	s.busy[dir] = done
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.busy, dir)
		close(done)
	}, nil
}

func resource(name string) leases.Resource { return leases.Resource{Type: leases.Mounts, ID: name} }

// Activate mounts those of a list of mounts that a later one refers to (a type "format/…") or that are for this package only
// ("loop"), makes the files ("mkfs/…") and directories ("mkdir/…") that they need, and gives the rest as the client has to
// mount it. The lease of ctx keeps it. NotImplemented when there is nothing of that kind: the client mounts them by itself
// then. AlreadyExists when the name is taken.
func (s *Store) Activate(ctx context.Context, name string, mounts []*types.Mount, o Options) (a Activation, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return a, err
	}
	fail := func(err error) (Activation, error) {
		return Activation{}, fmt.Errorf("cannot activate mounts %q: %w", name, err)
	}
	switch {
	case name == "":
		return fail(fmt.Errorf("they have no name: %w", errdefs.ErrInvalidArgument))
	case len(mounts) == 0:
		return fail(fmt.Errorf("there are none: %w", errdefs.ErrInvalidArgument))
	}
	if err := errors.Join(identifiers.ValidateLabels(o.Labels), resource(name).Validate()); err != nil {
		return fail(err)
	}
	p, err := newPlan(mounts, o.Temporary)
	if err != nil {
		return fail(err)
	}
	dir := s.path(ns, name)
	unlock, err := s.lock(ctx, dir)
	if err != nil {
		return fail(err)
	}
	defer unlock()
	if _, err := stack.Read(dir); err == nil {
		return fail(errdefs.ErrAlreadyExists)
	}
	if err := stack.Undo(dir); err != nil { // of a try that could not be undone then
		return fail(err)
	}
	a = Activation{Name: name, Labels: o.Labels}
	detach, err := s.attach(ctx, ns, &a)
	if err != nil {
		return fail(err)
	}
	if err := s.make(ctx, dir, p, &a); err != nil {
		return fail(errors.Join(err, stack.Undo(dir), detach()))
	}
	if o.Temporary {
		a.System = []*types.Mount{{Type: "bind", Source: a.Active[len(a.Active)-1].Point, Options: []string{"rbind"}}}
	}
	if err := errors.Join(s.expires(ns, a), s.write(dir, ns, a)); err != nil {
		return fail(errors.Join(err, stack.Undo(dir), detach()))
	}
	failpoint.Hit("mounts.recorded")
	return a, nil
}

// attach has the lease of ctx keep a, which need not be there yet. The function it returns undoes that.
func (s *Store) attach(ctx context.Context, ns string, a *Activation) (detach func() error, err error) {
	id, ok := leases.From(ctx)
	if !ok {
		return func() error { return nil }, nil
	}
	kept := false
	err = s.db.Batch(func(tx *metadata.Tx) error {
		kept = slices.Contains(leases.Resources(tx, ns, id), resource(a.Name))
		return leases.Attach(ctx, tx, ns, resource(a.Name))
	})
	if err != nil {
		return nil, err
	}
	failpoint.Hit("mounts.leased")
	a.lease = id
	return func() error {
		if kept {
			return nil
		}
		return s.detach(ns, *a)
	}, nil
}

// detach has the lease under which a was made let go of it.
func (s *Store) detach(ns string, a Activation) error {
	if a.lease == "" {
		return nil
	}
	return s.db.Batch(func(tx *metadata.Tx) error {
		return leases.Detach(leases.With(context.Background(), a.lease), tx, ns, resource(a.Name))
	})
}

// expires tells the collector when a may be its business.
func (s *Store) expires(ns string, a Activation) error {
	at, ok := leases.Expiry(a.Labels)
	if !ok {
		return nil
	}
	return s.db.Batch(func(tx *metadata.Tx) error {
		tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Mounts, Key: a.Name, Expires: at})
		return nil
	})
}

func (s *Store) make(ctx context.Context, dir string, p *plan, a *Activation) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for i := range p.mounts {
		m, err := p.resolve(ctx, dir, i, a.Active)
		if err != nil {
			return fmt.Errorf("mount %d: %w", i, err)
		}
		if i >= p.system {
			a.System = append(a.System, m)
			continue
		}
		made := Active{Mount: m, At: time.Now().UTC()}
		if m.Type == looped {
			var device string
			if made.Point, device, err = attachLoop(dir, i, m, a.Active); err != nil {
				return fmt.Errorf("mount %d: %w", i, err)
			}
			made.Data = map[string]string{DataDevice: device}
		} else if made.Point, err = stack.Mount(dir, i, m); err != nil {
			return fmt.Errorf("mount %d: %w", i, err)
		}
		a.Active = append(a.Active, made)
	}
	return nil
}

// attachLoop makes a loop device; of its options only ro and rw count, and the last of them.
func attachLoop(dir string, i int, m *types.Mount, before []Active) (point, device string, err error) {
	if !filepath.IsAbs(m.Source) {
		return "", "", fmt.Errorf("the file %q for a loop device has no absolute path: %w", m.Source, errdefs.ErrInvalidArgument)
	}
	if err := inside(m.Source, before); err != nil {
		return "", "", err
	}
	fi, err := os.Stat(m.Source)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", "", fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	case err == nil && !fi.Mode().IsRegular():
		err = fmt.Errorf("%s is no regular file: %w", m.Source, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return "", "", err
	}
	return stack.Attach(dir, i, m.Source, mount.ReadOnly(m))
}

// Deactivate unmounts what was mounted. FailedPrecondition while somebody uses it: it stays active then, as far as it is
// mounted.
func (s *Store) Deactivate(ctx context.Context, name string) error {
	return s.with(ctx, name, func(ns, dir string, a Activation) error {
		err := stack.Undo(dir)
		if err == nil {
			err = s.detach(ns, a)
		}
		if err != nil {
			return fmt.Errorf("cannot deactivate mounts %q: %w", name, err)
		}
		return nil
	})
}

// Info finds an activation.
func (s *Store) Info(ctx context.Context, name string) (Activation, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return Activation{}, err
	}
	return read(s.path(ns, name), name)
}

// Update changes labels: all, or those that paths name (labels, labels.KEY).
func (s *Store) Update(ctx context.Context, name string, labels map[string]string, paths ...string) (out Activation, err error) {
	if err := identifiers.ValidateLabels(labels); err != nil {
		return out, fmt.Errorf("cannot update mounts %q: %w", name, err)
	}
	err = s.with(ctx, name, func(ns, dir string, a Activation) error {
		if len(paths) == 0 {
			a.Labels = labels
		}
		for _, path := range paths {
			key, nested := strings.CutPrefix(path, "labels.")
			switch {
			case nested:
				a.Labels = metadata.With(a.Labels, key, labels[key])
			case path == "labels":
				a.Labels = labels
			default:
				return fmt.Errorf("cannot update mounts %q: field %q cannot be changed: %w", name, path, errdefs.ErrInvalidArgument)
			}
		}
		out = a
		return errors.Join(s.write(dir, ns, a), s.expires(ns, a))
	})
	return out, err
}

// List gives the activations that match f, ordered by name.
func (s *Store) List(ctx context.Context, f filters.Filter) ([]Activation, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	all, err := s.all()
	return slices.DeleteFunc(all[ns], func(a Activation) bool { return !f.Match(a) }), err
}

// all gives the activations, by namespace, each ordered by name. Damaged ones are left out: mctl fsck tells of them.
func (s *Store) all() (map[string][]Activation, error) {
	dirs, err := stack.All(s.state)
	out := map[string][]Activation{}
	for _, dir := range dirs {
		if r, err := stack.Read(dir); err == nil {
			out[r.Namespace] = append(out[r.Namespace], decode(r))
		}
	}
	for _, of := range out {
		slices.SortFunc(of, func(a, b Activation) int { return strings.Compare(a.Name, b.Name) })
	}
	return out, err
}

// with calls fn for an activation that there is, while nobody else works on it.
func (s *Store) with(ctx context.Context, name string, fn func(ns, dir string, a Activation) error) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	dir := s.path(ns, name)
	unlock, err := s.lock(ctx, dir)
	if err != nil {
		return err
	}
	defer unlock()
	a, err := read(dir, name)
	if err != nil {
		return err
	}
	return fn(ns, dir, a)
}

func read(dir, name string) (Activation, error) {
	r, err := stack.Read(dir)
	if errors.Is(err, fs.ErrNotExist) {
		err = errdefs.ErrNotFound
	}
	if err != nil {
		return Activation{}, fmt.Errorf("mounts %q: %w", name, err)
	}
	return decode(r), nil
}

func (s *Store) write(dir, ns string, a Activation) error {
	r := &records.Activation{Schema: schema, Namespace: ns, Name: a.Name, Labels: a.Labels, BootId: s.boot, Lease: a.lease}
	for _, m := range a.Active {
		r.Active = append(r.Active, &records.Active{Mount: toRecord(m.Mount), UnixNano: m.At.UnixNano(), MountPoint: m.Point, Data: m.Data})
	}
	for _, m := range a.System {
		r.System = append(r.System, toRecord(m))
	}
	return stack.Write(dir, r)
}

func toRecord(m *types.Mount) *records.Mount {
	return &records.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
}

func fromRecord(m *records.Mount) *types.Mount {
	return &types.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
}

func decode(r *records.Activation) Activation {
	a := Activation{Name: r.Name, Labels: r.Labels, lease: r.Lease}
	for _, m := range r.Active {
		a.Active = append(a.Active, Active{Mount: fromRecord(m.Mount), At: time.Unix(0, m.UnixNano).UTC(), Point: m.MountPoint, Data: m.Data})
	}
	for _, m := range r.System {
		a.System = append(a.System, fromRecord(m))
	}
	return a
}
