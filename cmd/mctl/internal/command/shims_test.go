package command_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// shim runs mctl shim, which must succeed.
func (w *world) shim(args ...string) string {
	w.Helper()
	return w.ok(append([]string{"shim", "--state", w.State()}, args...)...)
}

// shimFails runs mctl shim, which must fail and say all of these words.
func (w *world) shimFails(words []string, args ...string) {
	w.Helper()
	w.fails(1, words, append([]string{"shim", "--state", w.State()}, args...)...)
}

// killManager kills managerd, until startManager or the end of the test.
func (w *world) killManager() {
	w.Helper()
	if err := w.Kill(); err != nil {
		w.Fatal(err)
	}
	w.dead = true
	w.Cleanup(w.startManager) // it cleans up
}

func (w *world) startManager() {
	w.Helper()
	if !w.dead {
		return
	}
	if err := w.Start(); err != nil {
		w.Fatal(err)
	}
	w.dead = false
}

// shimRow is a shim as ls -o json shows it.
type shimRow struct {
	Namespace    string
	ID           string
	PID          int
	Condition    string
	ProcessState string `json:"process_state"`
	Version      string
	State        string
	ContainerPID int `json:"container_pid"`
	PSS          int64
}

func (w *world) decode(text string, into any) {
	w.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		w.Fatalf("%v: %s", err, text)
	}
}

func (w *world) shims(args ...string) map[string]shimRow {
	w.Helper()
	var rows []shimRow
	w.decode(w.shim(append([]string{"ls", "-o", "json"}, args...)...), &rows)
	out := map[string]shimRow{}
	for _, r := range rows {
		out[r.ID] = r
	}
	return out
}

// pause stops the shim of a container with SIGSTOP until the test ends, or resume is called.
func (w *world) pause(pid int) (resume func()) {
	w.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		w.Fatal(err)
	}
	resume = func() { _ = syscall.Kill(pid, syscall.SIGCONT) }
	w.Cleanup(resume)
	eventually(w.T, "the shim is stopped", func() bool {
		data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return strings.Contains(string(data), ") T ")
	})
	return resume
}

// killShim kills a shim with SIGKILL and waits until it is gone.
func (w *world) killShim(pid int) {
	w.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		w.Fatal(err)
	}
	eventually(w.T, "the shim is gone", func() bool {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid)) // the last of them closes the socket
		return err != nil || strings.Contains(string(data), ") Z ") && len(threads) <= 1
	})
}

