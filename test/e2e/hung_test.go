package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/managerd/managerd/shimapi/mount"
	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/hungfs"
)

// prompt is how long anything may take that does not concern what hangs; docs/reliability.md says what it takes.
const prompt = 10 * time.Second

// lively fails the test unless all that does not concern what hangs goes on: another container from its making to its end, an
// exec, lists, metrics; and with restart the start of a daemon.
func lively(t *testing.T, u *user, c *client, what string, restart bool) {
	t.Helper()
	const id = "other"
	steps := []struct {
		name string
		do   func() error
	}{
		{"list", func() error { _, err := harness.Output(u.Mctl("tasks", "ls")); return err }},
		{"metrics", func() error { _, err := c.tasks.Metrics(c.ctx, &tasks.MetricsRequest{}); return err }},
		{"run", func() error { _, err := c.run(id, "exec sleep 1000"); return err }},
		{"exec", func() error {
			err := c.exec(id, "e", "exit 3")
			if err == nil {
				err = c.start(id, "e")
			}
			if err == nil {
				var got uint32
				if got, err = c.wait(id, "e"); err == nil && got != 3 {
					err = fmt.Errorf("it ended with %d", got)
				}
			}
			return err
		}},
		{"remove", func() error { _, err := harness.Output(u.Mctl("containers", "rm", "-f", id)); return err }},
	}
	if restart {
		steps = append([]struct {
			name string
			do   func() error
		}{{"start of the daemon", func() error {
			if err := u.Kill(); err != nil {
				return err
			}
			return u.Start()
		}}}, steps...)
	}
	var took []string
	for _, s := range steps {
		begin := time.Now()
		if err := s.do(); err != nil {
			t.Errorf("%s, and %s: %v", what, s.name, err)
		}
		d := time.Since(begin)
		if took = append(took, fmt.Sprintf("%s %s", s.name, d.Round(time.Millisecond))); d > prompt {
			t.Errorf("%s, and %s takes %s", what, s.name, d)
		}
	}
	t.Logf("%s: %s", what, strings.Join(took, ", "))
}

// newest gives the newest process of a container.
func newest(t *testing.T, c *client, id string) (pid uint32) {
	t.Helper()
	resp, err := c.tasks.ListPids(c.ctx, &tasks.ListPidsRequest{ContainerID: id})
	if err != nil {
		t.Fatal(err)
	}
	var latest int
	for _, p := range resp.Processes {
		data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Pid))
		f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
		if len(f) < 20 {
			continue
		}
		if began, err := strconv.Atoi(f[19]); err == nil && (began > latest || began == latest && p.Pid > pid) {
			latest, pid = began, p.Pid
		}
	}
	return pid
}

