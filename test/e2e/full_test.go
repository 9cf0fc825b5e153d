package e2e

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/api/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/managerd/managerd/manager/snapshots/snapshottest"
	"github.com/managerd/managerd/shimapi/mount"
	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/image"
	"github.com/managerd/managerd/test/regproxy"
)

// disk is a file system of its own below the root of a daemon.
type disk struct {
	t  *testing.T
	at string
}

// onDisk gives a daemon whose directory below the root is a small ext4.
func onDisk(t *testing.T, below string, size int64) (*user, *disk) {
	t.Helper()
	u := &user{Daemon: harness.Test(t, bin), t: t}
	if err := u.Stop(); err != nil {
		t.Fatal(err)
	}
	d := &disk{t, filepath.Join(u.Root(), below)}
	dir := t.TempDir()
	file := filepath.Join(dir, "ext4")
	snapshottest.Image(t, file, "ext4", size, "-q", "-F", "-m", "0")
	if err := os.RemoveAll(d.at); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(d.at, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := mount.Mount([]*types.Mount{{Type: "ext4", Source: file, Options: []string{"loop"}}}, d.at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := u.Stop(); err != nil {
			t.Error(err)
		}
		if err := mount.Unmount(d.at); err != nil {
			t.Error(err)
		}
		snapshottest.NoLoops(t, dir)
	})
	if err := u.Start(); err != nil {
		t.Fatal(err)
	}
	return u, d
}

// free is how many bytes there are.
func (d *disk) free() int64 {
	d.t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs(d.at, &fs); err != nil {
		d.t.Fatal(err)
	}
	return int64(fs.Bavail) * fs.Bsize
}