// TestShimsWithoutManager: with managerd dead, everything can be asked of the shims, and done by them; the next managerd
// finds what was done.
func TestShimsWithoutManager(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "busybox", "one", "sleep", "1000")
	w.ok("run", "-d", "busybox", "two", "sleep", "1000")
	w.ok("tasks", "exec", "-d", "--exec-id", "e1", "one", "sleep", "1000")
	w.killManager()
	rows := w.shims()
	if len(rows) != 2 {
		t.Fatalf("ls: %v", rows)
	}
	for id, r := range rows {
		if r.Namespace != w.Namespace || r.Condition != "ok" || r.State != "running" || r.Version == "" || r.PSS < 1<<20 || r.PID <= 1 || r.ContainerPID <= 1 {
			t.Errorf("ls says of %s: %+v", id, r)
		}
	}
	if out := w.shim("ls"); strings.Count(out, "\n") != 3 || !strings.Contains(out, "MiB") {
		t.Errorf("ls: %s", out)
	}
	var d struct {
		ID        string
		Bundle    string
		PID       int
		Processes []struct {
			ExecID string `json:"exec_id"`
			PID    int
			State  string
		}
	}
	w.decode(w.shim("inspect", "one", "-o", "json"), &d)
	if d.ID != "one" || d.PID != rows["one"].PID || len(d.Processes) != 2 || d.Processes[0].PID != rows["one"].ContainerPID ||
		d.Processes[1].ExecID != "e1" || d.Processes[1].State != "running" || !strings.HasPrefix(d.Bundle, w.State()) {
		t.Errorf("inspect: %+v", d)
	}
	for what, words := range map[string][]string{
		"inspect": {"goroutines", "exec e1", d.Bundle},
		"state":   {"RUNNING", strconv.Itoa(rows["one"].ContainerPID)},
		"ps":      {strconv.Itoa(d.Processes[0].PID), strconv.Itoa(d.Processes[1].PID)},
		"metrics": {"pids.current"},
		"timings": {"create", "ms"},
		"stacks":  {"goroutine 1 ", "service.(*Service)"},
		"events":  {"/tasks/create", "/tasks/start", "/tasks/exec-started"},
		"exits":   {"CONTAINER"},
	} {
		out := w.shim(what, "one")
		for _, word := range words {
			if !strings.Contains(out, word) {
				t.Errorf("%s does not say %q: %s", what, word, out)
			}
		}
		for line := range strings.Lines(w.shim(what, "one", "-o", "json")) {
			if what == "events" && !json.Valid([]byte(line)) {
				t.Errorf("no JSON: %s", line)
			}
		}
	}
	// What is done, is done: an exec, then the container.
	w.shim("kill", "-s", "KILL", "--exec-id", "e1", "one")
	eventually(t, "the exec has ended", func() bool { return strings.Contains(w.shim("state", "--exec-id", "e1", "one"), "STOPPED") })
	if out := w.shim("delete", "--exec-id", "e1", "one"); !strings.Contains(out, "DELETED") {
		t.Errorf("delete: %s", out)
	}
	w.shimFails([]string{"e1"}, "state", "--exec-id", "e1", "one")
	w.shimFails([]string{"one", "running"}, "delete", "one")
	follower := w.begin("shim", "--state", w.State(), "events", "--follow", "one")
	follower.says(t, "/tasks/start")
	w.shim("kill", "-s", "9", "one")
	follower.says(t, `"exit_status":137`)
	eventually(t, "the container has ended", func() bool { return w.shims()["one"].State == "stopped" })
	var exits []struct {
		ExecID string `json:"exec_id"`
		Status int    `json:"exit_status"`
	}
	w.decode(w.shim("exits", "one", "-o", "json"), &exits)
	if len(exits) != 2 || exits[0].ExecID != "e1" || exits[1].ExecID != "" || exits[1].Status != 137 {
		t.Errorf("exits: %+v", exits)
	}
	if out := w.shim("delete", "one"); !strings.Contains(out, "137") {
		t.Errorf("delete: %s", out)
	}
	if status := follower.end(t); status != 0 {
		t.Errorf("events --follow: status %d: %s", status, &follower.errs)
	}
	eventually(t, "the shim has ended", func() bool { return w.shims()["one"].Condition == "dead" })
	w.startManager()
	eventually(t, "managerd knows that it is deleted", func() bool { return w.status("one") == "" })
	if got := w.status("two"); got != "RUNNING" {
		t.Errorf("two is %q", got)
	}
	eventually(t, "the bundle is removed", func() bool { return len(w.shims()) == 1 })
}

// TestShimsThatDoNotAnswer: one that is stopped is shown as such, holds nobody up, and what it has written down is read.
func TestShimsThatDoNotAnswer(t *testing.T) {
	w := newWorld(t)
	for _, id := range []string{"one", "two", "three"} {
		w.ok("run", "-d", "busybox", id, "sleep", "1000")
	}
	before := w.shims()
	w.killManager()
	resume := w.pause(before["one"].PID)
	resumeTwo := w.pause(before["two"].PID)
	begin := time.Now()
	rows := w.shims("--timeout", "1s")
	if took := time.Since(begin); took < time.Second || took > 1900*time.Millisecond {
		t.Errorf("two that do not answer take %v, not one second together", took)
	}
	for _, id := range []string{"one", "two"} {
		if r := rows[id]; r.Condition != "unresponsive" || r.ProcessState != "T" || r.PID != before[id].PID || r.PSS == 0 ||
			r.State != "running" || r.ContainerPID != before[id].ContainerPID {
			t.Errorf("ls says of %s: %+v", id, r)
		}
	}
	if r := rows["three"]; r.Condition != "ok" || r.Version == "" {
		t.Errorf("ls says of three: %+v", r)
	}
	if out := w.shim("ls", "--timeout", "200ms"); strings.Count(out, "unresponsive (T)") != 2 {
		t.Errorf("ls: %s", out)
	}
	for _, what := range []string{"inspect", "state", "ps", "metrics", "timings", "kill", "delete"} {
		w.shimFails([]string{"one", strconv.Itoa(before["one"].PID), "does not answer", "mctl shim blackbox one"}, what, "one", "--timeout", "200ms")
	}
	w.shimFails([]string{"one", "state T", "stacks"}, "stacks", "one", "--timeout", "200ms")
	w.shimFails([]string{"its shim lives"}, "adopt", "one")
	if out := w.shim("events", "one"); !strings.Contains(out, "/tasks/start") {
		t.Errorf("events: %s", out)
	}
	for _, word := range []string{"shim begins", "Create", "Start", "/tasks/start", "create"} {
		if out := w.shim("blackbox", "one"); !strings.Contains(out, word) {
			t.Errorf("the black box does not say %q: %s", word, out)
		}
	}
	var box []struct {
		Number uint64
		PID    int
		Kind   string
		Text   string
	}
	w.decode(w.shim("blackbox", "one", "--last", "3", "-o", "json"), &box)
	if len(box) != 3 || box[0].Number+2 != box[2].Number || box[2].PID != before["one"].PID {
		t.Errorf("the black box: %+v", box)
	}
	resume()
	resumeTwo()
	w.startManager()
	w.running("one")
}

