package mounts

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/mounts/stack"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/shimapi/mount"
)

// open gives a store of a daemon that is started; those of one state share a database.
func open(t *testing.T, state string, db *metadata.DB) *Store {
	t.Helper()
	s, err := New(state, db, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// fresh gives a store, the context of a namespace and a directory for files; at the end of the test nothing may be left.
func fresh(t *testing.T) (*Store, context.Context, string) {
	t.Helper()
	dir := t.TempDir()
	db, err := metadata.Open(filepath.Join(dir, "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, filepath.Join(dir, "state"), db)
	t.Cleanup(func() {
		all, err := stack.All(s.state)
		for _, left := range all {
			t.Errorf("left: %s", left)
			err = errors.Join(err, stack.Undo(left))
		}
		devices, derr := stack.Devices(s.state)
		for _, d := range devices {
			t.Errorf("left: %s", d.Path)
			err = errors.Join(err, d.Detach())
		}
		if err := errors.Join(err, derr, db.Close()); err != nil {
			t.Error(err)
		}
	})
	return s, namespaces.With(context.Background(), "one"), dir
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
	s, ctx, _ := fresh(t)
	list, upper := layers(t)
	a, err := s.Activate(ctx, "x", list, Options{Labels: map[string]string{"k": "v"}})
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
	if _, err := s.Activate(ctx, "x", list, Options{}); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}

	s = open(t, s.state, s.db)
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
}

// TestHalfMade: what a daemon that was killed left without a record, or has of another boot, is unmounted.
func TestHalfMade(t *testing.T) {
	s, ctx, dir := fresh(t)
	list, _ := layers(t)
	if _, err := s.Activate(ctx, "x", list, Options{}); err != nil {
		t.Fatal(err)
	}
	x := s.path("one", "x")
	if err := os.Rename(filepath.Join(x, "record"), filepath.Join(x, "record.new")); err != nil {
		t.Fatal(err)
	}
	s.boot = "another"
	if _, err := s.Activate(ctx, "y", list, Options{}); err != nil {
		t.Fatal(err)
	}
	// One that died while it made a file, behind a loop device.
	z, half := s.path("one", "z"), filepath.Join(dir, "half")
	file := filepath.Join(dir, "file")
	if err := errors.Join(os.Mkdir(z, 0o700), os.WriteFile(half, nil, 0o600), os.WriteFile(file, make([]byte, 1<<20), 0o600), stack.Note(z, 1, half)); err != nil {
		t.Fatal(err)
	}
	_, device, err := stack.Attach(z, 0, file, false)
	if err != nil {
		t.Fatal(err)
	}
	_ = open(t, s.state, s.db)
	for _, path := range []string{x, z, s.path("one", "y"), half} {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("%s: %v", path, err)
		}
	}
	detached(t, device)
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

// TestActivateBad: what cannot be is said, and leaves nothing.
func TestActivateBad(t *testing.T) {
	s, ctx, dir := fresh(t)
	file := filepath.Join(dir, "file")
	image := func(options ...string) []*types.Mount {
		return []*types.Mount{{Type: "mkfs/loop", Source: file, Options: options}}
	}
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
		{"x\x00", []*types.Mount{overlay()}, errdefs.IsInvalidArgument, "NUL"},
		{"x", []*types.Mount{{Type: "nosuch/ext4"}}, errdefs.IsNotImplemented, "nosuch"},
		{"x", []*types.Mount{nil}, errdefs.IsNotImplemented, "by itself"},
		{"x", make([]*types.Mount, most+1), errdefs.IsInvalidArgument, "999"},
		{"x", []*types.Mount{{Type: "mkfs/loop", Source: "relative", Options: []string{"X-containerd.mkfs.size=1"}}}, errdefs.IsInvalidArgument, "absolute"},
		{"x", image(), errdefs.IsInvalidArgument, "size=SIZE"},
		{"x", image("X-containerd.mkfs.size=big"), errdefs.IsInvalidArgument, "no size"},
		{"x", image("X-containerd.mkfs.size=-1"), errdefs.IsInvalidArgument, "no size"},
		{"x", image("X-containerd.mkfs.size=4MiB", "X-containerd.mkfs.fs=vfat"), errdefs.IsInvalidArgument, "ext4 or xfs"},
		{"x", image("X-containerd.mkfs.size=4MiB", "X-containerd.mkfs.uuid=1"), errdefs.IsInvalidArgument, "UUID"},
		{"x", image("X-containerd.mkfs.size=4MiB", "X-containerd.mkfs.nosuch=1"), errdefs.IsInvalidArgument, "nosuch"},
		{"x", image("X-containerd.mkdir.path=/x"), errdefs.IsInvalidArgument, "mkdir"},
		{"x", image("X-containerd.mkfs.size=1"), func(error) bool { return true }, "mkfs.ext4: "},
		{"x", []*types.Mount{{Type: "loop", Source: "relative"}}, errdefs.IsInvalidArgument, "absolute"},
		{"x", []*types.Mount{{Type: "loop", Source: file}}, errdefs.IsNotFound, file},
		{"x", []*types.Mount{{Type: "loop", Source: dir}}, errdefs.IsInvalidArgument, "regular"},
		{"x", []*types.Mount{{Type: "loop", Source: file, Options: []string{"X-containerd.nosuch"}}}, errdefs.IsInvalidArgument, "nosuch"},
		{"x", []*types.Mount{bind, {Type: "ext4", Source: file, Options: []string{"X-containerd.mkfs.size=1"}}, overlay()}, errdefs.IsInvalidArgument, "mount 1"},
		{"x", []*types.Mount{bind, overlay("lowerdir={{ mount 1 }}")}, errdefs.IsInvalidArgument, "no mount 1"},
		{"x", []*types.Mount{bind, overlay("lowerdir={{ nosuch }}")}, errdefs.IsInvalidArgument, "nosuch"},
		{"x", []*types.Mount{bind, overlay("X-containerd.mkdir.path=relative")}, errdefs.IsInvalidArgument, "absolute"},
		{"x", []*types.Mount{bind, overlay("X-containerd.mkdir.path=/x:9")}, errdefs.IsInvalidArgument, "mode"},
		{"x", []*types.Mount{bind, overlay("X-containerd.mkdir.path=/x:755:a:b")}, errdefs.IsInvalidArgument, "owner"},
		{"x", []*types.Mount{{Type: "nosuchfs", Source: "none"}, overlay("lowerdir={{ mount 0 }}")}, func(error) bool { return true }, "nosuchfs"},
	} {
		if _, err := s.Activate(ctx, c.name, c.mounts, Options{}); err == nil || !c.is(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q, %v: %v", c.name, c.says, err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*mkfs*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if _, err := os.Lstat(file); !os.IsNotExist(err) {
		t.Error(err)
	}
}
