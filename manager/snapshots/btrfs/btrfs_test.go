package btrfs_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/btrfs"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
	"github.com/managerd/managerd/shimapi/mount"
)

func TestElsewhere(t *testing.T) {
	root := filepath.Join(t.TempDir(), "a", "b")
	var st unix.Statfs_t
	if err := unix.Statfs(os.TempDir(), &st); err != nil || st.Type == unix.BTRFS_SUPER_MAGIC {
		t.Skip("temporary files are on btrfs here")
	}
	if _, err := btrfs.New(root); !errors.Is(err, errdefs.ErrNotImplemented) {
		t.Errorf("not on btrfs: %v", err)
	}
	if _, err := os.Stat(filepath.Dir(root)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was made: %v", err)
	}
}

// TestNested: what a container has made subvolumes of goes with its snapshot.
func TestNested(t *testing.T) {
	root := snapshottest.On(t, "btrfs", 256<<20, "-q")
	b, err := btrfs.New(root)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(root, "snapshots", "1", "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if err := b.Create(ctx, snapshots.Snapshot{Ref: snapshots.Ref{ID: 1}, Kind: snapshots.Active}); err != nil {
		t.Fatal(err) // what stood there has no owner
	}
	inner, err := btrfs.New(filepath.Join(root, "snapshots", "1", "var")) // of a daemon in a container
	if err != nil {
		t.Fatal(err)
	}
	for id := range uint64(3) {
		if err := inner.Create(ctx, snapshots.Snapshot{Ref: snapshots.Ref{ID: id}, Kind: snapshots.Active}); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // none there is no error
		if err := b.Remove(ctx, snapshots.Snapshot{Ref: snapshots.Ref{ID: 1}}); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(root, "snapshots")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestCommittedUnrecorded: a subvolume that a commit has frozen, of which nobody was told, can be written again.
func TestCommittedUnrecorded(t *testing.T) {
	b, err := btrfs.New(snapshottest.On(t, "btrfs", 256<<20, "-q"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, s := context.Background(), snapshots.Snapshot{Ref: snapshots.Ref{ID: 1}, Kind: snapshots.Active}
	if err := b.Create(ctx, s); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Commit(ctx, s, snapshots.Ref{ID: 1}); err != nil {
		t.Fatal(err)
	}
	m, err := b.Mounts(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := mount.WithTemp(m, func(at string) error { return os.WriteFile(filepath.Join(at, "f"), nil, 0o644) }); err != nil {
		t.Error(err)
	}
}