// TestHungMount: a container whose volume, or root file system, does not answer holds up nobody else. It can be removed as
// soon as its processes can be ended; if they cannot, who they are and where they wait is said, and the rest is done when
// the file system answers again.
func TestHungMount(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	for _, k := range []struct {
		name    string
		restart bool // the daemon, while it hangs
		stuck   bool // it ignores that a process which waits has been killed
		root    bool // it is the root file system that hangs
	}{
		{"killable", false, false, false},
		{"killable-restart", true, false, false},
		{"uninterruptible-restart", true, true, false},
		{"rootfs-killable-restart", true, false, true},
		{"rootfs-uninterruptible", false, true, true},
	} {
		t.Run(k.name, func(t *testing.T) {
			id := k.name
			backing := t.TempDir()
			if err := c.prepare(id); err != nil {
				t.Fatal(err)
			}
			rootfs, err := c.mounts(id)
			if err == nil && k.root {
				if err = mount.Mount(rootfs, backing); err == nil {
					t.Cleanup(func() { // after hungfs has ended
						if err := mount.Unmount(backing); err != nil {
							t.Error(err)
						}
					})
				}
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(backing, "f"), []byte("x"), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
			fs := hungfs.Over(t, backing)
			s, err := c.sh(id, "while :; do cat /f /vol/f >/dev/null; done")
			if err != nil {
				t.Fatal(err)
			}
			if k.root {
				rootfs = []*types.Mount{{Type: "bind", Source: fs.Dir, Options: []string{"rbind", "rw"}}}
			} else {
				s.Mounts = append(s.Mounts, specs.Mount{Destination: "/vol", Type: "bind", Source: fs.Dir, Options: []string{"rbind", "rw"}})
			}
			if err := c.container(id, s); err != nil {
				t.Fatal(err)
			}
			if _, err = c.tasks.Create(c.ctx, &tasks.CreateTaskRequest{ContainerID: id, Rootfs: rootfs}); err != nil {
				t.Fatal(err)
			}
			if err := c.start(id, ""); err != nil {
				t.Fatal(err)
			}
			hang := fs.Hang
			if k.stuck {
				hang = fs.Stall
			}
			hang(t, true)
			again := func() { hang(t, false) }
			defer func() { again() }()
			var waits uint32
			until(t, "it waits for its volume", func() bool { // each command is another process, but for the one that waits
				waits = newest(t, c, id)
				time.Sleep(300 * time.Millisecond)
				return newest(t, c, id) == waits
			})
			lively(t, u, c, "a file system hangs", k.restart)
			begin := time.Now()
			out, err := harness.Output(u.Mctl("--timeout", "90s", "containers", "rm", "-f", id))
			t.Logf("rm -f after %s: %v %s", time.Since(begin).Round(time.Millisecond), err, out)
			// Which of them can be ended is the kernel's: one that closes a file cannot (FUSE_FLUSH), nor one whose request was
			// taken and is not answered; one whose request nobody has read yet can. Whatever it is must be what is said.
			if err == nil {
				if _, err := os.Stat(fmt.Sprint("/proc/", waits)); !os.IsNotExist(err) {
					t.Fatalf("it was removed, though process %d of it is there: %v", waits, err)
				}
			} else {
				has(t, err.Error(), fmt.Sprint(waits), "state D", "wchan", "cgroup")
				lively(t, u, c, "a process cannot be ended", k.restart)
				again()
				again = func() {}
				until(t, "the rest is removed by itself", func() bool {
					_, err := c.state(id, "")
					return status.Code(err) == codes.NotFound
				})
				if out, err := harness.Output(u.Mctl("containers", "rm", "-f", id)); err != nil {
					t.Errorf("%v\n%s", err, out)
				}
			}
			if _, err := os.Lstat(filepath.Join(u.State(), "io.containerd.runtime.v2.task", u.Namespace, id)); !os.IsNotExist(err) {
				t.Errorf("its bundle: %v", err)
			}
		})
	}
}

// TestHungSnapshotter: a snapshotter whose file system does not answer is not there, and is as soon as it does. Whoever asks
// for it is told, and nobody else waits.
func TestHungSnapshotter(t *testing.T) {
	u := newUser(t)
	fs := hungfs.Over(t, t.TempDir())
	file := filepath.Join(u.Dir, "config.toml")
	config := fmt.Sprintf("version = 3\n[plugins.'io.containerd.snapshotter.v1.native']\nroot_path = '%s'\n", fs.Dir)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := u.Stop(); err != nil {
		t.Fatal(err)
	}
	u.Args = append(u.Args, "--config", file)
	if err := u.Start(); err != nil {
		t.Fatal(err)
	}
	c := newClient(t, u.Daemon)
	u.ctr("snapshots", "--snapshotter", "native", "prepare", "before")

	fs.Hang(t, true)
	defer fs.Hang(t, false)
	cmd := u.Command("snapshots", "--snapshotter", "native", "prepare", "while")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lively(t, u, c, "a snapshotter hangs", false)
	lively(t, u, c, "a snapshotter hangs", true)
	if err := cmd.Wait(); err == nil {
		t.Error("a snapshot was made though the snapshotter hung")
	}
	has(t, u.mctl("plugins", "ls"), "native")
	text := u.fails(1, "snapshots", "--snapshotter", "native", "prepare", "hung")
	has(t, text, "native", "does not answer")
	fs.Hang(t, false)
	until(t, "it is there", func() bool {
		_, err := harness.Output(u.Command("snapshots", "--snapshotter", "native", "rm", "before"))
		return err == nil
	})
	if found := u.fsck(0); len(found) != 0 {
		t.Errorf("left: %v", found)
	}
}

// TestHungClient: clients that ask and never read, that stop in the middle of a request, or are stopped, hold up nobody, the
// end of the daemon included.
func TestHungClient(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	if _, err := c.run("long", "exec sleep 1000"); err != nil {
		t.Fatal(err)
	}
	stopped := u.Mctl("events")
	said, err := stopped.StdoutPipe()
	if err == nil {
		err = stopped.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = stopped.Process.Kill()
		_ = stopped.Wait()
	}()
	first := make(chan error, 1)
	go func() {
		_, err := said.Read(make([]byte, 1))
		first <- err
	}()
	until(t, "a client has its first event", func() bool {
		if err := c.publish("/test/first", ""); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-first:
			return err == nil
		default:
			return false
		}
	})
	if err := stopped.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer neverReading(t, c, u.Socket(), 4)()
	defer halfOpen(t, u.Socket(), 20)()
	for i := range 3000 { // more than the sockets and a subscriber's backlog hold
		if err := c.publish(fmt.Sprintf("/test/%d", i), strings.Repeat("x", 1000)); err != nil {
			t.Fatal(err)
		}
	}
	lively(t, u, c, "clients hang", false)
	begin := time.Now()
	if err := u.Stop(); err != nil {
		t.Fatal(err)
	}
	t.Logf("the daemon ends after %s", time.Since(begin).Round(time.Millisecond))
	if err := u.Start(); err != nil {
		t.Fatal(err)
	}
	lively(t, u, c, "clients hang, the daemon is another one", false)
	c.finish(t, "long")
}

// TestHungLogger: a container's logger that is stopped holds up its container, which can be removed, and nobody else.
func TestHungLogger(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	pids := filepath.Join(u.Dir, "logger.pid")
	script := filepath.Join(u.Dir, "logger")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho $$ >"+pids+"\nexec 5>&-\nexec cat <&3 >/dev/null\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, restart := range []bool{false, true} {
		id := fmt.Sprintf("logged-%v", restart)
		if err := c.make(id, "while :; do echo "+strings.Repeat("x", 1000)+"; done"); err != nil {
			t.Fatal(err)
		}
		m, err := c.mounts(id)
		if err == nil {
			_, err = c.tasks.Create(c.ctx, &tasks.CreateTaskRequest{ContainerID: id, Rootfs: m, Stdout: "binary://" + script})
		}
		if err == nil {
			err = c.start(id, "")
		}
		if err != nil {
			t.Fatal(err)
		}
		var pid int
		until(t, "the logger has begun", func() bool {
			data, err := os.ReadFile(pids)
			if err == nil {
				_, err = fmt.Sscan(string(data), &pid)
			}
			return err == nil
		})
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		lively(t, u, c, "a logger hangs", restart)
		begin := time.Now()
		if out, err := harness.Output(u.Mctl("--timeout", "90s", "containers", "rm", "-f", id)); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		t.Logf("rm -f took %s", time.Since(begin).Round(time.Millisecond))
		_ = unix.Kill(pid, unix.SIGCONT)
		until(t, "the logger is gone", func() bool { return unix.Kill(pid, 0) != nil })
		if err := os.Remove(pids); err != nil {
			t.Fatal(err)
		}
	}
}
