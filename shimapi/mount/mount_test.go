package mount

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// dirs makes directories below a fresh one, which is unmounted at the end, and gives their paths.
func dirs(t *testing.T, names ...string) []string {
	t.Helper()
	root := t.TempDir()
	var out []string
	for _, n := range names {
		p := filepath.Join(root, n)
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := Unmount(p); err != nil {
				t.Error(err)
			}
		})
		out = append(out, p)
	}
	return out
}

func write(t *testing.T, path, body string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(body), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// mounted gives the fields of mountinfo for what is on path, topmost last.
func mounted(t *testing.T, path string) [][]string {
	t.Helper()
	var out [][]string
	for line := range bytes.Lines([]byte(read(t, "/proc/self/mountinfo"))) {
		if f := strings.Fields(string(line)); f[4] == path {
			out = append(out, f)
		}
	}
	return out
}

func TestBind(t *testing.T) {
	d := dirs(t, "src", "dst")
	write(t, filepath.Join(d[0], "f"), "hello")
	if err := Mount([]*types.Mount{{Type: "bind", Source: d[0], Options: []string{"rbind", "ro", "nosuid", "rprivate"}}}, d[1]); err != nil {
		t.Fatal(err)
	}
	if got := read(t, filepath.Join(d[1], "f")); got != "hello" {
		t.Errorf("read %q through the bind", got)
	}
	if err := os.WriteFile(filepath.Join(d[1], "g"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a read-only bind: %v, want EROFS", err)
	}
	m := mounted(t, d[1])
	if len(m) != 1 || !strings.HasPrefix(m[0][5], "ro,nosuid") || strings.Contains(strings.Join(m[0][6:8], " "), "shared") {
		t.Errorf("mountinfo: %v", m)
	}
	if err := Unmount(d[1]); err != nil {
		t.Fatal(err)
	}
	if err := Unmount(d[1]); err != nil {
		t.Errorf("second unmount: %v", err)
	}
	if err := Unmount(filepath.Join(d[1], "absent")); err != nil {
		t.Errorf("unmount of a path that is not there: %v", err)
	}
}

func TestBindFileAndRecursion(t *testing.T) {
	d := dirs(t, "src", "src/sub", "dst", "rec")
	if err := Mount([]*types.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"size=64k", "mode=700"}}}, d[1]); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(d[1], "f"), "below")
	if err := Mount([]*types.Mount{{Type: "bind", Source: d[0], Options: []string{"bind"}}}, d[2]); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(d[2], "sub/f")); err == nil {
		t.Error("bind took what is mounted below along")
	}
	if err := Mount([]*types.Mount{{Type: "bind", Source: d[0], Options: []string{"rbind", "rro"}}}, d[3]); err != nil {
		t.Fatal(err)
	}
	if got := read(t, filepath.Join(d[3], "sub/f")); got != "below" {
		t.Errorf("rbind: read %q", got)
	}
	if err := os.WriteFile(filepath.Join(d[3], "sub/g"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write below a recursively read-only bind: %v", err)
	}
	file := filepath.Join(t.TempDir(), "target")
	write(t, file, "")
	if err := Mount([]*types.Mount{{Type: "bind", Source: filepath.Join(d[1], "f"), Options: []string{"bind"}}}, file); err != nil {
		t.Fatal(err)
	}
	if got := read(t, file); got != "below" {
		t.Errorf("bind of a file: read %q", got)
	}
	if err := Unmount(file); err != nil {
		t.Error(err)
	}
}

func overlayOptions(t *testing.T, layers int) (opts []string, top string) {
	t.Helper()
	d := dirs(t, `lo,w:e\r`, `up,p:e\r`, `wo,r:\k`) // awkward names: any path may be the daemon's root
	var lower []string
	for i := range layers {
		p := filepath.Join(d[0], strings.Repeat("l", 80), fmt.Sprint(i))
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(p, fmt.Sprint("f", i)), fmt.Sprint(i))
		lower = append(lower, Escape(p))
	}
	return []string{"index=off", "workdir=" + Escape(d[2]), "upperdir=" + Escape(d[1]), "lowerdir=" + strings.Join(lower, ":")}, d[1]
}

func TestOverlay(t *testing.T) {
	for _, layers := range []int{1, 2, 120} { // the last one's options have about 16 KiB
		for _, how := range []string{"new", "classic"} {
			t.Run(fmt.Sprintf("%d layers/%s", layers, how), func(t *testing.T) {
				opts, upper := overlayOptions(t, layers)
				m := &types.Mount{Type: "overlay", Source: "overlay", Options: opts}
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
				for i := range layers {
					if got := read(t, filepath.Join(dst, fmt.Sprint("f", i))); got != fmt.Sprint(i) {
						t.Errorf("layer %d: read %q", i, got)
					}
				}
				write(t, filepath.Join(dst, "new"), "x")
				if got := read(t, filepath.Join(upper, "new")); got != "x" {
					t.Errorf("upper: %q", got)
				}
			})
		}
	}
}

func TestClassicBind(t *testing.T) {
	d := dirs(t, "src", "dst")
	m := &types.Mount{Type: "bind", Source: d[0], Options: []string{"rbind", "ro", "noexec"}}
	o, err := parse(m)
	if err != nil {
		t.Fatal(err)
	}
	at, err := openTarget(m, d[1])
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(at) }()
	if err := classic(m, o, fdPath(at)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d[1], "f"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v, want EROFS", err)
	}
}

