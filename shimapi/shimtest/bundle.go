package shimtest

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi"
)

// busybox is a static binary, as Debian's package busybox-static has it.
const busybox = "/bin/busybox"

// Rootfs fills dir with busybox and the directories that a container mounts on.
func Rootfs(t testing.TB, dir string) {
	t.Helper()
	for _, d := range []string{"bin", "proc", "sys", "dev", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatalf("%v (Debian: apt-get install busybox-static)", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, applet := range strings.Fields(string(out)) {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", applet)); err != nil && applet != "busybox" {
			t.Fatal(err)
		}
	}
}

// cgroupParent is below which this process makes its cgroups.
var cgroupParent = fmt.Sprintf("/shimtest-%d", os.Getpid())

// newSpec is a container with namespaces of its own that runs args; every OCI runtime can run it.
func newSpec(id string, args ...string) *specs.Spec {
	return &specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: shimapi.RootfsDir},
		Process: &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: cgroupParent + "/" + id,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			},
		},
	}
}

// hostPID takes the pid namespace of a spec away: its processes can outlive its init.
func hostPID(s *specs.Spec) {
	var kept []specs.LinuxNamespace
	for _, ns := range s.Linux.Namespaces {
		if ns.Type != specs.PIDNamespace {
			kept = append(kept, ns)
		}
	}
	s.Linux.Namespaces = kept
}

// writeSpec writes config.json; raw goes there as it is.
func (sh *shim) writeSpec(spec *specs.Spec, raw string) {
	sh.t.Helper()
	data := []byte(raw)
	if spec != nil {
		var err error
		if data, err = json.Marshal(spec); err != nil {
			sh.t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(sh.bundle, shimapi.ConfigFile), data, 0o600); err != nil {
		sh.t.Fatal(err)
	}
}

func (sh *shim) makeBundle() {
	sh.t.Helper()
	if err := os.MkdirAll(filepath.Join(sh.bundle, shimapi.RootfsDir), 0o711); err != nil {
		sh.t.Fatal(err)
	}
	spec := newSpec(sh.id, "sleep", "1000")
	if sh.form.sandbox {
		spec = newSandboxSpec()
	}
	sh.writeSpec(spec, "")
	if err := unix.Mkfifo(filepath.Join(sh.bundle, shimapi.LogFIFO), 0o600); err != nil {
		sh.t.Fatal(err)
	}
}

func (s *suite) bind() []*types.Mount {
	return []*types.Mount{{Type: "bind", Source: s.rootfs, Options: []string{"rbind", "ro"}}}
}

func mountsBelow(dir string) (left []string) {
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for _, line := range strings.Split(string(mounts), "\n") {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			left = append(left, "mount "+f[4])
		}
	}
	return left
}

// cgroupDirs are the cgroups named name below cgroupParent, in v1's hierarchies and v2's.
func cgroupDirs(name string) (found []string) {
	v1, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupParent + "/" + name)
	v2, _ := filepath.Glob("/sys/fs/cgroup" + cgroupParent + "/" + name)
	for _, dir := range append(v1, v2...) {
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() {
			found = append(found, dir)
		}
	}
	return found
}

// cgroupsLeft lists what is below cgroupParent, and removes that if it is empty.
func cgroupsLeft() (left []string) {
	for _, dir := range cgroupDirs("*") {
		left = append(left, "cgroup "+dir)
	}
	parents, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupParent)
	for _, dir := range append(parents, "/sys/fs/cgroup"+cgroupParent) {
		_ = os.Remove(dir)
	}
	return left
}
