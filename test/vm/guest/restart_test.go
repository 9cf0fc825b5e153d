//go:build vmguest

package guest

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// pace is how often the clients of a hammer call.
const pace = 20 * time.Millisecond

// hammer has three clients call managerd all the time: one on a connection that it keeps, one that connects for every
// call, neither of which tries again, and Debian's ctr. The returned function ends them and says how many calls each
// made and which failed.
func hammer(t *testing.T) func() (calls [3]int, failed []error) {
	t.Helper()
	stop := make(chan struct{})
	var work sync.WaitGroup
	var mu sync.Mutex
	var calls [3]int
	var failed []error
	list := func(conn *grpc.ClientConn) error {
		ctx, cancel := limited()
		defer cancel()
		_, err := containersapi.NewContainersClient(conn).List(ctx, &containersapi.ListContainersRequest{})
		return err
	}
	client := func(i int, what string, one func() error) {
		work.Go(func() {
			tick := time.NewTicker(pace)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
				case <-stop:
					return
				}
				err := one()
				mu.Lock()
				calls[i]++
				if err != nil {
					failed = append(failed, fmt.Errorf("%s, call %d: %w", what, calls[i], err))
				}
				mu.Unlock()
			}
		})
	}
	kept, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = kept.Close() })
	client(0, "a kept connection", func() error { return list(kept) })
	client(1, "a connection for one call", func() error {
		conn, err := dial()
		if err != nil {
			return err
		}
		return errors.Join(list(conn), conn.Close())
	})
	client(2, "ctr", func() error {
		out, err := output("ctr", "containers", "ls", "-q")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	return func() ([3]int, []error) {
		close(stop)
		work.Wait()
		return calls, failed
	}
}

// testSteady starts the container that the parts which follow look at: it is to notice nothing of any of them.
func testSteady(t *testing.T) {
	c := newClient(t)
	c.run("steady", forever, false)
	until(t, "its script runs", func() bool { return c.exec("steady", "exit 20") == 20 })
	alive(t, pidOf(c, "steady"))
}

// testRestart is the promise: systemctl restart, and not one call fails.
func testRestart(t *testing.T) {
	c := newClient(t)
	pid := pidOf(c, "steady")
	ended := hammer(t)
	const restarts = 5
	for range restarts {
		before := number(t, "MainPID")
		command(t, "systemctl", "restart", "managerd")
		if after := number(t, "MainPID"); after == before {
			t.Errorf("systemctl restart: the pid is %d as before", after)
		}
	}
	calls, failed := ended()
	for _, err := range failed {
		t.Error(err)
	}
	fmt.Printf("%d restarts: %d calls on a kept connection, %d on one each, %d of ctr; %d failed\n", restarts, calls[0], calls[1], calls[2], len(failed))
	for i, n := range calls {
		if n < 5 {
			t.Errorf("client %d made only %d calls", i, n)
		}
	}
	alive(t, pid)
	equal(t, "an exec after the restarts", c.exec("steady", "exit 21"), 21)
}

// trap is a script that ends with code when it is told to.
func trap(code int) string {
	return fmt.Sprintf("trap 'exit %d' TERM; while :; do sleep 1000 & wait; done", code)
}

// away runs n containers, has them end while managerd is away, which down makes sure of, and looks for their exits. told
// says that there was somebody to see them end: a shim, or a kernel that keeps exits.
func away(t *testing.T, n int, told bool, down, up func()) {
	t.Helper()
	want := func(i int) uint32 {
		if !told {
			return 255 // it is not known, and said so
		}
		return uint32(40 + i)
	}
	c := newClient(t)
	pids := map[string]int{}
	for i := range n {
		id := fmt.Sprint("away", i)
		pids[id] = c.run(id, trap(40+i), false)
		// The shell has set its trap when it waits for its child.
		until(t, "the script of "+id+" runs", func() bool {
			return file(t, "/proc", fmt.Sprint(pids[id]), "task", fmt.Sprint(pids[id]), "children") != ""
		})
	}
	down()
	for id, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
	up()
	for i := range n {
		id := fmt.Sprint("away", i)
		equal(t, "the exit of "+id, c.wait(id), want(i))
		equal(t, "the exit of "+id+" when it is deleted", c.remove(id), want(i))
	}
}

// keepsExits says whether this kernel tells with PIDFD_GET_INFO how somebody else's child ended: Linux 6.15 and later.
func keepsExits(t *testing.T) bool {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major > 6 || major == 6 && minor >= 15
}

// testKill: systemd starts it again after a SIGKILL, at once, and exits of the time in between are there: also when the
// shims, which are in the cgroup of the unit, die with it, if the kernel keeps exits.
func testKill(t *testing.T) {
	c := newClient(t)
	before, restarts := pidOf(c, "steady"), number(t, "NRestarts")
	for _, kill := range []struct {
		whom string
		told bool
	}{{"main", true}, {"all", keepsExits(t)}} {
		pid := number(t, "MainPID")
		down := func() { command(t, "systemctl", "kill", "-s", "KILL", "--kill-whom="+kill.whom, "managerd.service") }
		away(t, 4, kill.told, down, func() {
			until(t, "managerd is back", func() bool { return active(t) && number(t, "MainPID") != pid })
		})
	}
	equal(t, "restarts", number(t, "NRestarts"), restarts+2)
	equal(t, "the pid of a container", pidOf(c, "steady"), before)
	alive(t, before)
	equal(t, "an exec afterwards", c.exec("steady", "exit 22"), 22)
}

func pidOf(c *client, id string) int {
	c.t.Helper()
	return int(call(c, c.tasks.Get, &tasksapi.GetRequest{ContainerID: id}).Process.Pid)
}

// testKillOften: systemd never gives up, and neither do clients that connect for each call.
func testKillOften(t *testing.T) {
	c := newClient(t)
	const kills = 8 // systemd's own limit would be 5 in 10 s
	for range kills {
		pid := number(t, "MainPID")
		if pid == 0 {
			until(t, "there is a process", func() bool { pid = number(t, "MainPID"); return pid != 0 })
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		until(t, "there is another process", func() bool { p := number(t, "MainPID"); return p != 0 && p != pid })
	}
	equal(t, "an exec after all", c.exec("steady", "exit 23"), 23)
	equal(t, "the socket", strings.TrimSpace(command(t, "systemctl", "is-active", "managerd.socket")), "active")
}

// testStop: a stop answers what was asked before, and leaves the containers alone; a later client starts managerd again.
func testStop(t *testing.T) {
	c := newClient(t)
	// Under way when the stop comes: execs, which take several processes and so a while.
	var work sync.WaitGroup
	stopped := make(chan struct{})
	begun := make(chan struct{}, 100)
	work.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stopped:
				return
			default:
			}
			if got := c.exec("steady", "exit 5"); got != 5 {
				t.Errorf("an exec during a stop ended with %d", got)
			}
			select {
			case begun <- struct{}{}:
			default:
			}
		}
	})
	<-begun
	command(t, "systemctl", "stop", "managerd.service")
	equal(t, "the result of a stop", property(t, "Result"), "success")
	close(stopped)
	work.Wait()
	equal(t, "an exec after the stop", c.exec("steady", "exit 24"), 24) // if none before, it has started managerd, through its socket
	until(t, "managerd is back", func() bool { return active(t) })

	// And without the socket: nobody can reach it, and containers end meanwhile.
	away(t, 3, true, func() { command(t, "systemctl", "stop", "managerd.socket", "managerd.service") }, func() {
		equal(t, "after stopping both", property(t, "ActiveState"), "inactive")
		command(t, "systemctl", "start", "managerd.service") // which wants the socket
	})
	equal(t, "the socket", strings.TrimSpace(command(t, "systemctl", "is-active", "managerd.socket")), "active")
	equal(t, "an exec after both", c.exec("steady", "exit 25"), 25)
}

