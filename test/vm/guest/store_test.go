//go:build vmguest

package guest

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"

	"github.com/managerd/managerd/manager/spec"
)

// fifo makes one that a client holds; both ends of the input, so that it has no end.
func fifo(t *testing.T, name string, flags int) (string, *os.File) {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return path, f
}

// stored is how many descriptors systemd keeps for managerd.
func stored(t *testing.T) int {
	t.Helper()
	return number(t, "NFileDescriptorStore")
}

// testBothKilled kills managerd and the shim of a terminal together, in both orders, and once managerd alone in between:
// the session of its client, who knows of nothing, goes on, for the terminal is in systemd's descriptor store. In the end
// the store is as it was.
func testBothKilled(t *testing.T) {
	c := newClient(t)
	tasks := len(call(c, c.tasks.List, &tasksapi.ListTasksRequest{}).Tasks)
	until(t, "systemd keeps what is parked of each task", func() bool { return stored(t) == tasks })
	in, keys := fifo(t, "in", os.O_RDWR)
	out, screen := fifo(t, "out", os.O_RDONLY|syscall.O_NONBLOCK)
	c.make("session", "echo ready; while read a; do echo got $a; [ $a = end ] && exit 35; done", false, spec.Terminal(80, 25))
	m := call(c, c.snapshots.Mounts, &snapshotsapi.MountsRequest{Snapshotter: snapshotter, Key: "session"})
	pid := int(call(c, c.tasks.Create, &tasksapi.CreateTaskRequest{
		ContainerID: "session", Rootfs: m.Mounts, Terminal: true, Stdin: in, Stdout: out,
	}).Pid)
	call(c, c.tasks.Start, &tasksapi.StartRequest{ContainerID: "session"})
	lines := bufio.NewScanner(screen)
	expect := func(want string) {
		t.Helper()
		for lines.Scan() {
			if strings.TrimSpace(lines.Text()) == want {
				return
			}
		}
		t.Fatalf("the terminal never says %q: %v", want, lines.Err())
	}
	expect("ready")
	until(t, "systemd keeps the terminal", func() bool { return stored(t) == tasks+1 })
	shim := func() int {
		t.Helper()
		n, err := strconv.Atoi(strings.TrimSpace(command(t, "pgrep", "-f", "shim-runc .*-id session ")))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	kill := func(pid int) {
		t.Helper()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	for round, order := range []string{"shim, managerd", "managerd", "managerd, shim", "shim, managerd"} {
		daemon, keeper := number(t, "MainPID"), shim()
		for _, who := range strings.Split(order, ", ") {
			kill(map[string]int{"managerd": daemon, "shim": keeper}[who])
		}
		until(t, "another managerd serves", func() bool { return active(t) && number(t, "MainPID") != daemon })
		word := fmt.Sprint("word", round)
		if _, err := keys.WriteString(word + "\n"); err != nil {
			t.Fatal(err)
		}
		expect("got " + word)
		equal(t, "the pid after killing "+order, pidOf(c, "session"), pid)
	}
	if _, err := keys.WriteString("end\n"); err != nil {
		t.Fatal(err)
	}
	expect("got end")
	for lines.Scan() { // to the end of the file: nobody holds the client's side any more
	}
	// It is no child of the shim that came last: before Linux 6.15 its status is not known, or by luck it is.
	if status := c.wait("session"); status != 35 && status != 255 {
		t.Errorf("it ended with %d", status)
	}
	c.remove("session")
	until(t, "systemd keeps no more than before", func() bool { return stored(t) == tasks })
}
