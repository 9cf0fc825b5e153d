package snapshottest_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/blockfile"
	"github.com/managerd/managerd/manager/snapshots/btrfs"
	"github.com/managerd/managerd/manager/snapshots/erofs"
	"github.com/managerd/managerd/manager/snapshots/native"
	"github.com/managerd/managerd/manager/snapshots/overlayfs"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
	"github.com/managerd/managerd/manager/snapshots/zfs"
)

// zfsVM is what `make test-vm-zfs` runs.
const zfsVM = "in the VM with ZFS"

// columns are the snapshotters of the table in docs/snapshotters.md.
var columns = []snapshottest.Column{
	{Name: overlayfs.Name, Stored: entries, Open: func(root string) (snapshots.Backend, error) {
		return overlayfs.New(root, overlayfs.Options{})
	}},
	{Name: native.Name, Stored: entries, Open: func(root string) (snapshots.Backend, error) { return native.New(root) }},
	{Name: btrfs.Name, Stored: entries, Open: func(root string) (snapshots.Backend, error) { return btrfs.New(root) },
		Setup: func(t *testing.T) string { return snapshottest.On(t, "btrfs", 1<<30, "-q") }},
	{Name: erofs.Name, Stored: entries, Keeps: true, Repacks: true,
		Open: func(root string) (snapshots.Backend, error) { return erofs.New(root, erofs.Options{}) },
		Setup: func(t *testing.T) string {
			dir := snapshottest.Kept(t)
			if b, err := erofs.New(filepath.Join(dir, "root"), erofs.Options{}); errdefs.IsNotImplemented(err) {
				t.Skip(err)
			} else if err == nil {
				_ = b.Close()
			}
			return dir
		}},
	{Name: blockfile.Name, Stored: entries, Blocks: true,
		Open: func(root string) (snapshots.Backend, error) {
			return blockfile.New(root, blockfile.Options{Scratch: filepath.Join(filepath.Dir(root), "scratch"), FSType: "ext4"})
		},
		Setup: func(t *testing.T) string {
			dir := t.TempDir()
			t.Cleanup(func() { snapshottest.NoLoops(t, dir) })
			snapshottest.Image(t, filepath.Join(dir, "scratch"), "ext4", 32<<20, "-q", "-F")
			return dir
		}},
	thin,
	{Name: zfs.Name, Stored: datasets, Blocks: true, Where: zfsVM,
		Open:  func(root string) (snapshots.Backend, error) { return zfs.New(root) },
		Setup: func(t *testing.T) string { _, dir := snapshottest.Zpool(t, 1<<30); return dir }},
	foreign,
}

// entries is what there is in ROOT/snapshots.
func entries(root string) (out []string, err error) {
	list, err := os.ReadDir(filepath.Join(root, "snapshots"))
	for _, e := range list {
		out = append(out, e.Name())
	}
	return out, err
}

// datasets is what there is below the dataset of a root.
func datasets(root string) (out []string, err error) {
	b, err := zfs.New(root)
	if err != nil {
		return nil, err
	}
	ids, err := b.IDs(context.Background())
	for _, id := range ids {
		out = append(out, fmt.Sprint(id))
	}
	return out, err
}

// columnsEnv names the columns to run, with commas; they must run then. Without it those are run that are run everywhere,
// where the machine can.
const columnsEnv = "SNAPSHOTTEST_COLUMNS"

func chosen() (out []snapshottest.Column) {
	names := os.Getenv(columnsEnv)
	for _, c := range columns {
		if names == "" && c.Where == "" {
			out = append(out, c)
		}
		if slices.Contains(strings.Split(names, ","), c.Name) {
			c.Must = true
			out = append(out, c)
		}
	}
	return out
}

func TestConformance(t *testing.T) {
	for _, c := range chosen() {
		t.Run(c.Name, func(t *testing.T) { snapshottest.Run(t, c) })
	}
}
