package command_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestShimOfSandbox: the shim of a sandbox is named sandbox/ID, and with managerd dead it tells what that of a container does.
func TestShimOfSandbox(t *testing.T) {
	w := newWorld(t)
	w.ok("sandboxes", "run", "--pid", "pod")
	t.Cleanup(func() {
		w.ok("tasks", "rm", "-f", "member")
		w.ok("sandboxes", "rm", "-f", "pod")
	})
	w.ok("run", "-d", "--sandbox", "pod", "busybox", "member", "sleep", "1000")
	w.killManager()
	row := w.shims()["sandbox/pod"]
	if row.PID == 0 || row.Condition != "ok" || row.State == "" {
		t.Fatalf("ls: %s", w.shim("ls"))
	}
	for _, c := range []struct {
		args  []string
		words []string
	}{
		{[]string{"inspect"}, []string{fmt.Sprint(row.PID), "pod", "ipc", "uts", "running"}},
		{[]string{"stacks"}, []string{"goroutine 1 "}},
		{[]string{"blackbox"}, []string{"CreateSandbox", "StartSandbox"}},
		{[]string{"events"}, []string{"/sandboxes/create", "/sandboxes/start"}},
		{[]string{"timings"}, []string{"create.sandbox"}},
		{[]string{"pprof", "goroutine", "--debug", "1"}, []string{"goroutine profile: total"}},
		{[]string{"upgrade"}, []string{"sandbox/pod", "upgraded"}},
	} {
		args := append([]string{c.args[0], "sandbox/pod"}, c.args[1:]...)
		out := w.shim(args...)
		for _, word := range c.words {
			if !strings.Contains(out, word) {
				t.Errorf("%v does not say %q: %s", args, word, out)
			}
		}
	}
	if now := w.shims()["sandbox/pod"]; now.PID != row.PID || now.Condition != "ok" {
		t.Errorf("after the upgrade: %+v", now)
	}
	w.shimFails([]string{"pod"}, "inspect", "pod")
	w.shimFails([]string{"sandbox/nobody"}, "inspect", "sandbox/nobody")
	resume := w.pause(row.PID)
	if out := w.shim("blackbox", "sandbox/pod"); !strings.Contains(out, "StartSandbox") {
		t.Errorf("blackbox of a stopped shim: %s", out)
	}
	resume()
	w.startManager()
	w.exits(3, "tasks", "exec", "member", "sh", "-c", "exit 3")
}

// TestUpgradeShimsOfSandboxes: a daemon that finds another shim on disk replaces those of sandboxes too, in place.
func TestUpgradeShimsOfSandboxes(t *testing.T) {
	w := newWorld(t)
	w.ok("sandboxes", "run", "pod")
	t.Cleanup(func() {
		w.ok("tasks", "rm", "-f", "member")
		w.ok("sandboxes", "rm", "-f", "pod")
	})
	w.ok("run", "-d", "--sandbox", "pod", "busybox", "member", "sleep", "1000")
	before := w.shims()
	w.killManager()
	dir := t.TempDir()
	next, config := filepath.Join(dir, "shim-runc"), filepath.Join(dir, "config.toml")
	build := exec.Command("go", "build", "-tags", "seccomp no_grpc netgo osusergo", "-o", next,
		"-ldflags", "-X github.com/managerd/managerd/shimapi/version.Version=next", "github.com/managerd/managerd/cmd/shim-runc")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	text := fmt.Sprintf("version = 3\n[plugins.'io.containerd.runtime.v2.task']\nshim = %q\nupgrade_shims = 'always'\n", next)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	w.Args = append(w.Args, "--config", config)
	w.startManager()
	for _, id := range []string{"sandbox/pod", "member"} {
		eventually(t, id+" is upgraded", func() bool { return w.shims()[id].Version == "next" })
		if now := w.shims()[id]; now.PID != before[id].PID {
			t.Errorf("the shim of %s is process %d, was %d", id, now.PID, before[id].PID)
		}
	}
	w.exits(3, "tasks", "exec", "member", "sh", "-c", "exit 3")
	if out := w.ok("sandboxes", "ls"); !strings.Contains(out, "pod") {
		t.Errorf("%s", out)
	}
}
