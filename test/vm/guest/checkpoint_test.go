//go:build vmguest

package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/test/image"
)

// counter counts in a file of its root file system, which it keeps open, until SIGTERM; its status is 7 then.
const counter = `exec 3>/count; trap 'exit 7' TERM; i=0; while :; do echo $i >&3; i=$((i+1)); usleep 100000; done`

// testCheckpoint: a container is saved with criu, and goes on where it was, by Debian's ctr and by mctl; the shim of the one
// that was restored may die.
func testCheckpoint(t *testing.T) {
	if out, err := output("criu", "check"); err != nil {
		t.Skipf("criu and this kernel do not fit: %v: %s", err, out)
	}
	c := newClient(t)
	command(t, "ctr", "run", "-d", "--null-io", image.Default, "counter", "sh", "-c", counter)
	awaitCount(t, c, "counter", 5)
	command(t, "ctr", "containers", "checkpoint", "--rw", "--image", "--task", "counter", "saved")
	awaitCount(t, c, "counter", counted(t, c, "counter")+3) // it runs on
	saved := command(t, "ctr", "images", "ls", "name==saved")
	if !strings.Contains(saved, "application/vnd.oci.image.index.v1+json") {
		t.Errorf("the checkpoint: %s", saved)
	}
	c.finish("counter")

	command(t, "ctr", "containers", "restore", "--rw", "--live", "counter", "saved")
	awaitCount(t, c, "counter", counted(t, c, "counter")+3)
	pid := pidOf(c, "counter")
	if err := unix.Kill(shimOf(t, "counter"), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "a successor has the restored container", func() bool {
		status := try("mctl", "tasks", "ls")
		return strings.Contains(status, "counter") && strings.Contains(status, "RUNNING")
	})
	equal(t, "the pid after the shim's death", pidOf(c, "counter"), pid)
	awaitCount(t, c, "counter", counted(t, c, "counter")+3)

	name := strings.TrimSpace(command(t, "mctl", "tasks", "checkpoint", "--exit", "counter"))
	// 255, unknown: this kernel does not tell a shim how the child of another one has ended (Linux 6.15 does).
	if status := c.wait("counter"); status != 137 && status != 255 {
		t.Errorf("the status of one that was saved and ended: %d", status)
	}
	c.remove("counter")
	command(t, "mctl", "containers", "restore", "-d", "--rw", "--live", "other", name)
	awaitCount(t, c, "other", counted(t, c, "other")+3)
	dir := t.TempDir() + "/images"
	command(t, "mctl", "tasks", "checkpoint", "--image-path", dir, "other")
	if _, err := os.Stat(dir + "/inventory.img"); err != nil {
		t.Error(err)
	}
	awaitCount(t, c, "other", counted(t, c, "other")+3)
	call(c, c.tasks.Kill, &tasksapi.KillRequest{ContainerID: "other", Signal: uint32(unix.SIGTERM)})
	equal(t, "its own status", c.wait("other"), 7)
	c.remove("other")
	for _, i := range []string{"saved", name} {
		command(t, "ctr", "images", "rm", i)
	}
}

// counted checks that a counter has left out no number, and gives the next one.
func counted(t *testing.T, c *client, id string) int {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/count", pidOf(c, id)))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	lines := strings.Split(string(data), "\n")
	for _, line := range lines[:len(lines)-1] { // the last one may be half written
		if got, err := strconv.Atoi(line); err != nil || got != n {
			t.Fatalf("%s: number %d is %q", id, n, line)
		}
		n++
	}
	return n
}

func awaitCount(t *testing.T, c *client, id string, n int) {
	t.Helper()
	until(t, fmt.Sprintf("%s has counted to %d", id, n), func() bool { return counted(t, c, id) >= n })
}

// shimOf is the pid of a container's shim.
func shimOf(t *testing.T, id string) int {
	t.Helper()
	var shims []struct {
		ID  string `json:"id"`
		PID int    `json:"pid"`
	}
	out := command(t, "mctl", "shim", "ls", "-o", "json")
	if err := json.Unmarshal([]byte(out), &shims); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, s := range shims {
		if s.ID == id && s.PID > 1 {
			return s.PID
		}
	}
	t.Fatalf("no shim of %s: %s", id, out)
	return 0
}
