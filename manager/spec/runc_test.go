package spec

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// busyboxRoot makes a root file system of Debian's static busybox and a few users.
func busyboxRoot(t *testing.T) string {
	t.Helper()
	bin, err := os.ReadFile("/usr/bin/busybox")
	if errors.Is(err, fs.ErrNotExist) {
		bin, err = os.ReadFile("/bin/busybox")
	}
	if err != nil {
		t.Fatalf("busybox-static is needed: %v", err)
	}
	dir := t.TempDir()
	writeFiles(t, dir, map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/:/bin/sh\n",
		"etc/group":  "root:x:0:\nweb:x:1001:\nlog:x:1002:web\n",
	})
	for _, d := range []string{"bin", "proc", "dev", "sys", "run", "tmp"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sh", "id", "cat", "grep", "pwd", "ls", "touch", "mknod", "stty", "hostname", "awk"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// runc runs a spec with Debian's runc in a cgroup of this test's own, and gives what it printed. Nothing is left.
func runc(t *testing.T, rootfs string, opts ...Option) (string, error) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("root is needed to run containers")
	}
	id := fmt.Sprintf("spec-%d-%s", os.Getpid(), strings.ToLower(strings.ReplaceAll(filepath.Base(t.Name()), "_", "-")))
	parent := fmt.Sprintf("managerd-spec-test-%d", os.Getpid())
	s, err := New(id, parent, append([]Option{Rootfs(rootfs)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	bundle, state := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		exec.Command("runc", "--root", state, "delete", "--force", id).Run()
		for _, pattern := range []string{"/sys/fs/cgroup/" + parent, "/sys/fs/cgroup/*/" + parent} {
			dirs, _ := filepath.Glob(pattern)
			for _, d := range dirs {
				if err := os.Remove(d); err != nil {
					t.Errorf("cgroup left behind: %v", err)
				}
			}
		}
	})
	cmd := exec.Command("runc", "--root", state, "run", "--bundle", bundle, id)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestRunc: what New makes is what a runtime can run, and means in the container what it says.
func TestRunc(t *testing.T) {
	rootfs := busyboxRoot(t)
	shared := t.TempDir()
	writeFiles(t, shared, map[string]string{"note": "from the host\n"})
	sh := func(script string) Option { return Args("sh", "-c", script) }
	bind, err := ParseMount("type=bind,src=" + shared + ",dst=/mnt,options=ro")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		opts []Option
		want string
	}{
		{"default", []Option{Args("id")}, "uid=0(root) gid=0(root)\n"},
		{"image", []Option{Image(&ocispec.ImageConfig{
			User: "web", WorkingDir: "/tmp", Env: []string{"GREETING=hello"}, Entrypoint: []string{"sh", "-c"}, Cmd: []string{"id -u; id -g; id -G; pwd; echo $GREETING"},
		}, nil)}, "1000\n1001\n1001 1002\n/tmp\nhello\n"},
		{"limits", []Option{sh("ulimit -n; ulimit -Hn; cat /proc/self/cgroup | grep -c managerd-spec-test >/dev/null && echo own cgroup"), Rlimits("nofile=100:200"),
			MemoryLimit(64 << 20), CPUs(0.5), CPUShares(512), PidsLimit(20)}, "100\n200\nown cgroup\n"},
		{"mounts", []Option{sh("cat /mnt/note; touch /mnt/x 2>/dev/null || echo read-only; hostname"), Mounts(bind), Hostname("box")}, "from the host\nread-only\nbox\n"},
		{"readonly", []Option{sh("touch /x 2>/dev/null || echo read-only"), ReadonlyRootfs()}, "read-only\n"},
		{"capabilities", []Option{sh("grep CapEff /proc/self/status"), Capabilities([]string{"net_raw"}, []string{"ALL"})}, "CapEff:\t0000000000002000\n"},
		{"seccomp", []Option{sh("grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status"), Seccomp("default")}, "NoNewPrivs:\t1\nSeccomp:\t2\n"},
		{"host-network", []Option{sh("ls /proc/self/ns/net >/dev/null && cat /etc/hosts"), HostNetwork()}, read(t, "/etc/hosts")},
		{"device", []Option{sh("ls /dev/kmsg"), Device("/dev/kmsg")}, "/dev/kmsg\n"},
		{"privileged", []Option{sh("grep -q ' /sys sysfs rw' /proc/mounts && echo writable; test -c /dev/kmsg && echo device; grep CapEff /proc/self/status"), Privileged()},
			"writable\ndevice\n" + line(t, "/proc/self/status", "CapBnd:", "CapEff:")},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := runc(t, rootfs, c.opts...)
			if err != nil {
				t.Fatalf("%v: %s", err, got)
			}
			if got != c.want {
				t.Errorf("printed %q, want %q", got, c.want)
			}
		})
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// line gives the line of file that starts with prefix, with another prefix in its place.
func line(t *testing.T, file, prefix, as string) string {
	t.Helper()
	for l := range strings.Lines(read(t, file)) {
		if rest, ok := strings.CutPrefix(l, prefix); ok {
			return as + rest
		}
	}
	t.Fatalf("%s has no %s", file, prefix)
	return ""
}

// writeFiles makes files, and the directories they need, below dir.
func writeFiles(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, body := range files {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// apply makes a spec with opts applied.
func apply(t testing.TB, opts ...Option) *specs.Spec {
	t.Helper()
	s, err := New("id", "ns", opts...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
