package cgroups

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/errdefs"
)

// TestJoin: a process is in the cgroup that it was told to join, and one that does not exist is said so.
func TestJoin(t *testing.T) {
	name := fmt.Sprintf("managerd-join-test-%d", os.Getpid())
	if err := Join(name, os.Getpid()); !errdefs.IsNotFound(err) {
		t.Fatalf("joining what does not exist: %v", err)
	}
	dir := filepath.Join(Root, "pids", name)
	if cgroups.Mode() == cgroups.Unified {
		dir = filepath.Join(Root, name)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	if err := Join("../"+name, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if want := fmt.Sprintln(cmd.Process.Pid); err != nil || string(data) != want {
		t.Fatalf("in the cgroup: %q, %v; want %q", data, err, want)
	}
}
