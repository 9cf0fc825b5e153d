package command_test

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestCheckpoint: a container is saved and made again, with what it has changed, without its processes; that needs no criu.
// With them, mctl says what is wrong, and how criu can be had.
func TestCheckpoint(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "busybox", "box", "sh", "-c", "echo changed >/file; sleep 1000")
	eventually(t, "the file is there", func() bool {
		out, _, _ := w.mctl("tasks", "exec", "box", "cat", "/file")
		return out == "changed\n"
	})
	w.ok("containers", "checkpoint", "--rw", "--image", "box", "saved:1")
	if s := w.status("box"); s != "RUNNING" {
		t.Errorf("it is %s afterwards", s)
	}
	w.ok("containers", "restore", "-d", "--rw", "other", "saved:1")
	if out := w.ok("tasks", "exec", "other", "cat", "/file"); out != "changed\n" {
		t.Errorf("the file: %q", out)
	}
	var info struct {
		Image   string
		Runtime struct{ Name string }
		Spec    struct {
			Linux struct{ CgroupsPath string }
		}
	}
	if err := json.Unmarshal([]byte(w.ok("containers", "info", "other")), &info); err != nil {
		t.Fatal(err)
	}
	if info.Image != busybox || info.Runtime.Name != "io.containerd.runc.v2" || !strings.HasSuffix(info.Spec.Linux.CgroupsPath, "/other") {
		t.Errorf("what was made: %+v", info)
	}
	w.ok("tasks", "rm", "-f", "other")
	w.ok("containers", "rm", "other")

	w.fails(1, []string{"saved:1", "no processes", "--task"}, "containers", "restore", "--live", "-d", "other", "saved:1")
	w.fails(1, []string{busybox, "no checkpoint"}, "containers", "restore", "-d", "other", busybox)
	w.fails(1, []string{"none:1", "images ls"}, "containers", "restore", "-d", "other", "none:1")
	w.fails(1, []string{"nobody", "containers ls"}, "containers", "checkpoint", "nobody", "saved:2")
	if exec.Command("criu", "check").Run() != nil {
		images := filepath.Join(t.TempDir(), "images")
		for _, args := range [][]string{
			{"tasks", "checkpoint", "box"}, {"tasks", "checkpoint", "--image-path", images, "box"}, {"containers", "checkpoint", "--task", "box", "saved:2"},
		} {
			w.fails(1, []string{"cannot checkpoint container box", "criu", "kernel", "criu-dump.log"}, args...)
			if s := w.status("box"); s != "RUNNING" {
				t.Errorf("after %v it is %s", args, s)
			}
		}
	}
	if out := w.ok("containers", "ls", "-q"); out != "box\n" {
		t.Errorf("containers: %q", out)
	}
	w.ok("tasks", "rm", "-f", "box")
	w.ok("containers", "rm", "box")
	w.ok("images", "rm", "saved:1")
}
