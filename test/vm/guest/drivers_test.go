//go:build vmguest

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/manager/spec"
)

// forever is a script that runs until it is killed.
const forever = "while :; do sleep 1000; done"

// cgroup is the directory of a process's cgroup.
func cgroup(t *testing.T, pid int) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	name, ok := strings.CutPrefix(strings.TrimSpace(string(data)), "0::")
	if !ok {
		t.Fatalf("not cgroup v2: %s", data)
	}
	return filepath.Join("/sys/fs/cgroup", name)
}

// file reads a file of one line.
func file(t *testing.T, path ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

// testDrivers runs a container with each of the cgroup drivers: its limits are in its cgroup, also after an update, its
// metrics tell of them, and its device rules are what they were after everything that makes systemd write its own again.
func testDrivers(t *testing.T) {
	c := newClient(t)
	for _, driver := range []string{"cgroupfs", "systemd"} {
		t.Run(driver, func(t *testing.T) {
			systemd := driver == "systemd"
			c := *c
			c.t = t
			// /dev/vdb is the disk with the tests, and allowed; /dev/vda has the root.
			pid := c.run(driver, forever, systemd, spec.MemoryLimit(64<<20), spec.CPUs(0.5), spec.PidsLimit(50), spec.Device("/dev/vdb"))
			dir := cgroup(t, pid)
			want := "/sys/fs/cgroup/" + namespace + "/" + driver
			if systemd {
				want = "/sys/fs/cgroup/system.slice/test-" + driver + ".scope"
			}
			equal(t, "the cgroup", dir, want)
			limits := func(when, memory string) {
				t.Helper()
				equal(t, "memory.max "+when, file(t, dir, "memory.max"), memory)
				equal(t, "cpu.max "+when, file(t, dir, "cpu.max"), "50000 100000")
				equal(t, "pids.max "+when, file(t, dir, "pids.max"), "50")
			}
			limits("at the start", "67108864")
			var m *v2.Metrics
			until(t, "the shell and its child are counted", func() bool { m = metrics[*v2.Metrics](&c, driver); return m.Pids.Current == 2 })
			if m.Memory.UsageLimit != 64<<20 || m.Memory.Usage == 0 || m.Pids.Limit != 50 || m.CPU.UsageUsec == 0 {
				t.Errorf("metrics: %v", m)
			}

			memory := int64(96 << 20)
			call(&c, c.tasks.Update, &tasksapi.UpdateTaskRequest{ContainerID: driver, Resources: encode(t, "LinuxResources",
				&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory}})})
			limits("after an update", "100663296")
			devices(&c, driver, "at the start")
			command(t, "systemctl", "daemon-reload")
			limits("after daemon-reload", "100663296")
			devices(&c, driver, "after daemon-reload")
			command(t, "systemctl", "restart", "managerd")
			command(t, "systemctl", "daemon-reexec")
			limits("after daemon-reexec", "100663296")
			devices(&c, driver, "after daemon-reexec")
			equal(t, "the cgroup after all", cgroup(t, pid), want)
			c.finish(driver)
			if _, err := os.Stat(dir); err == nil {
				t.Errorf("%s is left behind", dir)
			}
		})
	}
}

// devices fails the test unless a container may open /dev/vdb and /dev/null, and neither /dev/vda nor what else it makes.
func devices(c *client, id, when string) {
	c.t.Helper()
	const open = "rm -f /tmp/d; mknod /tmp/d %s || exit 9; true </tmp/d && exit 0; exit 1"
	for _, d := range []struct {
		name, node string
		want       uint32
	}{
		{"/dev/null", "c 1 3", 0},
		{"/dev/vdb", "b " + blockNumber(c.t, "vdb"), 0},
		{"/dev/vda", "b " + blockNumber(c.t, "vda"), 1},
		{"/dev/port", "c 1 4", 1},
	} {
		if got := c.exec(id, fmt.Sprintf(open, d.node)); got != d.want {
			c.t.Errorf("%s, opening %s %s: status %d, not %d", id, d.name, when, got, d.want)
		}
	}
}

func blockNumber(t *testing.T, disk string) string {
	t.Helper()
	return strings.ReplaceAll(file(t, "/sys/block", disk, "dev"), ":", " ")
}

// testInherited: what systemd gives the service is for the service. A container that the kernel must not kill when
// memory ends would take the machine with it; the service's sockets and its environment are nobody else's.
func testInherited(t *testing.T) {
	c := newClient(t)
	pid := c.run("inherited", forever, false)
	equal(t, "oom_score_adj of a container", file(t, "/proc", fmt.Sprint(pid), "oom_score_adj"), "0")
	shim := strings.Fields(file(t, "/proc", fmt.Sprint(pid), "stat"))[3]
	equal(t, "the container's parent", file(t, "/proc", shim, "comm"), "shim-runc")
	for _, v := range strings.Split(file(t, "/proc", shim, "environ"), "\x00") {
		for _, ours := range []string{"NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", "FDSTORE"} {
			if strings.HasPrefix(v, ours) {
				t.Errorf("a shim has %s", v)
			}
		}
	}
	daemon := sockets(t, fmt.Sprint(number(t, "MainPID")))
	listening := map[string]bool{}
	for _, line := range strings.Split(file(t, "/proc/net/unix"), "\n") {
		if f := strings.Fields(line); len(f) == 8 && strings.HasPrefix(f[7], socket) && f[3] == "00010000" {
			listening["socket:["+f[6]+"]"] = true
		}
	}
	var held int
	for s := range daemon {
		if listening[s] {
			held++
		}
	}
	equal(t, "listening sockets of managerd", held, 2)
	for s := range sockets(t, shim) {
		if listening[s] {
			t.Errorf("a shim has a listening socket of managerd: %s", s)
		}
	}
	c.finish("inherited")
}

func sockets(t *testing.T, pid string) map[string]bool {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join("/proc", pid, "fd"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join("/proc", pid, "fd", e.Name())); err == nil && strings.HasPrefix(target, "socket:") {
			found[target] = true
		}
	}
	return found
}