// TestShimAdopt: without managerd a dead shim has a successor, and its container runs on; the next managerd finds both.
func TestShimAdopt(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "busybox", "one", "sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.05; done")
	before := w.shims()["one"]
	w.killManager()
	w.shimFails([]string{"its shim lives"}, "adopt", "one")
	w.killShim(before.PID)
	if r := w.shims()["one"]; r.Condition != "dead" || r.PID != 0 || r.State != "running" || r.ContainerPID != before.ContainerPID {
		t.Errorf("ls: %+v", r)
	}
	w.shimFails([]string{"one", "dead", "mctl shim adopt one", "mctl shim blackbox one"}, "state", "one")
	if out := w.shim("blackbox", "one"); !strings.Contains(out, "/tasks/start") {
		t.Errorf("the black box of a dead shim: %s", out)
	}
	w.shimFails([]string{"one", "not found"}, "stacks", "one")
	w.shimFails([]string{"nowhere", "--binary"}, "adopt", "--binary", "/nowhere", "one")
	var adopted []struct{ PID int }
	w.decode(w.shim("adopt", "one", "-o", "json"), &adopted)
	after := w.shims()["one"]
	if len(adopted) != 1 || after.PID != adopted[0].PID || after.PID == before.PID || after.Condition != "ok" || after.State != "running" ||
		after.ContainerPID != before.ContainerPID {
		t.Errorf("adopted %+v, ls says %+v, before %+v", adopted, after, before)
	}
	if out := w.shim("blackbox", "one"); !strings.Contains(out, strconv.Itoa(before.PID)) || !strings.Contains(out, "took over from a shim that died") {
		t.Errorf("the black box of a successor: %s", out)
	}
	w.startManager()
	w.running("one")
	if now := w.shims()["one"]; now.PID != after.PID {
		t.Errorf("managerd has another shim: %+v", now)
	}
	// While managerd lives, that is its business: it holds what was parked.
	resume := w.pauseManager()
	w.killShim(after.PID)
	w.shimFails([]string{"managerd runs"}, "adopt", "one")
	resume()
	eventually(t, "managerd has started a successor", func() bool { r := w.shims()["one"]; return r.Condition == "ok" && r.PID != after.PID })
	w.ok("tasks", "kill", "one")
	w.exits(7, "tasks", "wait", "one")
}

// pauseManager stops managerd until resume is called.
func (w *world) pauseManager() (resume func()) {
	w.Helper()
	return w.pause(w.PID())
}

// TestShimsThatAreNot: what cannot be found is said with what to do.
func TestShimsThatAreNot(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "busybox", "one", "sleep", "1000")
	w.shimFails([]string{"two", w.Namespace, "mctl shim ls"}, "state", "two")
	w.shimFails([]string{"one", "other", "-n " + w.Namespace}, "-n", "other", "inspect", "one")
	w.fails(1, []string{"--state"}, "shim", "--state", filepath.Join(w.Dir, "nowhere"), "ls")
	w.fails(2, []string{"FOO"}, "shim", "--state", w.State(), "kill", "-s", "FOO", "one")
	cmd := w.Mctl("shim", "ls", "-q")
	cmd.Env = append(os.Environ(), "MANAGERD_STATE="+w.State())
	if out, errs, status := w.run(cmd, ""); out != "one\n" || status != 0 {
		t.Errorf("status %d, %s%s", status, out, errs)
	}
	// A record that says nothing keeps nobody from seeing the others.
	broken := filepath.Join(w.State(), "io.containerd.runtime.v2.task", w.Namespace, "broken")
	if err := os.Mkdir(broken, 0o700); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(broken) }()
	if err := os.WriteFile(filepath.Join(broken, "bootstrap.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if rows := w.shims(); rows["broken"].Condition != "unreadable" || rows["one"].Condition != "ok" {
		t.Errorf("ls: %+v", rows)
	}
	w.shimFails([]string{"broken"}, "state", "broken")
	w.shimFails([]string{"broken", "ledger"}, "exits", "broken")
	w.shimFails([]string{"broken", "black box"}, "blackbox", "broken")
}
