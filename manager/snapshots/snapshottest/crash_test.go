package snapshottest_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
	"github.com/managerd/managerd/shimapi/mount"
)

const (
	storyEnv  = "SNAPSHOTTEST_STORY" // the column whose story this process is to live
	storyDir  = "SNAPSHOTTEST_DIR"   // and where
	armoryEnv = "MANAGERD_FAILPOINTS"
)

// points are the failpoints of the store, and of one snapshotter; that they are hit says that none is missing here.
var points = map[string][]string{
	"":          {"snapshots.prepare.made", "snapshots.prepare.recorded", "snapshots.commit.stored", "snapshots.commit.recorded", "snapshots.remove.recorded", "snapshots.remove.freed"},
	"btrfs":     {"btrfs.commit.frozen"},
	"blockfile": {"blockfile.create.copied"},
	"devmapper": {"devmapper.create.noted", "devmapper.create.made", "devmapper.create.formatted", "devmapper.commit.deactivated", "devmapper.delete.deleted"},
	"zfs":       {"zfs.commit.frozen"},
	"erofs":     {"erofs.commit.made", "erofs.commit.placed", "erofs.mount.spent"},
	"-":         {suspended}, // TestDevmapperSuspended goes through it
}

// TestPoints: every failpoint below manager/snapshots is one that TestCrash goes through.
func TestPoints(t *testing.T) {
	var known, found []string
	for _, p := range points {
		known = append(known, p...)
	}
	err := filepath.WalkDir("..", func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		src, err := os.ReadFile(path)
		for _, rest := range strings.Split(string(src), `failpoint.Hit("`)[1:] {
			name, _, _ := strings.Cut(rest, `"`)
			found = append(found, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(known)
	slices.Sort(found)
	if !slices.Equal(known, found) {
		t.Errorf("failpoints: %q, known: %q", found, known)
	}
}

// TestCrash kills a process at every failpoint in the middle of making, committing and removing snapshots. The next one
// finds each of them whole or not at all, goes on, and leaves nothing.
func TestCrash(t *testing.T) {
	self := mortal(t)
	for _, c := range chosen() {
		t.Run(c.Name, func(t *testing.T) { crashes(t, c, self) })
	}
}

func crashes(t *testing.T, c snapshottest.Column, self string) {
	all := slices.Concat(points[""], points[c.Name])
	if testing.Short() {
		all = points[c.Name]
	}
	for _, point := range all {
		t.Run(point, func(t *testing.T) {
			dir, armory, temp := c.Dir(t), t.TempDir(), t.TempDir()
			armed := filepath.Join(armory, point)
			if err := os.WriteFile(armed, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			live := func() ([]byte, error) {
				cmd := exec.Command(self, "-test.run", "^TestStory$", "-test.v")
				cmd.Env = append(os.Environ(), storyEnv+"="+c.Name, storyDir+"="+dir, armoryEnv+"="+armory, "TMPDIR="+temp)
				return cmd.CombinedOutput()
			}
			out, err := live()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("it was not killed: %v\n%s", err, out)
			}
			if _, err := os.Stat(armed + ".hit"); err != nil {
				t.Fatal(err)
			}
			if out, err := live(); err != nil {
				t.Fatalf("after that: %v\n%s", err, out)
			}
		})
	}
}

// mortal gives this test's binary with failpoints in it.
func mortal(t *testing.T) string {
	t.Helper()
	if crashable {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		return self
	}
	path := filepath.Join(t.TempDir(), "mortal.test")
	if out, err := exec.Command("go", "test", "-c", "-tags", "failpoints", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("cannot build the test with failpoints: %v\n%s", err, out)
	}
	return path
}

// TestStory is what a life of TestCrash does. It begins by looking at what the life before has left.
func TestStory(t *testing.T) {
	name := os.Getenv(storyEnv)
	if name == "" {
		t.Skip("this is a part of TestCrash")
	}
	c := columns[slices.IndexFunc(columns, func(c snapshottest.Column) bool { return c.Name == name })]
	e, stop := snapshottest.Open(t, os.Getenv(storyDir), c.Open)
	e.Column = c
	e.Must(e.S.Walk(e.Ctx, filters.Always, func(i snapshots.Info) error { whole(e, i); return nil }))
	// The files of a snapshot, which it and all above it show.
	layer := func(name, parent, file string) {
		if _, err := e.S.Stat(e.Ctx, name); err == nil {
			return
		}
		m, err := e.S.Prepare(e.Ctx, name+"-active", parent, nil)
		if errdefs.IsAlreadyExists(err) {
			m, err = e.S.Mounts(e.Ctx, name+"-active")
		}
		if c.Foreign && errdefs.IsNotFound(err) { // it is committed there, and not here: a client begins anew
			e.Must(e.S.Remove(e.Ctx, name+"-active"))
			m, err = e.S.Prepare(e.Ctx, name+"-active", parent, nil)
		}
		e.Must(err)
		e.On(m, func(root string) { write(e, root, file) })
		e.Must(e.S.Commit(e.Ctx, name, name+"-active", nil))
	}
	layer("a", "", "a")
	layer("b", "a", "b")
	for _, key := range []string{"k", "v"} {
		make := e.S.Prepare
		if key == "v" {
			make = e.S.View
		}
		if _, err := make(e.Ctx, key, "b", nil); err != nil {
			e.Is(err, errdefs.ErrAlreadyExists)
		}
		i, err := e.S.Stat(e.Ctx, key)
		e.Must(err)
		whole(e, i)
	}
	for _, key := range []string{"v", "k", "b", "a"} {
		e.Must(e.S.Remove(e.Ctx, key))
	}
	e.Must(e.S.Cleanup(e.Ctx))
	if left, err := c.Stored(e.Root); err != nil || len(left) > 0 {
		t.Errorf("stored: %v, %v", left, err)
	}
	stop()
}

// whole looks at one snapshot.
func whole(e *snapshottest.Env, i snapshots.Info) {
	want := map[string][]string{"a": {"a"}, "b": {"a", "b"}, "k": {"a", "b"}, "v": {"a", "b"}, "a-active": nil, "b-active": {"a"}}
	files, known := want[i.Name]
	if !known {
		e.T.Fatalf("nobody made %+v", i)
	}
	var m []*types.Mount
	var err error
	if i.Kind == snapshots.Committed {
		m, err = e.S.View(e.Ctx, "look", i.Name, nil)
		defer func() { e.Must(e.S.Remove(e.Ctx, "look")) }()
	} else {
		m, err = e.S.Mounts(e.Ctx, i.Name)
		if e.Column.Foreign && errdefs.IsNotFound(err) {
			return
		}
	}
	e.Must(err)
	_, err = e.S.Usage(e.Ctx, i.Name)
	e.Must(err)
	e.On(m, func(root string) {
		for _, f := range files {
			if b, err := os.ReadFile(filepath.Join(root, f)); err != nil || string(b) != f {
				e.T.Errorf("%s of %s is %q, %v", f, i.Name, b, err)
			}
		}
	})
	if mount.ReadOnly(m[0]) == (i.Kind == snapshots.Active) {
		e.T.Errorf("%s: %v", fmt.Sprint(i), m)
	}
}

// write writes a file and everything else that is not on disk yet: whoever applies a layer does.
func write(e *snapshottest.Env, root, file string) {
	e.Must(os.WriteFile(filepath.Join(root, file), []byte(file), 0o644))
	d, err := os.Open(root)
	e.Must(err)
	e.Must(unix.Syncfs(int(d.Fd())))
	e.Must(d.Close())
}
