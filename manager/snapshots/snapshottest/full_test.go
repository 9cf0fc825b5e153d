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
	for _, c := range chosen() {
		if c.Foreign { // the disk is another program's
			continue
		}
		t.Run(c.Name, func(t *testing.T) {
			on := diskOf(t, c)
			e, _ := snapshottest.Open(t, t.TempDir(), func(string) (snapshots.Backend, error) { return c.Open(on.root) }) // the database is elsewhere
			l := layers{e, b}
			l.make("", "parent", l.unpack(parent))
			child := func() error {
				m, err := l.S.Prepare(l.Ctx, "active", "parent", nil)
				if err == nil {
					_, err = diff.Apply(l.Ctx, b, layer, m, diff.ApplyOptions{Sync: true})
				}
				if err == nil {
					err = l.S.Commit(l.Ctx, "child", "active", nil)
				}
				if err != nil && !strings.Contains(err.Error(), on.name) {
					t.Errorf("the error does not say where: %v", err)
				}
				return err
			}
			stored := func() []string {
				t.Helper()
				l.Must(l.S.Cleanup(l.Ctx))
				list, err := c.Stored(on.root)
				l.Must(err)
				return list
			}
			before := stored()
			for _, room := range []int64{1 << 20, size + 4<<20} { // for nothing; for a layer, but not for an image of it beside it
				empty := on.fill(room)
				had := on.free()
				err := child()
				if err == nil {
					if room < size {
						t.Errorf("%d bytes are room enough", room)
					}
					l.Must(l.S.Remove(l.Ctx, "child"))
				} else {
					t.Logf("with room for %d bytes: %v", room, err)
					if !errors.Is(err, unix.ENOSPC) && !errdefs.IsResourceExhausted(err) {
						t.Errorf("with room for %d bytes: %v", room, err)
					}
					if err := l.S.Remove(l.Ctx, "active"); err != nil && !errdefs.IsNotFound(err) {
						t.Error(err)
					}
				}
				if after := stored(); !slices.Equal(after, before) {
					t.Errorf("with room for %d bytes: stored are %v, before %v", room, after, before)
				}
				for deadline := time.Now().Add(time.Minute); on.free() < had-1<<20; time.Sleep(10 * time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatalf("of %d bytes %d are left", had, on.free())
					}
				}
				empty()
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
