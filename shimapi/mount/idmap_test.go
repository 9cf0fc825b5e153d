package mount

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

var mapping = []string{"uidmap=0:100000:1000,1000:200000:10", "gidmap=0:300000:1000"}

// owner gives UID:GID.
func owner(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(st.Uid, ":", st.Gid)
}

// mappable skips where the kernel, or the file system of dir, maps no IDs of mounts.
func mappable(t *testing.T, dir string) {
	t.Helper()
	err := WithTemp([]*types.Mount{{Type: "bind", Source: dir, Options: append([]string{"bind"}, mapping...)}}, func(string) error { return nil })
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		t.Skipf("the IDs of a mount of %s cannot be mapped: %v", dir, err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestMappedOverlay(t *testing.T) {
	for _, how := range []string{"new", "classic"} {
		t.Run(how, func(t *testing.T) {
			t.Setenv("TMPDIR", t.TempDir())
			opts, upper := overlayOptions(t, 110)
			mappable(t, upper)
			lower := filepath.Dir(upper)
			for f, id := range map[string][2]int{"f0": {0, 0}, "f1": {7, 9}, "f2": {1003, 0}} {
				found, err := filepath.Glob(filepath.Join(lower, "*", "*", "*", f))
				if err != nil || len(found) != 1 {
					t.Fatal(found, err)
				}
				if err := os.Chown(found[0], id[0], id[1]); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Chown(upper, 100000, 300000); err != nil {
				t.Fatal(err)
			}
			m := &types.Mount{Type: "overlay", Source: "overlay", Options: append(opts, mapping...)}
			dst := dirs(t, "dst")[0]
			if how == "new" {
				if err := Mount([]*types.Mount{m}, dst); err != nil {
					t.Fatal(err)
				}
			} else {
				o, err := parse(m)
				if err != nil {
					t.Fatal(err)
				}
				if err := classic(m, o, dst); err != nil {
					t.Fatal(err)
				}
			}
			for f, want := range map[string]string{".": "100000:300000", "f0": "100000:300000", "f1": "100007:300009", "f2": "200003:300000", "f109": "100000:300000"} {
				if got := owner(t, filepath.Join(dst, f)); got != want {
					t.Errorf("%s belongs to %s, want %s", f, got, want)
				}
			}
			if err := os.Chmod(filepath.Join(dst, "f1"), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := owner(t, filepath.Join(upper, "f1")); got != "100007:300009" {
				t.Errorf("what was copied up belongs to %s", got)
			}
			if left, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}

func TestMappedBind(t *testing.T) {
	d := dirs(t, "src", "dst")
	mappable(t, d[0])
	write(t, filepath.Join(d[0], "f"), "x")
	m := &types.Mount{Type: "bind", Source: d[0], Options: append([]string{"rbind", "rw"}, mapping...)}
	if err := Mount([]*types.Mount{m}, d[1]); err != nil {
		t.Fatal(err)
	}
	if got := owner(t, filepath.Join(d[1], "f")); got != "100000:300000" {
		t.Errorf("it belongs to %s", got)
	}
	m.Options = append(m.Options, "sync")
	if err := Mount([]*types.Mount{m}, d[1]); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a bind that needs mount(2): %v", err) // it must not come unmapped
	}
}

func TestMappingOptions(t *testing.T) {
	for _, bad := range [][]string{
		{"uidmap=0:1:1"}, {"gidmap=0:1:1"}, {"uidmap=", "gidmap=0:1:1"}, {"uidmap=0:1", "gidmap=0:1:1"}, {"uidmap=0:-1:1", "gidmap=0:1:1"},
		{"uidmap=0:1:0", "gidmap=0:1:1"}, {"uidmap=0:1:4294967296", "gidmap=0:1:1"}, {"uidmap=0:1:1,", "gidmap=0:1:1"},
	} {
		if _, err := parse(&types.Mount{Type: "bind", Source: "/", Options: bad}); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestLoop(t *testing.T) {
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		t.Skip("there is no mkfs.ext4")
	}
	image := filepath.Join(t.TempDir(), "image")
	write(t, image, "")
	if err := os.Truncate(image, 16<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, "-q", "-F", image).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	m := func(mode string) []*types.Mount {
		return []*types.Mount{{Type: "ext4", Source: image, Options: []string{mode, "loop"}}}
	}
	if err := WithTemp(m("rw"), func(root string) error { return os.WriteFile(root+"/f", []byte("x"), 0o644) }); err != nil {
		t.Fatal(err)
	}
	dst := dirs(t, "dst")[0]
	if err := Mount(m("ro"), dst); err != nil {
		t.Fatal(err)
	}
	if got := read(t, filepath.Join(dst, "f")); got != "x" {
		t.Errorf("read %q", got)
	}
	if err := os.WriteFile(filepath.Join(dst, "g"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v", err)
	}
	if err := Unmount(dst); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); loopsOf(t, image) != 0; time.Sleep(10 * time.Millisecond) { // it is freed by the kernel's own thread
		if time.Now().After(deadline) {
			t.Fatal("a loop device was left")
		}
	}
}

// loopsOf counts the loop devices on a file.
func loopsOf(t *testing.T, image string) (n int) {
	t.Helper()
	found, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		if b, err := os.ReadFile(f); err == nil && string(b) == image+"\n" {
			n++
		}
	}
	return n
}

func TestLasting(t *testing.T) {
	opts, _ := overlayOptions(t, 2)
	m := []*types.Mount{{Type: "overlay", Source: "overlay", Options: append(opts, "volatile")}}
	for range 2 { // the second one would be refused
		if err := WithTemp(m, func(string) error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Contains(m[0].Options, "volatile") {
		t.Error("the caller's mount was changed")
	}
}
