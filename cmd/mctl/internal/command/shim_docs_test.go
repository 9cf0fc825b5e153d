package command_test

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// operations gives the commands of the section of docs/operations.md, a list for each of its blocks.
func operations(t *testing.T, section string) (blocks [][]string) {
	t.Helper()
	data, err := os.ReadFile("../../../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, found := strings.Cut(string(data), "\n## "+section+"\n")
	if !found {
		t.Fatalf("docs/operations.md has no section %q", section)
	}
	text, _, _ := strings.Cut(after, "\n## ")
	in := false
	for line := range strings.Lines(text) {
		command, ok := strings.CutPrefix(line, "    ")
		if ok && !in {
			blocks = append(blocks, nil)
		}
		if in = ok; ok {
			blocks[len(blocks)-1] = append(blocks[len(blocks)-1], strings.TrimSpace(command))
		}
	}
	return blocks
}

// TestOperationsWithoutManager: the commands that docs/operations.md has for when managerd is gone work when it is gone:
// with the shim alive, stopped, killed, and replaced.
func TestOperationsWithoutManager(t *testing.T) {
	blocks := operations(t, "Without managerd")
	if len(blocks) != 4 {
		t.Fatalf("%d blocks, not 4: %q", len(blocks), blocks)
	}
	w := newWorld(t)
	w.ok("run", "-d", "busybox", "web", "sleep", "1000")
	w.killManager()
	do := func(block int) (said string) {
		for _, line := range blocks[block] {
			cmd := exec.Command("sh", "-c", line)
			cmd.Env = append(os.Environ(), "PATH="+w.Bin+":"+os.Getenv("PATH"), "MANAGERD_STATE="+w.State(), "MANAGERD_NAMESPACE="+w.Namespace,
				"MANAGERD_ADDRESS="+w.Socket())
			out, errs, status := w.run(cmd, "")
			if status != 0 || errs != "" {
				t.Errorf("%s: status %d: %s, %q", line, status, out, errs)
			}
			said += out
		}
		return said
	}
	says := func(block int, words ...string) {
		said := do(block)
		for _, word := range words {
			if !strings.Contains(said, word) {
				t.Errorf("block %d does not say %q: %s", block, word, said)
			}
		}
	}
	pid := w.shims()["web"].PID
	says(0, "ok", "goroutines", "RUNNING", "pids.current", "create", "/tasks/start", "Start", "goroutine 1 ", "PID   USER", "goroutine profile: total")
	resume := w.pause(pid)
	says(1, "unresponsive (T)", "shim begins", "/tasks/start")
	w.killShim(pid)
	resume()
	if err := syscall.Kill(w.containerPID("web"), 0); err != nil {
		t.Fatalf("the container died with its shim: %v", err)
	}
	says(2, "dead", "/tasks/start")
	if r := w.shims()["web"]; r.Condition != "ok" || r.PID == pid {
		t.Errorf("the successor: %+v", r)
	}
	says(3, "DELETED", "137")
}

func (w *world) containerPID(id string) int {
	w.Helper()
	return w.shims()[id].ContainerPID
}
