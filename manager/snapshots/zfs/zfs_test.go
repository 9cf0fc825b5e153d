package zfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots"
)

func TestLeftOut(t *testing.T) {
	if _, err := New(t.TempDir()); !errors.Is(err, errdefs.ErrNotImplemented) || !strings.Contains(err.Error(), "zfs") {
		t.Errorf("error: %v", err)
	}
}

// pool gives a Backend on a pool of its own. It skips the test where there is no ZFS.
func pool(t *testing.T) *Backend {
	t.Helper()
	cli, err := exec.LookPath("zfs")
	if err != nil {
		t.Skip("the command zfs is not installed")
	}
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 256<<20); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprint("managerd", unix.Getpid())
	if out, err := exec.Command("zpool", "create", "-f", "-m", "none", name, disk).CombinedOutput(); err != nil {
		t.Skipf("no pool can be made: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("zpool", "destroy", "-f", name).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	return &Backend{cli: cli, dataset: name}
}

// TestStorage: file systems come and go as the store asks. What is in them needs the kernel module, and is the suite's.
func TestStorage(t *testing.T) {
	b, ctx := pool(t), context.Background()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	snap := func(id uint64, kind snapshots.Kind, parents ...uint64) snapshots.Snapshot {
		s := snapshots.Snapshot{Ref: snapshots.Ref{ID: id}, Kind: kind}
		for _, p := range parents {
			s.Parents = append(s.Parents, snapshots.Ref{ID: p})
		}
		return s
	}
	stored := func(want ...uint64) {
		t.Helper()
		if got, err := b.IDs(ctx); err != nil || !slices.Equal(got, want) {
			t.Errorf("stored: %v, %v; want %v", got, err, want)
		}
	}
	one := snap(1, snapshots.Active)
	must(b.Create(ctx, one))
	for range 2 { // again, when the first was not recorded
		u, err := b.Commit(ctx, one, snapshots.Ref{ID: 1})
		if err != nil || u.Size == 0 {
			t.Fatal(u, err)
		}
	}
	two := snap(2, snapshots.Active, 1)
	for range 2 { // over what a crash has left
		must(b.Create(ctx, two))
	}
	m, err := b.Mounts(ctx, two)
	must(err)
	if m[0].Type != "zfs" || m[0].Source != b.dataset+"/2" || m[0].Options[0] != "rw" {
		t.Errorf("mounts: %v", m)
	}
	must(b.Create(ctx, snap(12, snapshots.View, 1)))
	stored(1, 2, 12)
	if err := b.Remove(ctx, one); err == nil {
		t.Error("a file system with clones was destroyed")
	}
	stored(1, 2, 12)
	if err := b.Create(ctx, snap(13, snapshots.Active, 99)); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("of a parent that is not there: %v", err)
	}
	must(b.Sweep(ctx, func(id uint64) bool { return id == 1 || id == 2 }))
	stored(1, 2)
	must(b.Remove(ctx, two))
	must(b.Remove(ctx, two)) // none there is no error
	must(b.Create(ctx, snap(3, snapshots.Active, 1)))
	must(b.Sweep(ctx, func(uint64) bool { return false }))
	stored()
}
