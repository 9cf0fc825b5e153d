package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/test/harness"
)

// countingScript counts in a file of its root file system, which it keeps open, until SIGTERM; its status is 7 then.
const countingScript = `exec 3>/count; trap 'exit 7' TERM; i=0; while :; do echo $i >&3; i=$((i+1)); usleep 20000; done`

// counted checks that a counter has left out no number, and gives the next one.
func (u *user) counted(id string) (n int) {
	u.t.Helper()
	for line := range strings.Lines(u.ctr("t", "exec", "--exec-id", fmt.Sprint("count-", time.Now().UnixNano()), id, "cat", "/count")) {
		if line != fmt.Sprintln(n) && strings.HasSuffix(line, "\n") { // the last one may be half written
			u.t.Fatalf("%s: number %d is %q", id, n, line)
		}
		n++
	}
	return n
}

// counts waits until a counter has gone on.
func (u *user) counts(id string) {
	u.t.Helper()
	from := u.counted(id)
	for deadline := time.Now().Add(time.Minute); u.counted(id) < from+3; {
		if time.Now().After(deadline) {
			u.t.Fatalf("%s does not go on after %d", id, from)
		}
	}
}

// TestCheckpointRestore: a container that counts is saved, and goes on where it was, by Debian's ctr and by mctl; its shim may
// be killed, and the daemon, before and after.
func TestCheckpointRestore(t *testing.T) {
	if out, err := exec.Command("criu", "check").CombinedOutput(); err != nil {
		t.Skipf("criu check: %v: %s", err, out) // a criu older than the kernel; the VM has a pair that fits
	}
	u := newUser(t)
	t.Cleanup(func() { // before the harness looks for what is left
		if t.Failed() {
			_, _ = harness.Output(u.Mctl("tasks", "rm", "-f", "counter", "other"))
		}
	})
	u.ctr("run", "-d", "--null-io", ref, "counter", "sh", "-c", countingScript)
	u.counts("counter")
	u.ctr("c", "checkpoint", "--rw", "--image", "--task", "counter", "saved")
	equal(t, "its state", row(t, u.ctr("t", "ls"), "counter")[2], "RUNNING")
	u.counts("counter")
	n := u.counted("counter")
	u.ctr("t", "rm", "-f", "counter")
	u.ctr("c", "rm", "counter")

	u.ctr("c", "restore", "--rw", "--live", "counter", "saved")
	u.counts("counter")
	if n < 3 {
		t.Error("it had not begun to count")
	}
	pid := row(t, u.ctr("t", "ls"), "counter")[1]
	var shims []struct {
		PID int `json:"pid"`
	}
	if err := json.Unmarshal([]byte(u.mctl("shim", "ls", "--state", u.State(), "-o", "json")), &shims); err != nil || len(shims) != 1 {
		t.Fatalf("shims: %v, %v", shims, err)
	}
	if err := unix.Kill(shims[0].PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); row(t, u.ctr("t", "ls"), "counter")[2] != "RUNNING"; {
		if time.Now().After(deadline) {
			t.Fatal("there is no successor")
		}
	}
	u.counts("counter")
	equal(t, "its pid", row(t, u.ctr("t", "ls"), "counter")[1], pid)
	if err := u.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := u.Start(); err != nil {
		t.Fatal(err)
	}
	u.counts("counter")

	name := strings.TrimSpace(u.mctl("tasks", "checkpoint", "--exit", "counter"))
	equal(t, "its state", row(t, u.ctr("t", "ls"), "counter")[2], "STOPPED")
	has(t, u.ctr("i", "ls", "-q"), name)
	u.mctl("containers", "restore", "-d", "--rw", "--live", "other", name)
	u.counts("other")
	images := filepath.Join(t.TempDir(), "images")
	u.mctl("tasks", "checkpoint", "--image-path", images, "other")
	if _, err := os.Stat(filepath.Join(images, "inventory.img")); err != nil {
		t.Error(err)
	}
	u.counts("other")
	u.ctr("t", "kill", "other")
	out, err := harness.Output(u.Mctl("tasks", "wait", "other"))
	if harness.Status(err) != 7 {
		t.Errorf("its own status: %q, %v", out, err)
	}
	for _, id := range []string{"counter", "other"} {
		u.mctl("tasks", "rm", "-f", id)
		u.ctr("c", "rm", id)
	}
}

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
