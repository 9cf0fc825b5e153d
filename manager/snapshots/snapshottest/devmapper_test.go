package snapshottest_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/devmapper"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
)

var thin = snapshottest.Column{
	Name: devmapper.Name, Stored: entries, Blocks: true, Where: "in the VM",
	Open: func(root string) (snapshots.Backend, error) {
		pool, err := os.ReadFile(filepath.Join(filepath.Dir(root), "pool"))
		if err != nil {
			return nil, err
		}
		return devmapper.New(root, devmapper.Options{Pool: string(pool), BaseSize: 64 << 20, FSType: "ext4", Discard: true})
	},
	Setup: func(t *testing.T) string { return pooled(t, 1<<30) },
}

// pooled is a directory that belongs to a thin pool.
func pooled(t *testing.T, size int64) string {
	if err := devmapper.Supported(); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "pool"), []byte(snapshottest.ThinPool(t, size)), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestDevmapper(t *testing.T) { snapshottest.Run(t, thin) }

func TestDevmapperCrash(t *testing.T) {
	if err := devmapper.Supported(); err != nil {
		t.Skip(err)
	}
	crashes(t, thin, mortal(t))
}

// TestDevmapperFull: a pool without a free block says so and takes no snapshot, and takes one again when it has some.
func TestDevmapperFull(t *testing.T) {
	dir := pooled(t, 32<<20)
	e, _ := snapshottest.Open(t, dir, thin.Open)
	m, err := e.S.Prepare(e.Ctx, "big", "", nil)
	e.Must(err)
	e.On(m, func(root string) {
		for i := 0; ; i++ {
			f, err := os.Create(filepath.Join(root, fmt.Sprint("f", i)))
			if err != nil {
				break
			}
			_, werr := f.Write(make([]byte, 1<<20))
			if err := errors.Join(werr, f.Sync(), f.Close()); err != nil {
				break
			}
			if i > 64 {
				t.Fatal("32 MiB do not become full")
			}
		}
	})
	_, err = e.S.Prepare(e.Ctx, "more", "", nil)
	e.Is(err, errdefs.ErrResourceExhausted)
	if err == nil || !strings.Contains(err.Error(), "is full") {
		t.Errorf("error: %v", err)
	}
	if left, err := thin.Stored(e.Root); err != nil || len(left) != 1 {
		t.Errorf("stored: %v, %v", left, err)
	}
	e.Must(e.S.Remove(e.Ctx, "big"))
	_, err = e.S.Prepare(e.Ctx, "more", "", nil)
	e.Must(err)
}

// TestDevmapperReboot: a device that nobody has made seen since the boot is, when somebody asks for its mounts.
func TestDevmapperReboot(t *testing.T) {
	dir := pooled(t, 256<<20)
	e, stop := snapshottest.Open(t, dir, thin.Open)
	e.Prepare("a", "", func(root string) { e.Must(os.WriteFile(filepath.Join(root, "f"), []byte("1"), 0o644)) })
	m, err := e.S.Prepare(e.Ctx, "k", "a", nil)
	e.Must(err)
	stop()
	if out, err := exec.Command("dmsetup", "remove", "--retry", m[0].Source).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	e, _ = snapshottest.Open(t, dir, thin.Open)
	m, err = e.S.Mounts(e.Ctx, "k")
	e.Must(err)
	e.On(m, func(root string) {
		if b, err := os.ReadFile(filepath.Join(root, "f")); err != nil || string(b) != "1" {
			t.Errorf("%q, %v", b, err)
		}
	})
}
