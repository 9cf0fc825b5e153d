package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestCtrCheckpoint: where criu does not work, ctr is told which criu and why, and the container runs on. Where it does,
// see test/vm/guest.
func TestCtrCheckpoint(t *testing.T) {
	if exec.Command("criu", "check").Run() == nil {
		t.Skip("criu works here: the VM's tests show what comes of it")
	}
	u := newUser(t)
	u.ctr("run", "-d", ref, "box", "sh", "-c", waiting)
	u.ready("box")
	images := filepath.Join(t.TempDir(), "images")
	for _, args := range [][]string{
		{"t", "checkpoint", "--exit", "box"}, {"t", "checkpoint", "--image-path", images, "box"}, {"c", "checkpoint", "--task", "box", "saved"},
	} {
		has(t, u.fails(1, args...), "cannot checkpoint container box", "criu failed", "criu-dump.log", "does not work with kernel")
		equal(t, "its state", row(t, u.ctr("t", "ls"), "box")[2], "RUNNING")
	}
	equal(t, "images", u.ctr("i", "ls", "-q"), ref+"\n")
	if left, err := os.ReadDir(filepath.Join(u.Root(), "checkpoints")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if _, err := os.Stat(images); !os.IsNotExist(err) {
		t.Errorf("the directory of a checkpoint that failed: %v", err)
	}
	equal(t, "an exec", u.ctr("t", "exec", "--exec-id", "after", "box", "echo", "it runs"), "it runs\n")
	u.ctr("t", "rm", "-f", "box")
	u.ctr("c", "rm", "box")
}
