package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/managerd/managerd/test/harness"
)

// shimOf gives the process of a container's shim.
func (u *user) shimOf(id string) int {
	u.t.Helper()
	for _, pid := range u.Shims() {
		data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if strings.Contains(string(data), "\x00-id\x00"+id+"\x00") {
			return pid
		}
	}
	u.t.Fatalf("%s has no shim", id)
	return 0
}

// TestRemoveForced: containers rm -f and tasks rm -f end in nothing from every state, and again.
func TestRemoveForced(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	bundle := func(id string) string {
		return filepath.Join(u.State(), "io.containerd.runtime.v2.task", u.Namespace, id)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	running := func(id string) {
		t.Helper()
		_, err := c.run(id, "trap '' TERM; sleep 1000")
		must(err)
	}
	signal := func(id string, sig unix.Signal) {
		t.Helper()
		must(unix.Kill(u.shimOf(id), sig))
	}
	lose := func(id string) {
		t.Helper()
		must(errors.Join(unix.Unmount(filepath.Join(bundle(id), "rootfs"), unix.MNT_DETACH), os.RemoveAll(bundle(id))))
	}
	pause := func(id string) {
		t.Helper()
		_, err := c.tasks.Pause(c.ctx, &tasks.PauseTaskRequest{ContainerID: id})
		must(err)
	}
	execute := func(id, name, script string) {
		t.Helper()
		must(errors.Join(c.exec(id, name, script), c.start(id, name)))
	}
	states := map[string]func(id string){
		"no-task": func(id string) { must(c.make(id, "true")) },
		"created": func(id string) {
			must(c.make(id, "true"))
			_, err := c.create(id)
			must(err)
		},
		"running": running,
		"paused":  func(id string) { running(id); pause(id) },
		"stopped": func(id string) {
			_, err := c.run(id, "exit 3")
			must(err)
			_, err = c.wait(id, "")
			must(err)
		},
		"execs": func(id string) {
			running(id)
			execute(id, "e0", "trap '' TERM; sleep 1000")
			execute(id, "e1", "exit 3")
			must(c.exec(id, "e2", "true"))
		},
		"execs-shim-dead":    func(id string) { running(id); execute(id, "e0", "sleep 1000"); signal(id, unix.SIGKILL) },
		"execs-shim-stopped": func(id string) { running(id); execute(id, "e0", "sleep 1000"); signal(id, unix.SIGSTOP) },
		"unknown": func(id string) { // it ended while nobody of ours lived
			pid, err := c.run(id, "sleep 1000")
			must(err)
			must(u.Kill())
			signal(id, unix.SIGKILL)
			must(unix.Kill(int(pid), unix.SIGKILL))
			must(u.Start())
		},
		"mount-in-rootfs": func(id string) { // and somebody works in it
			running(id)
			at := filepath.Join(bundle(id), "rootfs", "tmp")
			must(errors.Join(os.MkdirAll(at, 0o755), unix.Mount("none", at, "tmpfs", 0, "")))
			held, err := os.Create(filepath.Join(at, "held"))
			must(err)
			t.Cleanup(func() { _ = held.Close() })
		},
		"bundle-half-gone": func(id string) {
			running(id)
			for _, name := range []string{"config.json", "table", "runc", "bootstrap.json", "ledger"} {
				must(os.RemoveAll(filepath.Join(bundle(id), name)))
			}
		},
		"bundle-half-gone-both-killed": func(id string) {
			running(id)
			must(u.Kill())
			signal(id, unix.SIGKILL)
			for _, name := range []string{"config.json", "table", "ledger"} {
				must(os.RemoveAll(filepath.Join(bundle(id), name)))
			}
			must(u.Start())
		},
		"shim-dead":          func(id string) { running(id); signal(id, unix.SIGKILL) },
		"shim-stopped":       func(id string) { running(id); signal(id, unix.SIGSTOP) },
		"shim-stopped-pause": func(id string) { running(id); pause(id); signal(id, unix.SIGSTOP) },
		"both-killed": func(id string) {
			running(id)
			must(u.Kill())
			signal(id, unix.SIGKILL)
			must(u.Start())
		},
		"bundle-missing":      func(id string) { running(id); lose(id) },
		"bundle-missing-stop": func(id string) { running(id); lose(id); signal(id, unix.SIGSTOP) },
		"rootfs-not-mounted":  func(id string) { running(id); must(unix.Unmount(filepath.Join(bundle(id), "rootfs"), unix.MNT_DETACH)) },
		"half-created": func(id string) {
			must(c.make(id, "true"))
			must(os.MkdirAll(filepath.Join(bundle(id), "rootfs"), 0o711))
		},
		"half-created-restart": func(id string) {
			must(c.make(id, "true"))
			must(os.MkdirAll(filepath.Join(bundle(id), "rootfs"), 0o711))
			must(os.WriteFile(filepath.Join(bundle(id), "config.json"), []byte("{"), 0o600))
			must(u.Kill())
			must(u.Start())
		},
		"half-deleted": func(id string) { // somebody deletes it, and its shim does not get on with it
			_, err := c.run(id, "exit 3")
			must(err)
			_, err = c.wait(id, "")
			must(err)
			signal(id, unix.SIGSTOP)
			ctx, cancel := context.WithTimeout(c.ctx, 300*time.Millisecond)
			defer cancel()
			if _, err := c.tasks.Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: id}); err == nil {
				t.Error("it was deleted")
			}
		},
	}
	if exec.Command("criu", "check").Run() == nil { // else it is older than the kernel; the VM has a pair that fits
		states["checkpointed"] = func(id string) { // and ended by that
			running(id)
			if out, err := harness.Output(u.Mctl("tasks", "checkpoint", "--exit", id)); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
		}
	}
	for state, reach := range states {
		t.Run(state, func(t *testing.T) {
			reach(state)
			for range 2 {
				begin := time.Now()
				if out, err := harness.Output(u.Mctl("--timeout", "90s", "containers", "rm", "-f", state)); err != nil {
					t.Fatalf("after %s: %v\n%s", time.Since(begin), err, out)
				}
				if out, err := harness.Output(u.Mctl("--timeout", "90s", "tasks", "rm", "-f", state)); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			if _, err := c.state(state, ""); status.Code(err) != codes.NotFound {
				t.Errorf("its task: %v", err)
			}
			if layers := c.layers(t); layers[state] != "" {
				t.Errorf("its snapshot: %s", layers[state])
			}
			if _, err := os.Lstat(bundle(state)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("its bundle: %v", err)
			}
			until(t, "its shim is gone", func() bool {
				for _, pid := range u.Shims() {
					data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
					if strings.Contains(string(data), "\x00-id\x00"+state+"\x00") {
						return false
					}
				}
				return true
			})
			for _, h := range []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
				if _, err := os.Stat(filepath.Join(h, u.Namespace, state)); err == nil {
					t.Errorf("its cgroup in %s is left", h)
				}
			}
			// The name can be had again.
			running(state)
			c.finish(t, state)
		})
	}
	if found := u.fsck(0); len(found) != 0 {
		t.Errorf("left: %v", found)
	}
}
