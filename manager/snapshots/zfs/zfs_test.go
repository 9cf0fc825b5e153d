package zfs

import (
	"bufio"
	"context"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
)

func TestLeftOut(t *testing.T) {
	if _, err := New(t.TempDir()); !errors.Is(err, errdefs.ErrNotImplemented) || !strings.Contains(err.Error(), "zfs") {
		t.Errorf("error: %v", err)
	}
}

// TestStorage: file systems come and go as the store asks, over what a crash has left, too.
func TestStorage(t *testing.T) {
	_, dir := snapshottest.Zpool(t, 256<<20)
	b, err := New(filepath.Join(dir, "root"))
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
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
	must(b.Note(12, []byte("twelve")))
	noted := map[uint64]string{}
	must(b.Notes(func(id uint64, note []byte) error { noted[id] = string(note); return nil }))
	if !maps.Equal(noted, map[uint64]string{1: "", 2: "", 12: "twelve"}) {
		t.Errorf("notes: %v", noted)
	}
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
	if left, err := os.ReadDir(filepath.Join(dir, "root", "notes")); err != nil || len(left) > 0 {
		t.Errorf("notes: %v, %v", left, err)
	}
}

// TestBusy: a file system that somebody has mounted in a mount namespace of his own is not destroyed; a removal waits for a
// moment, for the kernel to be done with one that has just ended.
func TestBusy(t *testing.T) {
	_, dir := snapshottest.Zpool(t, 256<<20)
	b, err := New(filepath.Join(dir, "root"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, s := context.Background(), snapshots.Snapshot{Ref: snapshots.Ref{ID: 1}, Kind: snapshots.Active}
	if err := b.Create(ctx, s); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "-m", "sh", "-c", `mount -t zfs "$0" "$1" && echo mounted && read line`, b.name(1), t.TempDir())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(line, err)
	}
	if err := b.Remove(ctx, s); !errors.Is(err, unix.EBUSY) {
		t.Errorf("mounted: %v", err)
	}
	_ = in.Close()
	if err := b.Remove(ctx, s); err != nil {
		t.Errorf("just ended: %v", err)
	}
	_ = cmd.Wait() // its status is that of read
}