// testWatchdog freezes managerd: systemd kills it, starts another one, and those who asked meanwhile get their answers.
func testWatchdog(t *testing.T) {
	c := newClient(t)
	const dropIn = "/run/systemd/system/managerd.service.d"
	if err := os.MkdirAll(dropIn, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dropIn+"/watchdog.conf", []byte("[Service]\nWatchdogSec=6s\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	command(t, "systemctl", "daemon-reload")
	command(t, "systemctl", "restart", "managerd")
	pid, restarts, container := number(t, "MainPID"), number(t, "NRestarts"), pidOf(c, "steady")
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	until(t, "another managerd runs", func() bool { return active(t) && number(t, "MainPID") != pid })
	if out := command(t, "journalctl", "-b", "-u", "managerd.service", "--no-pager"); !strings.Contains(out, "Watchdog timeout") {
		t.Error("the journal tells of no watchdog")
	}
	equal(t, "the pid of a container", pidOf(c, "steady"), container)
	alive(t, container)
	equal(t, "an exec afterwards", c.exec("steady", "exit 26"), 26)
	// One that is well is left alone, with clients at it, for longer than the limit.
	pid = number(t, "MainPID")
	for began := time.Now(); time.Since(began) < 9*time.Second; {
		equal(t, "an exec meanwhile", c.exec("steady", "exit 27"), 27)
	}
	equal(t, "the pid of a managerd that is well", number(t, "MainPID"), pid)
	equal(t, "restarts", number(t, "NRestarts"), restarts+1)
	if err := os.RemoveAll(dropIn); err != nil {
		t.Fatal(err)
	}
	command(t, "systemctl", "daemon-reload")
}