// TestBeside: a device that is mounted writable is mounted read-only beside that, and shows the same.
func TestBeside(t *testing.T) {
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		t.Skip("mkfs.ext4 is not installed")
	}
	image := filepath.Join(t.TempDir(), "image")
	write(t, image, "")
	if err := os.Truncate(image, 16<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, "-q", "-F", image).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d := dirs(t, "writable", "beside")
	if err := Mount([]*types.Mount{{Type: "ext4", Source: image, Options: []string{"loop"}}}, d[0]); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(d[0], "f"), "1")
	f := mounted(t, d[0])[0]
	device := f[len(f)-2]
	if err := Mount([]*types.Mount{{Type: "ext4", Source: device, Options: []string{"ro"}}}, d[1]); err != nil {
		t.Fatal(err)
	}
	if got := read(t, filepath.Join(d[1], "f")); got != "1" {
		t.Errorf("%q", got)
	}
	if err := os.WriteFile(filepath.Join(d[1], "f"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v, want EROFS", err)
	}
	write(t, filepath.Join(d[0], "f"), "2")
	if got := read(t, filepath.Join(d[1], "f")); got != "2" {
		t.Errorf("%q", got)
	}
}

func TestUndo(t *testing.T) {
	d := dirs(t, "src", "src/sub", "dst")
	err := Mount([]*types.Mount{
		{Type: "bind", Source: d[0], Options: []string{"bind"}},
		{Type: "tmpfs", Source: "tmpfs", Target: "/sub"},
		{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/nowhere/at/all:/nowhere"}},
	}, d[2])
	if err == nil {
		t.Fatal("a mount without its layer succeeded")
	}
	if !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), `"overlay"`) || !strings.Contains(err.Error(), "/nowhere/at/all") {
		t.Errorf("error: %v", err)
	}
	if after := read(t, "/proc/self/mountinfo"); strings.Contains(after, d[2]) {
		t.Errorf("mounts were left:\n%s", after)
	}
}

// TestTargetStaysInside: what lies in a rootfs must not lead a mount out of it.
func TestTargetStaysInside(t *testing.T) {
	d := dirs(t, "root", "root/in", "in")
	if err := os.Symlink("../../..", filepath.Join(d[0], "link")); err != nil {
		t.Fatal(err)
	}
	if err := Mount([]*types.Mount{
		{Type: "bind", Source: d[0], Options: []string{"bind"}},
		{Type: "tmpfs", Source: "tmpfs", Target: "link/../in"},
	}, d[0]); err != nil {
		t.Fatal(err)
	}
	// Where mounts are shared there is one more, below the bind.
	if len(mounted(t, d[1])) == 0 || len(mounted(t, d[2])) != 0 {
		t.Error("the mount is not where it should be")
	}
}

func TestInvalid(t *testing.T) {
	dst := dirs(t, "dst")[0]
	for name, m := range map[string]*types.Mount{
		"no type":        {Source: "/"},
		"no source":      {Type: "bind", Options: []string{"bind"}},
		"unknown option": {Type: "bind", Source: "/", Options: []string{"rbind", "colour=red"}},
		"not prepared":   {Type: "tmpfs", Options: []string{"X-containerd.mkdir.path=/x"}},
		"NUL":            {Type: "tmpfs", Options: []string{"a\x00b"}},
		"long":           {Type: "tmpfs", Options: []string{strings.Repeat("x", 5000)}},
	} {
		if err := Mount([]*types.Mount{m}, dst); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
	if err := Mount([]*types.Mount{{Type: "bind", Source: "/", Options: []string{"bind"}}}, dst+"/absent"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("missing target: %v", err)
	}
	if err := Mount([]*types.Mount{{Type: "no-such-fs", Source: "x"}}, dst); !errors.Is(err, unix.ENODEV) {
		t.Errorf("unknown file system: %v", err)
	}
}

func TestWithTemp(t *testing.T) {
	opts, upper := overlayOptions(t, 3)
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	m := []*types.Mount{{Type: "overlay", Source: "overlay", Options: opts}}
	for i, with := range []func([]*types.Mount, func(string) error) error{WithTemp, withDir} {
		name := fmt.Sprint("new", i)
		err := with(m, func(root string) error {
			if got := read(t, filepath.Join(root, "f2")); got != "2" {
				t.Errorf("read %q", got)
			}
			write(t, filepath.Join(root, name), "x")
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := read(t, filepath.Join(upper, name)); got != "x" {
			t.Errorf("upper has %q", got)
		}
	}
	want := errors.New("of fn")
	if err := WithTemp([]*types.Mount{{Type: "tmpfs", Source: "tmpfs"}}, func(string) error { return want }); !errors.Is(err, want) {
		t.Errorf("error of fn: %v", err)
	}
	if after := read(t, "/proc/self/mountinfo"); strings.Contains(after, dir) {
		t.Errorf("mounts were left:\n%s", after)
	}
	if !ReadOnly(&types.Mount{Type: "overlay", Options: []string{"lowerdir=/a:/b"}}) || ReadOnly(m[0]) || !ReadOnly(&types.Mount{Type: "bind", Options: []string{"rbind", "ro"}}) {
		t.Error("ReadOnly")
	}
}

func BenchmarkOverlay(b *testing.B) {
	lower, upper, work, dst := b.TempDir(), b.TempDir(), b.TempDir(), b.TempDir()
	m := []*types.Mount{{Type: "overlay", Source: "overlay", Options: []string{"index=off", "workdir=" + work, "upperdir=" + upper, "lowerdir=" + lower}}}
	for b.Loop() {
		if err := Mount(m, dst); err != nil {
			b.Fatal(err)
		}
		if err := Unmount(dst); err != nil {
			b.Fatal(err)
		}
	}
}
