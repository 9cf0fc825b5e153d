package erofs_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/erofs"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
	"github.com/managerd/managerd/shimapi/mount"
)

func open(root string) (snapshots.Backend, error) { return erofs.New(root, erofs.Options{}) }

func kept(t *testing.T) string {
	dir := snapshottest.Kept(t)
	if _, err := open(filepath.Join(dir, "root")); errdefs.IsNotImplemented(err) {
		t.Skip(err)
	}
	return dir
}

// TestReboot: images that nobody has mounted since the boot are, when somebody asks for what stands on them.
func TestReboot(t *testing.T) {
	dir := kept(t)
	e, _ := snapshottest.Open(t, dir, open)
	for i, name := range []string{"a", "b"} {
		e.Prepare(name, []string{"", "a"}[i], func(root string) {
			e.Must(os.WriteFile(filepath.Join(root, name), []byte(name), 0o644))
			e.Must(os.Remove(filepath.Join(root, name)))
			e.Must(os.WriteFile(filepath.Join(root, name), []byte(name), 0o600))
		})
	}
	m, err := e.S.Prepare(e.Ctx, "k", "b", nil)
	e.Must(err)
	look := func() {
		e.On(m, func(root string) {
			for _, name := range []string{"a", "b"} {
				if b, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(b) != name {
					t.Errorf("%s: %q, %v", name, b, err)
				}
			}
		})
	}
	look()
	for _, id := range []string{"1", "2"} {
		e.Must(mount.Unmount(filepath.Join(e.Root, "snapshots", id, "fs")))
	}
	m, err = e.S.Mounts(e.Ctx, "k")
	e.Must(err)
	look()
}

// TestSpace: the files that an image was made of are given up when it is used, and not while the commit may be undone.
func TestSpace(t *testing.T) {
	dir := kept(t)
	e, _ := snapshottest.Open(t, dir, open)
	e.Prepare("a", "", func(root string) { e.Must(os.WriteFile(filepath.Join(root, "f"), make([]byte, 1<<20), 0o644)) })
	at := filepath.Join(e.Root, "snapshots", "1")
	if _, err := os.Stat(filepath.Join(at, "fs", "f")); err != nil {
		t.Errorf("before it is used: %v", err)
	}
	_, err := e.S.Prepare(e.Ctx, "k", "a", nil)
	e.Must(err)
	e.Must(mount.Unmount(filepath.Join(at, "fs")))
	if left, err := os.ReadDir(filepath.Join(at, "fs")); err != nil || len(left) > 0 {
		t.Errorf("below the image: %v, %v", left, err)
	}
	if _, err := os.Stat(filepath.Join(at, "spent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the files are still there: %v", err)
	}
}

// TestNoRoom: a commit of which the image cannot be made leaves the snapshot as it was.
func TestNoRoom(t *testing.T) {
	dir := kept(t)
	e, stop := snapshottest.Open(t, dir, open)
	stop()
	small := snapshottest.On(t, "ext4", 8<<20, "-q", "-F")
	t.Cleanup(func() { // images stay mounted, and would keep the file system
		e.Must(mount.Unmount(filepath.Join(small, "root", "snapshots", "1", "fs")))
	})
	e, _ = snapshottest.Open(t, small, open)
	m, err := e.S.Prepare(e.Ctx, "k", "", nil)
	e.Must(err)
	body := make([]byte, 4<<20)
	for i := range body {
		body[i] = byte(i * i >> 7)
	}
	e.On(m, func(root string) { e.Must(os.WriteFile(filepath.Join(root, "f"), body, 0o644)) })
	err = e.S.Commit(e.Ctx, "n", "k", nil)
	if err == nil || !strings.Contains(err.Error(), "mkfs.erofs") {
		t.Errorf("error: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(small, "root", "snapshots", "1", "layer*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	m, err = e.S.Mounts(e.Ctx, "k")
	e.Must(err)
	e.On(m, func(root string) { e.Must(os.Truncate(filepath.Join(root, "f"), 1<<20)) })
	e.Must(e.S.Commit(e.Ctx, "n", "k", nil))
}

// TestMkfs: without mkfs.erofs, or with one that is too old or does not run, the snapshotter is not there, and says why.
func TestMkfs(t *testing.T) {
	kept(t)
	for name, c := range map[string]struct {
		script string
		words  string
	}{
		"missing": {"", "not installed"},
		"old":     {"#!/bin/sh\necho 'usage: mkfs.erofs [--quiet]' >&2\nexit 1\n", "too old: it has no --preserve-mtime"},
		"broken":  {"no program", "cannot run"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if c.script != "" {
				if err := os.WriteFile(filepath.Join(dir, "mkfs.erofs"), []byte(c.script), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv("PATH", dir)
			_, err := open(filepath.Join(dir, "root"))
			if err == nil || !strings.Contains(err.Error(), c.words) || name != "broken" && !errdefs.IsNotImplemented(err) {
				t.Errorf("%v, want %q", err, c.words)
			}
			if _, err := os.Stat(filepath.Join(dir, "root")); err == nil {
				t.Error("a directory was made")
			}
		})
	}
}
