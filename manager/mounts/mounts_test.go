package mounts

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/shimapi/mount"
)

func open(t *testing.T, state string) *Store {
	t.Helper()
	s, err := New(state)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// layers are two mounts and an overlay of them.
func layers(t *testing.T) (list []*types.Mount, upper string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		list = append(list, &types.Mount{Type: "bind", Source: filepath.Join(dir, name), Options: []string{"rbind", "ro"}})
	}
	upper = filepath.Join(dir, "upper")
	return append(list, &types.Mount{Type: "format/mkdir/overlay", Source: "overlay", Options: []string{
		"X-containerd.mkdir.path=" + upper + ":755", "lowerdir={{ overlay 1 0 }}:{{ source 0 }}/",
	}}), upper
}

// TestActivate: layers are mounted, also for the next daemon, until somebody deactivates them; the client gets the rest.
func TestActivate(t *testing.T) {
	state := t.TempDir()
	s := open(t, state)
	ctx := namespaces.With(context.Background(), "one")
	list, upper := layers(t)
	a, err := s.Activate(ctx, "x", list, map[string]string{"k": "v"})
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Active) != 2 || len(a.System) != 1 || a.System[0].Type != "overlay" || len(a.System[0].Options) != 1 {
		t.Fatalf("%+v", a)
	}
	if want := "lowerdir=" + mount.Escape(a.Active[1].Point) + ":" + mount.Escape(a.Active[0].Point) + ":" + list[0].Source + "/"; a.System[0].Options[0] != want {
		t.Errorf("%q, not %q", a.System[0].Options[0], want)
	}
	if fi, err := os.Stat(upper); err != nil || !fi.IsDir() {
		t.Errorf("%v", err)
	}
	if _, err := s.Activate(ctx, "x", list, nil); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}

	s = open(t, state)
	for i, name := range []string{"a", "b"} {
		if _, err := os.Stat(filepath.Join(a.Active[i].Point, name)); err != nil {
			t.Errorf("after a restart: %v", err)
		}
	}
	if got, err := s.Info(ctx, "x"); err != nil || got.Labels["k"] != "v" || len(got.Active) != 2 || got.Active[0].Point != a.Active[0].Point || got.Active[0].At.IsZero() {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := s.Update(ctx, "x", map[string]string{"l": "w"}, "labels.l"); err != nil || got.Labels["k"] != "v" || got.Labels["l"] != "w" {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := s.Update(ctx, "x", nil, "active"); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	for filter, n := range map[string]int{"labels.l==w": 1, "name==y": 0} {
		f, err := filters.ParseAll(filter)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := s.List(ctx, f); err != nil || len(got) != n {
			t.Errorf("%s: %+v, %v", filter, got, err)
		}
	}
	other := namespaces.With(context.Background(), "other")
	if got, err := s.List(other, filters.Always); err != nil || len(got) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	if err := s.Deactivate(other, "x"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if err := s.Deactivate(ctx, "x"); err != nil {
		t.Fatal(err)
	}
	empty(t, s)
}

func empty(t *testing.T, s *Store) {
	t.Helper()
	if left, err := os.ReadDir(s.dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestHalfMade: what a daemon that was killed left without a record, or has of another boot, is unmounted.
func TestHalfMade(t *testing.T) {
	state := t.TempDir()
	s := open(t, state)
	ctx := namespaces.With(context.Background(), "one")
	list, _ := layers(t)
	if _, err := s.Activate(ctx, "x", list, nil); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(s.path("one", "x"), recordFile), filepath.Join(s.path("one", "x"), recordFile+".new")); err != nil {
		t.Fatal(err)
	}
	s.boot = "another"
	if _, err := s.Activate(ctx, "y", list, nil); err != nil {
		t.Fatal(err)
	}
	empty(t, open(t, state))
}

// TestActivateBad: what cannot be is said, and leaves nothing.
func TestActivateBad(t *testing.T) {
	s := open(t, t.TempDir())
	ctx := namespaces.With(context.Background(), "one")
	bind := &types.Mount{Type: "bind", Source: "/", Options: []string{"bind", "ro"}}
	overlay := func(options ...string) *types.Mount {
		return &types.Mount{Type: "format/mkdir/overlay", Source: "overlay", Options: options}
	}
	for _, c := range []struct {
		name   string
		mounts []*types.Mount
		is     func(error) bool
		says   string
	}{
		{"", []*types.Mount{overlay()}, errdefs.IsInvalidArgument, "no name"},
		{"x", nil, errdefs.IsInvalidArgument, "none"},
		{"x", []*types.Mount{bind}, errdefs.IsNotImplemented, "by itself"},
		{"x", []*types.Mount{{Type: "mkfs/ext4"}}, errdefs.IsNotImplemented, "mkfs"},
		{"x", []*types.Mount{bind, overlay("lowerdir={{ mount 1 }}")}, errdefs.IsInvalidArgument, "no mount 1"},
		{"x", []*types.Mount{bind, overlay("lowerdir={{ nosuch }}")}, errdefs.IsInvalidArgument, "nosuch"},
		{"x", []*types.Mount{bind, overlay("X-containerd.mkdir.path=relative")}, errdefs.IsInvalidArgument, "absolute"},
		{"x", []*types.Mount{bind, overlay("X-containerd.mkdir.path=/x:9")}, errdefs.IsInvalidArgument, "mode"},
		{"x", []*types.Mount{bind, overlay("X-containerd.mkdir.path=/x:755:a:b")}, errdefs.IsInvalidArgument, "owner"},
		{"x", []*types.Mount{{Type: "nosuchfs", Source: "none"}, overlay("lowerdir={{ mount 0 }}")}, func(error) bool { return true }, "nosuchfs"},
	} {
		if _, err := s.Activate(ctx, c.name, c.mounts, nil); err == nil || !c.is(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v: %v", c.mounts, err)
		}
	}
	empty(t, s)
}
