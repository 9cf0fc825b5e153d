package snapshottest_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots/blockfile"
	"github.com/managerd/managerd/manager/snapshots/btrfs"
	"github.com/managerd/managerd/manager/snapshots/devmapper"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
	"github.com/managerd/managerd/manager/snapshots/zfs"
)

// disk is what the storage of a snapshotter fills.
type disk struct {
	root string // of the snapshotter
	name string // is in the error of whoever finds it full
	free func() int64
	// fill leaves it that many bytes, until empty is called.
	fill func(room int64) (empty func())
}

func diskOf(t *testing.T, c snapshottest.Column) disk {
	switch c.Name {
	case devmapper.Name:
		return thinDisk(t)
	case zfs.Name:
		return zfsDisk(t)
	}
	return fsDisk(t, c)
}

// fsDisk is a file system with the root on it.
func fsDisk(t *testing.T, c snapshottest.Column) disk {
	fstype := "ext4"
	if c.Name == btrfs.Name {
		fstype = "btrfs"
	}
	if c.Setup != nil {
		_ = c.Dir(t) // it skips where the machine cannot
	}
	options := []string{"-q"}
	if fstype == "ext4" {
		options = append(options, "-m", "0")
	}
	dir := snapshottest.On(t, fstype, 256<<20, options...)
	if c.Name == btrfs.Name { // which gives back what was deleted with one of its next commits
		if err := unix.Mount("", filepath.Dir(dir), "", unix.MS_REMOUNT, "commit=1"); err != nil {
			t.Fatal(err)
		}
	}
	if c.Name == blockfile.Name {
		snapshottest.Image(t, filepath.Join(dir, "scratch"), "ext4", 32<<20, "-q", "-F")
	}
	if c.Keeps {
		snapshottest.Unmounted(t, dir)
	}
	return disk{
		root: filepath.Join(dir, "root"), name: filepath.Dir(dir),
		free: func() int64 { return free(t, dir) },
		fill: func(room int64) (empty func()) {
			fill(t, dir, room)
			return func() {
				if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
					t.Fatal(err)
				}
			}
		},
	}
}

// free is how many bytes a file system has.
func free(t *testing.T, dir string) int64 {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	var fs unix.Statfs_t
	if err := errors.Join(unix.Syncfs(int(d.Fd())), unix.Fstatfs(int(d.Fd()), &fs)); err != nil {
		t.Fatal(err)
	}
	return int64(fs.Bavail) * fs.Bsize
}

// fill leaves a file system that many bytes.
func fill(t *testing.T, dir string, room int64) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	var at int64
	for step := free(t, dir) - room; step >= 64<<10; step /= 2 { // the file system takes some for itself
		for free(t, dir)-room > step && unix.Fallocate(int(f.Fd()), 0, at, step) == nil {
			at += step
		}
	}
}

// thinDisk is a thin pool; another device fills it, whose number is not one of ours.
func thinDisk(t *testing.T) disk {
	dir := pooled(t, 128<<20)
	pool, err := os.ReadFile(filepath.Join(dir, "pool"))
	if err != nil {
		t.Fatal(err)
	}
	const block = 64 << 10
	name, filler := string(pool), string(pool)+"-filler"
	free := func() int64 {
		t.Helper()
		f := strings.Fields(snapshottest.Command(t, "dmsetup", "status", name)) // 0 SECTORS thin-pool TRANSACTION METADATA DATA
		if len(f) < 6 {
			t.Fatalf("status of the pool: %q", f)
		}
		used, total, _ := strings.Cut(f[5], "/")
		u, uerr := strconv.ParseInt(used, 10, 64)
		n, nerr := strconv.ParseInt(total, 10, 64)
		if err := errors.Join(uerr, nerr); err != nil {
			t.Fatal(err)
		}
		return (n - u) * block
	}
	return disk{root: filepath.Join(dir, "root"), name: name, free: free, fill: func(room int64) (empty func()) {
		blocks := (free() - room) / block
		snapshottest.Command(t, "dmsetup", "message", name, "0", "create_thin 1")
		snapshottest.Command(t, "dmsetup", "create", filler, "--table", fmt.Sprintf("0 %d thin /dev/mapper/%s 1", blocks*block/512, name))
		f, err := os.OpenFile("/dev/mapper/"+filler, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		for i := range blocks {
			if _, err := f.WriteAt(make([]byte, 4096), i*block); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
		return func() {
			snapshottest.Command(t, "dmsetup", "remove", "--retry", filler)
			snapshottest.Command(t, "dmsetup", "message", name, "0", "delete 1")
		}
	}}
}

// zfsDisk is a pool of ZFS, of which a dataset is promised all but the room.
func zfsDisk(t *testing.T) disk {
	dataset, dir := snapshottest.Zpool(t, 512<<20)
	free := func() int64 {
		t.Helper()
		snapshottest.Command(t, "zpool", "sync", dataset)
		n, err := strconv.ParseInt(snapshottest.Command(t, "zfs", "get", "-Hp", "-o", "value", "available", dataset), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return disk{root: filepath.Join(dir, "root"), name: dataset, free: free, fill: func(room int64) (empty func()) {
		filler := dataset + "/filler"
		snapshottest.Command(t, "zfs", "create", "-o", "mountpoint=none", "-o", fmt.Sprint("refreservation=", free()-room), filler)
		return func() { snapshottest.Command(t, "zfs", "destroy", filler) }
	}}
}