// fill leaves room for so many bytes, until empty.
func (d *disk) fill(room int64) {
	d.t.Helper()
	f, err := os.Create(filepath.Join(d.at, "filler"))
	if err != nil {
		d.t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	var at int64
	for step := d.free() - room; step >= 4096; step /= 2 { // the file system takes some for itself
		for d.free()-room > step && unix.Fallocate(int(f.Fd()), 0, at, step) == nil {
			at += step
		}
	}
	if err := f.Sync(); err != nil {
		d.t.Fatal(err)
	}
}

func (d *disk) empty() {
	d.t.Helper()
	if err := os.Remove(filepath.Join(d.at, "filler")); err != nil {
		d.t.Fatal(err)
	}
}

// noisy is an image with a file of so many bytes that nothing packs.
func noisy(t *testing.T, name string, size int) []byte {
	t.Helper()
	body := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(body)
	var b bytes.Buffer
	if err := image.WriteTo(&b, image.Options{Name: name, Compression: image.Gzip, Layers: [][]image.File{
		{{Name: "small", Body: "x", Mode: 0o644}}, {{Name: "data", Body: string(body), Mode: 0o644}}, {{Name: "last", Body: "y", Mode: 0o644}},
	}}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestFullDisk: when the disk of the content or of the snapshots is full, what needs it fails and says which directory
// that is; nothing of it stays, the room is given back, and with some more the same works.
func TestFullDisk(t *testing.T) {
	const size = 8 << 20
	registry := regproxy.Start(t, regproxy.Options{})
	pulled := makeNoise(t, registry.URL(), "full", 9, 10_000, size, 10_000)
	pulled.ref = registry.Addr + "/full:latest"
	file := filepath.Join(t.TempDir(), "noisy.tar")
	if err := os.WriteFile(file, noisy(t, "example.org/noisy:1", size), 0o600); err != nil {
		t.Fatal(err)
	}
	const name = "example.org/noisy:1"
	imports := []string{"images", "import", "--no-unpack", file}
	for _, c := range []struct {
		disk string // below the root
		name string
		made [][]string // what is done before the disk is full
		run  []string
		left bool // the disk has what was there before, and no more
	}{
		{"io.containerd.content.v1.content", "import", nil, []string{"images", "import", file}, true},
		{"io.containerd.content.v1.content", "pull", nil, []string{"images", "pull", "--plain-http", pulled.ref}, true},
		{"io.containerd.content.v1.content", "diff", [][]string{{"images", "import", file}, {"snapshots", "prepare", "changed", "TOP"}, {"WRITE", "changed"}},
			[]string{"snapshots", "diff", "--keep", "--media-type", "application/vnd.oci.image.layer.v1.tar", "-o", "json", "changed"}, true},
		{"io.containerd.content.v1.content", "convert", [][]string{imports}, []string{"images", "convert", "--uncompress", name, "example.org/plain:1"}, true},
		{"io.containerd.content.v1.content", "ingest", nil, []string{"content", "ingest", "begun"}, true},
		{"io.containerd.snapshotter.v1.overlayfs", "import", nil, []string{"images", "import", file}, false},
		{"io.containerd.snapshotter.v1.overlayfs", "pull", nil, []string{"images", "pull", "--plain-http", pulled.ref}, true},
		{"io.containerd.snapshotter.v1.overlayfs", "unpack", [][]string{imports}, []string{"snapshots", "unpack", name}, false},
		{"exports", "export", [][]string{imports}, []string{"images", "export", "EXPORT", name}, true},
	} {
		t.Run(c.name+" on "+c.disk, func(t *testing.T) {
			u, d := onDisk(t, c.disk, 64<<20)
			run := func(args []string) (string, error) {
				args = append([]string(nil), args...)
				for i, a := range args {
					switch a {
					case "TOP":
						args[i] = strings.TrimSpace(u.mctl("snapshots", "unpack", name))
					case "EXPORT":
						args[i] = filepath.Join(d.at, "exported.tar")
					}
				}
				if args[0] == "WRITE" {
					return "", u.overwrite(args[1], size)
				}
				cmd := u.Mctl(args...)
				if c.name == "ingest" {
					f, err := os.Open(file)
					if err != nil {
						return "", err
					}
					defer func() { _ = f.Close() }()
					cmd.Stdin = f
				}
				return harness.Output(cmd)
			}
			for _, args := range c.made {
				if out, err := run(args); err != nil {
					t.Fatal(err, out)
				}
			}
			state := func() string {
				return u.mctl("images", "ls", "-q") + u.mctl("content", "ls", "-q") + u.mctl("content", "active") + u.mctl("snapshots", "ls") + u.mctl("leases", "ls", "-q")
			}
			u.mctl("content", "prune")
			before := state()
			d.fill(1 << 20)
			room := d.free()
			_, err := run(c.run)
			if err == nil {
				t.Fatalf("it has room enough in %d bytes", room)
			}
			has(t, err.Error(), "no space left on device", d.at)
			if c.name == "import" && !c.left {
				u.mctl("images", "rm", name) // import makes the image, and says so, before it unpacks it
			}
			if c.left {
				until(t, "what was begun is gone", func() bool { return state() == before })
			}
			until(t, "the room is given back", func() bool { return d.free() >= room-256<<10 })
			d.empty()
			if _, err := run(c.run); err != nil {
				t.Errorf("with room again: %v", err)
			}
			if c.name == "pull" {
				pulled.whole(t, u.Daemon)
			}
			if c.name == "import" || c.name == "unpack" {
				top := strings.TrimSpace(u.mctl("snapshots", "unpack", name))
				u.mctl("snapshots", "prepare", "look", top)
				u.inside("look", func(root string) error {
					st, err := os.Stat(filepath.Join(root, "data"))
					if err == nil && st.Size() != size {
						err = fmt.Errorf("it has %d bytes", st.Size())
					}
					return err
				})
			}
		})
	}
}

// inside mounts a snapshot for the time of fn.
func (u *user) inside(key string, fn func(root string) error) {
	u.t.Helper()
	c := newClient(u.t, u.Daemon)
	m, err := c.mounts(key)
	if err == nil {
		err = mount.WithTemp(m, fn)
	}
	if err != nil {
		u.t.Error(err)
	}
}

// overwrite writes a file into a snapshot that no compression makes smaller.
func (u *user) overwrite(key string, size int) error {
	u.inside(key, func(root string) error {
		body := make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte{4}).Read(body)
		return os.WriteFile(filepath.Join(root, "own"), body, 0o644)
	})
	return nil
}

// TestFullMetadata: when the disk of the database is full, what would make it larger is refused and says so. What is there
// can be read and removed, containers run on, a daemon starts on it, and with room all is as ever.
func TestFullMetadata(t *testing.T) {
	u, d := onDisk(t, ".", 64<<20)
	u.ctr("images", "import", archive)
	c := newClient(t, u.Daemon)
	if _, err := c.run("box", "sleep 1000"); err != nil {
		t.Fatal(err)
	}
	defer c.finish(t, "box")
	leases := leasesapi.NewLeasesClient(c.conn)
	made := 0
	grow := func() error {
		_, err := leases.Create(c.ctx, &leasesapi.CreateRequest{ID: fmt.Sprint("filler", made), Labels: map[string]string{"l": strings.Repeat("x", 4000)}})
		if err == nil {
			made++
		}
		return err
	}
	d.fill(0)
	var err error
	for range 20_000 {
		if err = grow(); err != nil {
			break
		}
	}
	fails(t, "a change that has no room", err, codes.ResourceExhausted, "no space left on device", filepath.Join(d.at, "metadata.db"))
	has(t, u.mctl("images", "ls", "-q"), ref)
	if p, err := c.state("box", ""); err != nil || p.Status.String() != "RUNNING" {
		t.Errorf("the container: %v, %v", p, err)
	}
	if _, err := leases.Delete(c.ctx, &leasesapi.DeleteRequest{ID: "filler0"}); err != nil {
		t.Errorf("what is there cannot be removed: %v", err)
	}
	if err := u.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := u.Start(); err != nil {
		t.Fatalf("it does not start on a full disk: %v", err)
	}
	has(t, u.mctl("images", "ls", "-q"), ref)
	if p, err := c.state("box", ""); err != nil || p.Status.String() != "RUNNING" {
		t.Errorf("the container, after a start: %v, %v", p, err)
	}
	d.empty()
	if err := grow(); err != nil {
		t.Errorf("with room again: %v", err)
	}
	list, err := leases.List(c.ctx, &leasesapi.ListRequest{Filters: []string{"id~=^filler"}})
	if err != nil || len(list.Leases) != made-1 {
		t.Errorf("%d leases of %d are there, %v", len(list.GetLeases()), made-1, err)
	}
}
