package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	api "github.com/containerd/containerd/api/services/sandbox/v1"
	"golang.org/x/sys/unix"
)

// runFix runs the command that fsck names.
func (u *user) runFix(o orphan) {
	u.t.Helper()
	cmd := exec.Command("sh", "-c", o.Command+" --older 0s --state "+u.State())
	cmd.Env = append(os.Environ(), "PATH="+u.Bin+":"+os.Getenv("PATH"), "MANAGERD_ADDRESS="+u.Socket())
	if out, err := cmd.CombinedOutput(); err != nil {
		u.t.Errorf("%s: %v\n%s", o.Command, err, out)
	}
}

// TestFsckSandboxes: the shim of a sandbox whose bundle is gone, and the bundle, mounts and cgroup of one that nobody keeps, are
// found and taken away; the sandboxes that there are, and their members, are left alone.
func TestFsckSandboxes(t *testing.T) {
	u := newUser(t)
	defer u.clear()
	u.mctl("sandboxes", "run", "stays")
	u.mctl("run", "-d", "--sandbox", "stays", ref, "member", "sleep", "1000")
	u.mctl("sandboxes", "run", "--pid", "widow")
	u.fsck(0)
	shim := u.sandboxShim("widow")
	if err := u.Kill(); err != nil {
		t.Fatal(err)
	}
	u.fsck(0)
	bundles := filepath.Join(u.State(), "io.containerd.sandbox.controller.v1.shim", u.Namespace)
	var errs []error
	pinned, err := filepath.Glob(filepath.Join(bundles, "widow", "ns", "*"))
	if err != nil || len(pinned) == 0 {
		t.Fatalf("%v, %v", pinned, err)
	}
	for _, path := range append(pinned, filepath.Join(bundles, "widow", "shm")) {
		errs = append(errs, unix.Unmount(path, unix.MNT_DETACH))
	}
	if err := errors.Join(append(errs, os.RemoveAll(filepath.Join(bundles, "widow")))...); err != nil {
		t.Fatal(err)
	}
	found := u.fsck(1)
	i := slices.IndexFunc(found, func(o orphan) bool { return o.Kind == "shim" && o.Object == fmt.Sprint(shim) })
	if i < 0 {
		t.Fatalf("process %d is not among %v", shim, found)
	}
	if o := found[i]; o.Owner != u.Namespace+"/sandbox/widow" || !strings.Contains(o.Problem, "its bundle is gone; 1 processes of its sandbox run") {
		t.Errorf("%+v", o)
	}
	u.runFix(found[i])
	if slices.Contains(u.Shims(), shim) {
		t.Error("the shim is still there")
	}
	u.fsck(0, "--fix") // its socket
	if err := u.Start(); err != nil {
		t.Fatal(err)
	}
	group := "/" + u.Namespace + "/widow"
	if found := u.fsck(1); len(found) != 1 || found[0].Kind != "cgroup" || found[0].Object != group || !strings.Contains(found[0].Problem, "for a sandbox") {
		t.Errorf("the cgroup: %v", found)
	} else {
		u.runFix(found[0])
	}
	ghost := filepath.Join(bundles, "ghost")
	for _, dir := range []string{"shm", "rootfs", "ns"} {
		errs = append(errs, os.MkdirAll(filepath.Join(ghost, dir), 0o711))
	}
	errs = append(errs, os.WriteFile(filepath.Join(ghost, "ns", "net"), nil, 0o600), unix.Mount("tmpfs", filepath.Join(ghost, "shm"), "tmpfs", 0, ""),
		unix.Mount("/proc/self/ns/net", filepath.Join(ghost, "ns", "net"), "", unix.MS_BIND, ""))
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, o := range u.fsck(1) {
		if o.Owner != u.Namespace+"/sandbox/ghost" || !strings.HasPrefix(o.Object, ghost) {
			t.Errorf("%+v", o)
		}
		kinds = append(kinds, o.Kind)
	}
	if slices.Sort(kinds); strings.Join(kinds, " ") != "bundle mount mount" {
		t.Errorf("%v", kinds)
	}
	for _, o := range u.fsck(0, "--fix") {
		if !o.Fixed {
			t.Errorf("%+v", o)
		}
	}
	if _, err := os.Stat(ghost); !os.IsNotExist(err) {
		t.Errorf("the bundle is left: %v", err)
	}
	u.fsck(0)
	s := u.sandboxes()
	if st, err := s.c.Status(s.ctx, &api.ControllerStatusRequest{SandboxID: "stays", Sandboxer: "shim"}); err != nil || st.State != "SANDBOX_READY" {
		t.Errorf("%v, %v", st, err)
	}
	if st, err := newClient(t, u.Daemon).state("member", ""); err != nil || st.Pid == 0 {
		t.Errorf("%v, %v", st, err)
	}
	if _, err := s.Delete(s.ctx, &api.StoreDeleteRequest{SandboxID: "widow"}); err != nil {
		t.Error(err)
	}
}
