package snapshottest_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/blockfile"
	"github.com/managerd/managerd/manager/snapshots/btrfs"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
)

// TestFull: on a disk that is full a snapshot, the layer in it or its commit fails and says so; what was made is gone with
// the snapshot, and with room all of it works.
func TestFull(t *testing.T) {
	const size = 8 << 20
	b := &blobs{data: map[digest.Digest][]byte{}}
	noise := func(name string, seed byte) []byte {
		var out bytes.Buffer
		w := tar.NewWriter(&out)
		body := make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte{seed}).Read(body)
		err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: size})
		if _, werr := w.Write(body); errors.Join(err, werr, w.Close()) != nil {
			t.Fatal(err, werr)
		}
		return out.Bytes()
	}
	parent, layer := b.add(noise("parent", 1)), b.add(noise("child", 2))
	for _, c := range columns {
		if c.Where != "" || c.Foreign {
			continue
		}
		t.Run(c.Name, func(t *testing.T) {
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
			root := filepath.Join(dir, "root")
			e, _ := snapshottest.Open(t, t.TempDir(), func(string) (snapshots.Backend, error) { return c.Open(root) }) // the database is elsewhere
			l := layers{e, b}
			l.make("", "parent", l.unpack(parent))
			child := func() error {
				m, err := l.S.Prepare(l.Ctx, "active", "parent", nil)
				if err == nil {
					_, err = diff.Apply(l.Ctx, b, layer, m, diff.ApplyOptions{Sync: true})
					if err != nil && !strings.Contains(err.Error(), filepath.Dir(dir)) {
						t.Errorf("the error does not say where: %v", err)
					}
				}
				if err == nil {
					err = l.S.Commit(l.Ctx, "child", "active", nil)
				}
				return err
			}
			stored := func() []string {
				t.Helper()
				l.Must(l.S.Cleanup(l.Ctx))
				list, err := c.Stored(root)
				l.Must(err)
				return list
			}
			before := stored()
			for _, room := range []int64{1 << 20, size + 4<<20} { // for nothing; for a layer, but not for an image of it beside it
				fill(t, dir, room)
				had := free(t, dir)
				err := child()
				if err == nil {
					if room < size {
						t.Errorf("%d bytes are room enough", room)
					}
					l.Must(l.S.Remove(l.Ctx, "child"))
				} else {
					if !errors.Is(err, unix.ENOSPC) {
						t.Errorf("with room for %d bytes: %v", room, err)
					}
					if err := l.S.Remove(l.Ctx, "active"); err != nil && !errdefs.IsNotFound(err) {
						t.Error(err)
					}
				}
				if after := stored(); !slices.Equal(after, before) {
					t.Errorf("with room for %d bytes: stored are %v, before %v", room, after, before)
				}
				for deadline := time.Now().Add(time.Minute); free(t, dir) < had-1<<20; time.Sleep(10 * time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatalf("of %d bytes %d are left", had, free(t, dir))
					}
				}
				l.Must(os.Remove(filepath.Join(dir, "filler")))
			}
			l.Must(child())
			l.On(l.view("child"), func(root string) {
				for _, name := range []string{"parent", "child"} {
					if st, err := os.Stat(filepath.Join(root, name)); err != nil || st.Size() != size {
						t.Errorf("%s: %v, %v", name, st, err)
					}
				}
			})
		})
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
