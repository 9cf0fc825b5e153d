// Package mounts makes mounts for clients that cannot, or that want them to outlive themselves: those of a list that others
// of the list are made of, such as the layers of an overlay. They are in STATE/mounts and outlive the daemon, not the
// boot. It must not know what is mounted.
package mounts

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/mounts"
	"github.com/managerd/managerd/shimapi/mount"
)

// Dir is where the mounts are, below the daemon's state directory.
const Dir = "mounts"

// schema is the version of a record.
const schema = 1

// Activation is what was mounted under a name, and what is left for the client.
type Activation struct {
	Name   string
	Labels map[string]string
	Active []Active
	System []*types.Mount
}

// Active is a mount that was made.
type Active struct {
	Mount *types.Mount
	At    time.Time
	Point string // where it is mounted
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
	dir  string
	boot string

	mu sync.Mutex // held while mounts come and go
}

// New uses the directory state/mounts. What a daemon that was killed left half mounted is unmounted, and what is of another
// boot forgotten.
func New(state string) (*Store, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	s := &Store{dir: filepath.Join(state, Dir), boot: strings.TrimSpace(string(boot))}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the directory of mounts: %w", err)
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		dir := filepath.Join(s.dir, e.Name())
		if r, err := readRecord(dir); err == nil && r.BootId == s.boot {
			continue
		}
		if err := undo(dir); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *Store) path(ns, name string) string {
	sum := sha256.Sum256([]byte(ns + "\x00" + name))
	return filepath.Join(s.dir, hex.EncodeToString(sum[:16]))
}

// Activate mounts those of a list of mounts that a later one refers to (a type "format/…"), and gives the rest as the client
// has to mount it, with the references resolved and the directories made ("mkdir/…"). NotImplemented when there is nothing
// of that kind: the client mounts them by itself then. AlreadyExists when the name is taken.
func (s *Store) Activate(ctx context.Context, name string, mounts []*types.Mount, labels map[string]string) (a Activation, err error) {
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
	if err := identifiers.ValidateLabels(labels); err != nil {
		return fail(err)
	}
	p, err := newPlan(mounts)
	if err != nil {
		return fail(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	dir := s.path(ns, name)
	if _, err := os.Lstat(dir); err == nil {
		return fail(errdefs.ErrAlreadyExists)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fail(err)
	}
	a = Activation{Name: name, Labels: labels}
	if err := s.make(dir, p, &a); err != nil {
		return fail(errors.Join(err, undo(dir)))
	}
	if err := s.write(dir, ns, a); err != nil {
		return fail(errors.Join(err, undo(dir)))
	}
	return a, nil
}

func (s *Store) make(dir string, p *plan, a *Activation) error {
	for i, m := range p.mounts {
		m, err := p.resolve(m, a.Active)
		if err != nil {
			return err
		}
		if i >= p.system {
			a.System = append(a.System, m)
			continue
		}
		point := filepath.Join(dir, strconv.Itoa(i))
		if err := os.Mkdir(point, 0o700); err != nil {
			return err
		}
		if err := mount.Mount([]*types.Mount{m}, point); err != nil {
			return err
		}
		a.Active = append(a.Active, Active{Mount: m, At: time.Now().UTC(), Point: point})
	}
	return nil
}

// undo unmounts and removes all of an activation, the last mount first.
func undo(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	points := []int{}
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			points = append(points, n)
		}
	}
	sort.Sort(sort.Reverse(sort.IntSlice(points)))
	for _, n := range points {
		point := filepath.Join(dir, strconv.Itoa(n))
		if err := mount.Unmount(point); err != nil {
			return err
		}
		if err := os.Remove(point); err != nil { // never RemoveAll: something may be mounted after all
			return err
		}
	}
	for _, f := range []string{recordFile, recordFile + ".new"} {
		if err := os.Remove(filepath.Join(dir, f)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return os.Remove(dir)
}

// Deactivate unmounts what was mounted.
func (s *Store) Deactivate(ctx context.Context, name string) error {
	return s.with(ctx, name, func(_, dir string, _ Activation) error {
		if err := undo(dir); err != nil {
			return fmt.Errorf("cannot deactivate mounts %q: %w", name, err)
		}
		return nil
	})
}

// Info finds an activation.
func (s *Store) Info(ctx context.Context, name string) (out Activation, err error) {
	err = s.with(ctx, name, func(_, _ string, a Activation) error {
		out = a
		return nil
	})
	return out, err
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
		return s.write(dir, ns, a)
	})
	return out, err
}

// List gives the activations that match f, ordered by name.
func (s *Store) List(ctx context.Context, f filters.Filter) ([]Activation, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	var out []Activation
	for _, e := range entries {
		r, err := readRecord(filepath.Join(s.dir, e.Name()))
		if err != nil || r.Namespace != ns {
			continue
		}
		if a := decode(r); f.Match(a) {
			out = append(out, a)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

// with calls fn for an activation that there is.
func (s *Store) with(ctx context.Context, name string, fn func(ns, dir string, a Activation) error) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	dir := s.path(ns, name)
	r, err := readRecord(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("mounts %q: %w", name, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("mounts %q: %w", name, err)
	}
	return fn(ns, dir, decode(r))
}

const recordFile = "record"

func (s *Store) write(dir, ns string, a Activation) error {
	r := &records.Activation{Schema: schema, Namespace: ns, Name: a.Name, Labels: a.Labels, BootId: s.boot}
	for _, m := range a.Active {
		r.Active = append(r.Active, &records.Active{Mount: toRecord(m.Mount), UnixNano: m.At.UnixNano(), MountPoint: m.Point})
	}
	for _, m := range a.System {
		r.System = append(r.System, toRecord(m))
	}
	data, err := r.Marshal()
	if err != nil {
		return err
	}
	file := filepath.Join(dir, recordFile)
	if err := os.WriteFile(file+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

func readRecord(dir string) (*records.Activation, error) {
	data, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err != nil {
		return nil, err
	}
	r := &records.Activation{}
	if err := r.Unmarshal(data); err != nil {
		return nil, fmt.Errorf("its record is damaged: %w: %w", err, errdefs.ErrDataLoss)
	}
	return r, nil
}

func toRecord(m *types.Mount) *records.Mount {
	return &records.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
}

func fromRecord(m *records.Mount) *types.Mount {
	return &types.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
}

func decode(r *records.Activation) Activation {
	a := Activation{Name: r.Name, Labels: r.Labels}
	for _, m := range r.Active {
		a.Active = append(a.Active, Active{Mount: fromRecord(m.Mount), At: time.Unix(0, m.UnixNano).UTC(), Point: m.MountPoint})
	}
	for _, m := range r.System {
		a.System = append(a.System, fromRecord(m))
	}
	return a
}
