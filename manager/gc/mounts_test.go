package gc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/mounts"
	"github.com/managerd/managerd/manager/mounts/stack"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/snapshots"
)

// withMounts gives the collector mounts, in which nothing may be left at the end.
func (e *env) withMounts(t *testing.T) *mounts.Store {
	t.Helper()
	state := t.TempDir()
	s, err := mounts.New(state, e.db, slog.New(slog.DiscardHandler))
	e.must(err)
	t.Cleanup(func() {
		left, err := stack.All(state)
		for _, dir := range left {
			err = errors.Join(err, stack.Undo(dir))
		}
		if err != nil {
			t.Error(err)
		}
	})
	e.Mounts = s
	return s
}

// activate mounts a file system, and gives where.
func (e *env) activate(ctx context.Context, s *mounts.Store, name string, l labels) string {
	e.t.Helper()
	a, err := s.Activate(ctx, name, []*types.Mount{{Type: "tmpfs", Source: "none"}}, mounts.Options{Temporary: true, Labels: l})
	e.must(err)
	return a.Active[0].Point
}

func gone(t *testing.T, ctx context.Context, s *mounts.Store, want bool, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := s.Info(ctx, name); errdefs.IsNotFound(err) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestMounts: an activation stays while a lease, a label or what has one keeps it, and not longer, in whichever namespace.
func TestMounts(t *testing.T) {
	e := newEnv(t)
	s := e.withMounts(t)
	other := namespaces.With(e.ctx, "elsewhere") // of which the database knows nothing
	e.lease("l", nil)
	e.lease("flat", labels{leases.FlatLabel: ""})
	e.lease("late", labels{leases.ExpireLabel: "2020-01-01T00:00:00Z"})
	e.snapshot(e.ctx, snapshots.Active, "s", "", labels{labelRoot: ""})
	e.snapshot(e.ctx, snapshots.Active, "unused", "", nil)
	e.container("c", "", labels{labelRef + "mount.1": "of container"})
	soon := time.Now().Add(time.Hour).Truncate(time.Second)
	for name, l := range map[string]labels{
		"root": {labelRoot: ""}, "later": {leases.ExpireLabel: soon.Format(time.RFC3339)}, "for container": {labelBack + "container": "c"},
		"for snapshot": {labelBack + "snapshot.native": "s"}, "for mount": {labelBack + "mount": "root"}, "of container": nil,
		"loose": nil, "past": {leases.ExpireLabel: "2020-01-01T00:00:00Z"}, "of nobody": {labelBack + "container": "nobody"},
		"for unused": {labelBack + "snapshot.native": "unused"},
	} {
		e.activate(e.ctx, s, name, l)
	}
	e.activate(leases.With(e.ctx, "l"), s, "leased", nil)
	e.activate(leases.With(e.ctx, "flat"), s, "flatly", nil)
	e.activate(leases.With(e.ctx, "late"), s, "too late", nil)
	e.activate(other, s, "root", nil)
	e.activate(other, s, "stays", labels{labelRoot: ""})

	res := e.collect()
	stay := []string{"root", "later", "for container", "for snapshot", "for mount", "of container", "leased", "flatly"}
	gone(t, e.ctx, s, false, stay...)
	gone(t, e.ctx, s, true, "loose", "past", "of nobody", "for unused", "too late")
	gone(t, other, s, true, "root")
	gone(t, other, s, false, "stays")
	if res.Removed[metadata.Mounts] != 6 || !res.Next.Equal(soon) {
		t.Errorf("%v, next %v", res.Removed, res.Next)
	}

	e.must(e.leases.Delete(e.ctx, "l"))
	e.must(e.leases.Delete(e.ctx, "flat"))
	e.must(e.containers.Delete(e.ctx, "c"))
	sn, err := e.snapshots.Snapshotter("native")
	e.must(err)
	e.must(sn.Remove(e.ctx, "s"))
	for _, name := range []string{"root", "later"} {
		_, err := s.Update(e.ctx, name, nil)
		e.must(err)
	}
	_, err = s.Update(other, "stays", nil)
	e.must(err)
	e.collect()
	gone(t, e.ctx, s, true, stay...)
	gone(t, other, s, true, "stays")
}

// TestMountsBusy: what is in use stays, is tried again, and takes nothing else with it.
func TestMountsBusy(t *testing.T) {
	e := newEnv(t)
	s := e.withMounts(t)
	f, err := os.Create(filepath.Join(e.activate(e.ctx, s, "busy", nil), "f"))
	e.must(err)
	e.activate(e.ctx, s, "idle", nil)
	res := e.collect()
	gone(t, e.ctx, s, false, "busy")
	gone(t, e.ctx, s, true, "idle")
	if res.Removed[metadata.Mounts] != 1 || res.Next.Before(time.Now()) || res.Next.After(time.Now().Add(retry)) {
		t.Errorf("%v, next %v", res.Removed, res.Next)
	}
	if _, err := s.Update(e.ctx, "busy", labels{"k": "v"}); err != nil {
		t.Error(err)
	}
	e.must(f.Close())
	e.collect()
	gone(t, e.ctx, s, true, "busy")
}

// TestMountsMeanwhile: what somebody needs by the time at which it would be removed stays.
func TestMountsMeanwhile(t *testing.T) {
	for name, need := range map[string]func(e *env, s *mounts.Store){
		"lease": func(e *env, _ *mounts.Store) {
			e.lease("l", nil, leases.Resource{ID: "x", Type: leases.Mounts})
		},
		"container": func(e *env, _ *mounts.Store) { e.container("c", "", nil) },
		"label": func(e *env, s *mounts.Store) {
			_, err := s.Update(e.ctx, "x", labels{labelRoot: ""})
			e.must(err)
		},
		"again": func(e *env, s *mounts.Store) {
			e.must(s.Deactivate(e.ctx, "x"))
			e.activate(e.ctx, s, "x", nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			s := e.withMounts(t)
			e.activate(e.ctx, s, "x", labels{labelBack + "container": "c"})
			for i := range batch { // they go first: x is in the second batch
				e.lease(fmt.Sprintf("over%d", i), labels{leases.ExpireLabel: "2020-01-01T00:00:00Z"})
			}
			once := false
			e.between = func() {
				if !once {
					once = true
					need(e, s)
				}
			}
			if res := e.collect(); res.Removed[metadata.Leases] != batch || !once {
				t.Errorf("%v", res.Removed)
			}
			gone(t, e.ctx, s, false, "x")
		})
	}
}
