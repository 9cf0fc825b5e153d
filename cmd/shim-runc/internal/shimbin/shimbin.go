// Package shimbin serves the tests of shim-runc: it builds the real program, makes bundles with a busybox rootfs, and
// looks for what a test left behind. Only tests import it.
package shimbin

import (
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi"
)

// BinDirEnv names the directory with the programs that were built already (see Makefile).
const BinDirEnv = "MANAGERD_BIN_DIR"

// Build gives the path of shim-runc: the one that was built already, if it has the race detector in it as race says, or a
// fresh one in dir.
func Build(dir string, race bool) (string, error) {
	if bin := os.Getenv(BinDirEnv); bin != "" {
		path := filepath.Join(bin, "shim-runc")
		info, err := buildinfo.ReadFile(path)
		if err != nil {
			return "", err
		}
		if slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) == race {
			return path, nil
		}
	}
	path := filepath.Join(dir, "shim-runc")
	if race {
		return path, build(path, "-race")
	}
	return path, build(path)
}

// BuildBroken builds a shim in dir that says of itself that it could take over from a running one, and then cannot.
func BuildBroken(dir string) (string, error) {
	path := filepath.Join(dir, "broken")
	return path, build(path, "-ldflags", "-X 'github.com/managerd/managerd/cmd/shim-runc/internal/boot.broken=broken on purpose'")
}

func build(path string, flags ...string) error {
	args := append([]string{"build", "-tags", "seccomp no_grpc netgo osusergo", "-o", path}, flags...)
	cmd := exec.Command("go", append(args, "github.com/managerd/managerd/cmd/shim-runc")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build shim-runc: %w\n%s", err, out)
	}
	return nil
}

// Rootfs fills dir with busybox and the directories that a container mounts on.
func Rootfs(t testing.TB, dir string) {
	t.Helper()
	for _, d := range []string{"bin", "proc", "sys", "dev", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, applet := range strings.Fields(string(out)) {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", applet)); err != nil && applet != "busybox" {
			t.Fatal(err)
		}
	}
}

// CgroupParent is below which this test process makes its cgroups.
var CgroupParent = fmt.Sprintf("/managerd-shim-test-%d", os.Getpid())

// Spec is a container with namespaces of its own that runs args.
func Spec(id string, args ...string) *specs.Spec {
	return &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: shimapi.RootfsDir},
		Process: &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: CgroupParent + "/" + id,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			},
		},
	}
}

// HostPID takes the pid namespace of a spec away: its processes can outlive its init.
func HostPID(s *specs.Spec) {
	var kept []specs.LinuxNamespace
	for _, ns := range s.Linux.Namespaces {
		if ns.Type != specs.PIDNamespace {
			kept = append(kept, ns)
		}
	}
	s.Linux.Namespaces = kept
}

// Bundle makes a bundle in dir: config.json, the log FIFO and an empty rootfs to mount on.
func Bundle(t testing.TB, dir string, spec any) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, shimapi.RootfsDir), 0o711); err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, shimapi.ConfigFile), data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, shimapi.LogFIFO), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Leftovers lists mounts below dir and cgroups below CgroupParent, and removes CgroupParent if it is empty.
func Leftovers(dir string) []string {
	var left []string
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for _, line := range strings.Split(string(mounts), "\n") {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			left = append(left, "mount "+f[4])
		}
	}
	parents, _ := filepath.Glob("/sys/fs/cgroup/*" + CgroupParent)
	for _, parent := range append(parents, "/sys/fs/cgroup"+CgroupParent) {
		entries, _ := os.ReadDir(parent)
		for _, e := range entries {
			if e.IsDir() {
				left = append(left, "cgroup "+filepath.Join(parent, e.Name()))
			}
		}
		_ = os.Remove(parent)
	}
	return left
}
