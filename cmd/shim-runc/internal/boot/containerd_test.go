package boot

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/test/image"
)

// daemon is a private containerd of the distribution's.
type daemon struct {
	t           *testing.T
	dir, socket string
	cmd         *exec.Cmd
}

// startContainerd runs containerd 1.6 with everything below a directory of its own.
func startContainerd(t *testing.T) *daemon {
	t.Helper()
	if _, err := exec.LookPath("containerd"); err != nil {
		t.Fatalf("%v (Debian: apt-get install containerd)", err)
	}
	dir, err := os.MkdirTemp("", "shim-containerd-")
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, dir: dir, socket: filepath.Join(dir, "c.sock")}
	config := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = %q
[ttrpc]
  address = %q
[plugins."io.containerd.internal.v1.opt"]
  path = %q
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), d.socket, d.socket+".ttrpc", filepath.Join(dir, "opt"))
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	d.start()
	t.Cleanup(func() {
		d.stop(syscall.SIGTERM)
		mounts, _ := os.ReadFile("/proc/self/mountinfo")
		if strings.Contains(string(mounts), dir+"/") {
			t.Errorf("mounts are left below %s", dir)
			return // nothing is removed through a mount
		}
		_ = os.RemoveAll(dir)
	})
	return d
}

func (d *daemon) start() {
	d.t.Helper()
	log, err := os.OpenFile(filepath.Join(d.dir, "containerd.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	d.cmd = exec.Command("containerd", "-c", filepath.Join(d.dir, "config.toml"), "-l", "debug")
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err := d.try("version"); err == nil {
			return
		}
		if time.Now().After(deadline) {
			data, _ := os.ReadFile(log.Name())
			d.t.Fatalf("containerd does not serve:\n%s", data)
		}
	}
}

func (d *daemon) stop(sig syscall.Signal) {
	_ = d.cmd.Process.Signal(sig)
	_ = d.cmd.Wait()
}

func (d *daemon) command(args ...string) *exec.Cmd {
	return exec.Command("ctr", append([]string{"-a", d.socket, "-n", "test"}, args...)...)
}

// try runs ctr and gives its standard output.
func (d *daemon) try(args ...string) (string, error) {
	cmd := d.command(args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("ctr %s: %w\n%s", strings.Join(args, " "), err, errs.String())
	}
	return out.String(), nil
}

func (d *daemon) ctr(args ...string) string {
	d.t.Helper()
	out, err := d.try(args...)
	if err != nil {
		d.t.Fatal(err)
	}
	return out
}

// terminal runs ctr with a terminal of its own, through script(1).
func (d *daemon) terminal(args ...string) string {
	d.t.Helper()
	cmd := exec.Command("script", "-qec", strings.Join(d.command(args...).Args, " "), "/dev/null")
	out, err := cmd.CombinedOutput()
	if err != nil {
		d.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return strings.ReplaceAll(string(out), "\r", "")
}

const img = "docker.io/library/shimtest:latest"

// TestContainerd: Debian's ctr and containerd 1.6 with this shim, as its users run it.
func TestContainerd(t *testing.T) {
	d := startContainerd(t)
	archive := filepath.Join(d.dir, "image.tar")
	if err := image.Write(archive, image.Options{Name: img}); err != nil {
		t.Fatal(err)
	}
	d.ctr("image", "import", archive)
	run := func(args ...string) []string {
		return append([]string{"run", "--runtime", binary}, args...)
	}
	events := d.command("events")
	var seen seenEvents
	events.Stdout = &seen
	if err := events.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = events.Process.Kill()
		_ = events.Wait()
	}()

	t.Run("output and status", func(t *testing.T) {
		out, err := d.try(run("--rm", img, "c1", "sh", "-c", "echo hello; echo oops >&2; exit 7")...)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 7 || out != "hello\n" || !strings.Contains(err.Error(), "oops") {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("input", func(t *testing.T) {
		// Short inputs end before ctr 1.6 knows its task: containerd's own shim hangs on them. An empty one is not among
		// them: ctr reads its end before it has opened the FIFO, which it then never does, and no shim can tell.
		for i, lines := range []int{1, 3000, 30000, 300000} {
			cmd := d.command(run("--rm", img, fmt.Sprint("c2-", i), "cat")...)
			cmd.Stdin = strings.NewReader(strings.Repeat("a line\n", lines))
			watchdog := time.AfterFunc(20*time.Second, func() { _, _ = d.try("task", "kill", "-s", "KILL", fmt.Sprint("c2-", i)) })
			out, err := cmd.Output()
			watchdog.Stop()
			if err != nil || len(out) != 7*lines {
				t.Errorf("%d lines: %d bytes, %v", lines, len(out), err)
			}
		}
	})
	t.Run("terminal", func(t *testing.T) {
		if out := d.terminal(run("--rm", "-t", img, "c3", "tty")...); !strings.Contains(out, "/dev/") {
			t.Errorf("%q", out)
		}
	})
	t.Run("no such program", func(t *testing.T) {
		if out, err := d.try(run("--rm", img, "c4", "/no/such")...); err == nil || !strings.Contains(err.Error(), "/no/such") {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("detached", func(t *testing.T) {
		d := &daemon{t: t, dir: d.dir, socket: d.socket, cmd: d.cmd}
		d.ctr(run("-d", img, "c5", "sleep", "1000")...)
		if out := d.ctr("task", "exec", "--exec-id", "e1", "c5", "echo", "from exec"); out != "from exec\n" {
			t.Errorf("exec: %q", out)
		}
		if out := d.terminal("task", "exec", "-t", "--exec-id", "e2", "c5", "tty"); !strings.Contains(out, "/dev/") {
			t.Errorf("exec with a terminal: %q", out)
		}
		_, err := d.try("task", "exec", "--exec-id", "e3", "c5", "sh", "-c", "exit 9")
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 9 {
			t.Errorf("exec status: %v", err)
		}
		if out := d.ctr("task", "ls"); !strings.Contains(out, "RUNNING") {
			t.Errorf("ls: %q", out)
		}
		d.ctr("task", "pause", "c5")
		if out := d.ctr("task", "ls"); !strings.Contains(out, "PAUSED") {
			t.Errorf("ls: %q", out)
		}
		d.ctr("task", "resume", "c5")
		if out := d.ctr("task", "metrics", "c5"); !strings.Contains(out, "memory") {
			t.Errorf("metrics: %q", out)
		}
		if out := d.ctr("task", "ps", "c5"); len(strings.Split(strings.TrimSpace(out), "\n")) != 2 {
			t.Errorf("ps: %q", out)
		}

		// containerd dies and comes back: the shim and its container do not notice.
		dd := &daemon{t: t, dir: d.dir, socket: d.socket, cmd: d.cmd}
		dd.stop(syscall.SIGKILL)
		dd.start()
		*d.cmd = *dd.cmd
		if out := d.ctr("task", "exec", "--exec-id", "e4", "c5", "echo", "again"); out != "again\n" {
			t.Errorf("exec after the restart: %q", out)
		}
		d.ctr("task", "kill", "-s", "KILL", "c5")
		for out := ""; !strings.Contains(out, "STOPPED"); out = d.ctr("task", "ls") {
			time.Sleep(10 * time.Millisecond)
		}
		out, err := d.command("task", "rm", "c5").CombinedOutput()
		if !strings.Contains(string(out), "137") {
			t.Errorf("rm: %q, %v", out, err)
		}
		d.ctr("container", "rm", "c5")
	})
	t.Run("checkpoint", func(t *testing.T) {
		d := &daemon{t: t, dir: d.dir, socket: d.socket, cmd: d.cmd}
		if exec.Command("criu", "check").Run() == nil {
			t.Skip("criu works here: the VM's tests show what comes of it")
		}
		d.ctr(run("-d", img, "c8", "sleep", "1000")...)
		for _, args := range [][]string{
			{"task", "checkpoint", "--exit", "c8"}, {"task", "checkpoint", "--image-path", filepath.Join(d.dir, "images"), "c8"},
			{"container", "checkpoint", "--task", "c8", "saved"},
		} {
			if out, err := d.try(args...); err == nil || !strings.Contains(err.Error(), "cannot checkpoint container c8: criu failed") || !strings.Contains(err.Error(), "criu-dump.log") {
				t.Errorf("%v: %q, %v", args, out, err)
			}
			if out := d.ctr("task", "ls"); !strings.Contains(out, "RUNNING") {
				t.Errorf("after %v: %q", args, out)
			}
		}
		_, _ = d.try("task", "rm", "-f", "c8")
		d.ctr("container", "rm", "c8")
	})
	t.Run("created", func(t *testing.T) {
		d := &daemon{t: t, dir: d.dir, socket: d.socket, cmd: d.cmd}
		d.ctr("container", "create", "--runtime", binary, img, "c6", "true")
		d.ctr("task", "start", "c6")
		_, _ = d.try("task", "rm", "-f", "c6")
		d.ctr("container", "rm", "c6")
	})
	t.Run("shim killed", func(t *testing.T) {
		d := &daemon{t: t, dir: d.dir, socket: d.socket, cmd: d.cmd}
		d.ctr(run("-d", img, "c7", "sleep", "1000")...)
		pid, err := os.ReadFile(filepath.Join(d.dir, "state/io.containerd.runtime.v2.task/test/c7/shim.pid"))
		if err != nil {
			t.Fatal(err)
		}
		var n int
		if _, err := fmt.Sscan(string(pid), &n); err != nil {
			t.Fatal(err)
		}
		_ = unix.Kill(n, unix.SIGKILL)
		// containerd runs our "delete" then.
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if out, err := d.try("task", "ls"); err == nil && !strings.Contains(out, "c7") {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the task is still listed")
			}
		}
		d.ctr("container", "rm", "c7")
	})

	for _, topic := range []string{"create", "start", "exit", "delete"} {
		if !strings.Contains(seen.String(), "/tasks/"+topic+" ") {
			t.Errorf("no /tasks/%s among the events:\n%s", topic, seen.String())
		}
	}
	var order []string
	for _, line := range strings.Split(seen.String(), "\n") {
		if strings.Contains(line, `"c1"`) && strings.Contains(line, "/tasks/") {
			order = append(order, strings.Fields(line[strings.Index(line, "/tasks/"):])[0])
		}
	}
	if got := strings.Join(order, " "); got != "/tasks/create /tasks/start /tasks/exit /tasks/delete" {
		t.Errorf("events of c1: %s", got)
	}
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		left := shims(t)
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("shims are left: %v", left)
			break
		}
	}
}

// seenEvents is what ctr events has printed so far.
type seenEvents struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *seenEvents) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *seenEvents) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// shims lists the processes of our binary.
func shims(t *testing.T) (pids []string) {
	t.Helper()
	links, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, l := range links {
		if target, _ := os.Readlink(l); target == binary {
			pids = append(pids, filepath.Base(filepath.Dir(l)))
		}
	}
	return pids
}
