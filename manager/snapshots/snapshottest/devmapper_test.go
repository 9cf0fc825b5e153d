package snapshottest_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/devmapper"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
	"github.com/managerd/managerd/shimapi/mount"
)

var thin = snapshottest.Column{
	Name: devmapper.Name, Stored: entries, Blocks: true, Where: "in the VM",
	Open:  func(root string) (snapshots.Backend, error) { return openThin(root, false) },
	Setup: func(t *testing.T) string { return pooled(t, 1<<30) },
}

func openThin(root string, async bool) (snapshots.Backend, error) {
	pool, err := os.ReadFile(filepath.Join(filepath.Dir(root), "pool"))
	if err != nil {
		return nil, err
	}
	return devmapper.New(root, devmapper.Options{Pool: string(pool), BaseSize: 64 << 20, FSType: "ext4", Discard: true, AsyncRemove: async})
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

// mounted mounts a snapshot for the time of the test.
func mounted(e *snapshottest.Env, m []*types.Mount) (at string) {
	e.T.Helper()
	at = e.T.TempDir()
	e.Must(mount.Mount(m, at))
	e.T.Cleanup(func() { e.Must(mount.Unmount(at)) })
	return at
}

// TestDevmapperAsync: a removal is answered when the record is gone. A device that is mounted then stays, and goes with a
// later cleanup; what the end of a daemon leaves the next one takes away.
func TestDevmapperAsync(t *testing.T) {
	dir := pooled(t, 256<<20)
	open := func(root string) (snapshots.Backend, error) { return openThin(root, true) }
	e, stop := snapshottest.Open(t, dir, open)
	e.Prepare("a", "", func(string) {})
	m, err := e.S.Prepare(e.Ctx, "k", "a", nil)
	e.Must(err)
	at := mounted(e, m)
	e.Must(e.S.Remove(e.Ctx, "k"))
	_, err = e.S.Stat(e.Ctx, "k")
	e.Is(err, errdefs.ErrNotFound)
	if err := e.S.Cleanup(e.Ctx); err == nil || !strings.Contains(err.Error(), "it may be mounted") {
		t.Errorf("cleanup beside a mount: %v", err)
	}
	e.Must(os.WriteFile(filepath.Join(at, "f"), []byte("1"), 0o644))
	e.Must(mount.Unmount(at))
	e.Must(e.S.Cleanup(e.Ctx))
	if left, err := thin.Stored(e.Root); err != nil || len(left) != 1 {
		t.Errorf("stored: %v, %v", left, err)
	}
	e.Must(e.S.Remove(e.Ctx, "a"))
	stop()
	e, _ = snapshottest.Open(t, dir, open)
	e.Must(e.S.Cleanup(e.Ctx))
	if left, err := thin.Stored(e.Root); err != nil || len(left) > 0 {
		t.Errorf("stored: %v, %v", left, err)
	}
}

// suspended is where TestDevmapperSuspended kills a daemon.
const suspended = "devmapper.create.suspended"

// TestDevmapperSuspended: a device that is mounted while a snapshot of it is made is suspended for a moment. When the daemon
// is killed in that, the next one resumes it; one that is suspended later is found, and mended.
func TestDevmapperSuspended(t *testing.T) {
	dir, self := pooled(t, 256<<20), mortal(t)
	e, stop := snapshottest.Open(t, dir, thin.Open)
	m, err := e.S.Prepare(e.Ctx, "a-active", "", nil)
	e.Must(err)
	at := mounted(e, m)
	device := m[0].Source
	t.Cleanup(func() { snapshottest.Command(t, "dmsetup", "resume", device) }) // else nothing ends that writes
	e.Must(os.WriteFile(filepath.Join(at, "f"), []byte("1"), 0o644))
	e.Must(e.S.Commit(e.Ctx, "a", "a-active", nil))
	stop()
	is := func(state string) {
		t.Helper()
		if out := snapshottest.Command(t, "dmsetup", "info", device); !strings.Contains(out, state) {
			t.Fatalf("not %s: %s", state, out)
		}
	}
	is("ACTIVE")

	armory := t.TempDir()
	e.Must(os.WriteFile(filepath.Join(armory, suspended), nil, 0o600))
	cmd := exec.Command(self, "-test.run", "^TestSuspend$")
	cmd.Env = append(os.Environ(), storyEnv+"="+suspended, storyDir+"="+dir, armoryEnv+"="+armory)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("it was not killed: %v\n%s", err, out)
	}
	is("SUSPENDED")

	e, _ = snapshottest.Open(t, dir, thin.Open)
	is("ACTIVE")
	e.Must(os.WriteFile(filepath.Join(at, "g"), []byte("2"), 0o644))
	m, err = e.S.Prepare(e.Ctx, "k", "a", nil)
	e.Must(err)
	is("ACTIVE")
	e.On(m, func(root string) {
		for name, want := range map[string]string{"f": "1", "g": "2"} {
			if b, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(b) != want {
				t.Errorf("%s is %q, %v", name, b, err)
			}
		}
	})

	snapshottest.Command(t, "dmsetup", "suspend", device)
	found, err := e.Store.Broken(snapshottest.Name)
	e.Must(err)
	if len(found) != 1 || found[0].Key != "a" || found[0].Namespace != "one" || !strings.Contains(found[0].Problem, filepath.Base(device)+" is suspended") {
		t.Fatalf("%+v", found)
	}
	e.Must(e.Store.Mend(snapshottest.Name, found[0].ID))
	is("ACTIVE")
	if found, err := e.Store.Broken(snapshottest.Name); err != nil || len(found) > 0 {
		t.Errorf("%+v, %v", found, err)
	}
}

// TestSuspend is the process that TestDevmapperSuspended kills.
func TestSuspend(t *testing.T) {
	if os.Getenv(storyEnv) != suspended {
		t.Skip("this is a part of TestDevmapperSuspended")
	}
	e, _ := snapshottest.Open(t, os.Getenv(storyDir), thin.Open)
	_, err := e.S.Prepare(e.Ctx, "k", "a", nil)
	t.Fatalf("it lives: %v", err)
}
