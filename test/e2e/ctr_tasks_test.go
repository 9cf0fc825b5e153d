package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// waiting is a container that ends with 3 when it is told to, and is there once /ready is.
const waiting = "sleep 1000 & trap 'exit 3' TERM; >/ready; wait"

// ready waits until a container that runs waiting has its trap.
func (u *user) ready(id string) {
	u.t.Helper()
	u.ctr("t", "exec", "--exec-id", "ready", id, "sh", "-c", "until [ -e /ready ]; do sleep 0.01; done")
}

// TestCtrTasks: a container from its creation to its end, each step looked at from outside.
func TestCtrTasks(t *testing.T) { eachCtr(t, testCtrTasks) }

func testCtrTasks(t *testing.T) {
	u := newUser(t)
	u.ctr("run", "-d", "--memory-limit", fmt.Sprint(limit), "--env", "A=b", "--label", "k=v", ref, "box", "sh", "-c", waiting)
	u.ready("box")

	equal(t, "c ls", strings.Join(row(t, u.ctr("c", "ls"), "box"), " "), "box "+ref+" io.containerd.runc.v2")
	var info struct {
		ID, Image, SnapshotKey, Snapshotter string
		Labels                              map[string]string
		Spec                                struct {
			Process struct{ Args, Env []string }
			Linux   struct {
				Resources struct{ Memory struct{ Limit int64 } }
			}
		}
	}
	if err := json.Unmarshal([]byte(u.ctr("c", "info", "box")), &info); err != nil {
		t.Fatal(err)
	}
	if info.ID != "box" || info.Image != ref || info.SnapshotKey != "box" || info.Snapshotter != snapshotter || info.Labels["k"] != "v" ||
		strings.Join(info.Spec.Process.Args, " ") != "sh -c "+waiting || info.Spec.Linux.Resources.Memory.Limit != limit {
		t.Errorf("c info: %+v", info)
	}
	labels := strings.Split(strings.TrimSpace(u.ctr("c", "label", "box", "k=", "z=y")), ",")
	slices.Sort(labels)
	equal(t, "labels", strings.Join(labels, " "), "io.containerd.image.config.stop-signal=SIGTERM z=y")
	equal(t, "c ls with a filter", u.ctr("c", "ls", "-q", "labels.z==y"), "box\n")

	task := row(t, u.ctr("t", "ls"), "box")
	equal(t, "state", task[2], "RUNNING")
	has(t, u.ctr("t", "ps", "box"), task[1])
	metrics := u.ctr("t", "metrics", "box")
	equal(t, "memory limit", row(t, metrics, "memory.limit_in_bytes")[1], fmt.Sprint(limit))
	if row(t, metrics, "memory.usage_in_bytes")[1] == "0" || row(t, metrics, "pids.current")[1] == "0" {
		t.Errorf("no metrics:\n%s", metrics)
	}

	equal(t, "exec", u.ctr("t", "exec", "--exec-id", "e1", "box", "sh", "-c", "echo $A $(pwd)"), "b /\n")
	u.fails(9, "t", "exec", "--exec-id", "e1", "box", "sh", "-c", "exit 9")
	equal(t, "exec as another user", u.ctr("t", "exec", "--user", "1000", "--cwd", "/tmp", "--exec-id", "e1", "box", "sh", "-c", "id -u; pwd"), "1000\n/tmp\n")
	has(t, u.fails(1, "t", "exec", "--exec-id", "e1", "box", "/nosuch"), "/nosuch", "no such file")
	u.ctr("t", "exec", "-d", "--exec-id", "long", "box", "sleep", "1000")
	has(t, u.fails(1, "t", "exec", "--exec-id", "long", "box", "true"), "long", "already exists")
	u.ctr("t", "kill", "--exec-id", "long", "-s", "KILL", "box")
	until(t, "end of the exec", func() bool { return strings.Count(u.ctr("t", "ps", "box"), "\n") == 3 })
	u.fails(137, "t", "rm", "--exec-id", "long", "box") // the exec's own status

	u.ctr("t", "pause", "box")
	equal(t, "paused", row(t, u.ctr("t", "ls"), "box")[2], "PAUSED")
	has(t, u.fails(1, "t", "exec", "--exec-id", "e2", "box", "true"), "box", "paused")
	u.ctr("t", "resume", "box")
	equal(t, "resumed", row(t, u.ctr("t", "ls"), "box")[2], "RUNNING")
	has(t, u.fails(1, "t", "resume", "box"), "box")

	has(t, u.fails(1, "t", "rm", "box"), "must be stopped before deletion")
	has(t, u.fails(1, "c", "rm", "box"), "box")
	has(t, u.fails(1, "t", "start", "box"), "box", "already exists")
	u.ctr("t", "kill", "-s", "TERM", "box")
	until(t, "end", func() bool { return row(t, u.ctr("t", "ls"), "box")[2] == "STOPPED" })
	has(t, u.fails(1, "t", "kill", "box"), "box")
	u.ctr("t", "rm", "box")
	equal(t, "t ls", u.ctr("t", "ls", "-q"), "")
	u.ctr("c", "rm", "box")
	equal(t, "c ls", u.ctr("c", "ls", "-q"), "")
	for _, args := range [][]string{
		{"c", "info", "box"}, {"c", "label", "box", "a=b"}, {"t", "start", "box"}, {"t", "kill", "box"}, {"t", "pause", "box"},
		{"t", "exec", "--exec-id", "x", "box", "true"}, {"t", "ps", "box"}, {"t", "metrics", "box"}, {"t", "rm", "box"},
	} {
		has(t, u.fails(1, args...), "box", "not found")
	}

	// In two steps: made, and started by somebody else, with its output and its code.
	u.ctr("c", "create", ref, "steps", "awk", `BEGIN { print "started"; exit 4 }`) // this command takes -c for its own
	equal(t, "no task yet", u.ctr("t", "ls", "-q"), "")
	out := u.Command("t", "start", "steps")
	var said bytes.Buffer
	out.Stdout = &said
	if err := out.Run(); err == nil || out.ProcessState.ExitCode() != 4 {
		t.Errorf("t start: %v, not exit status 4", err)
	}
	equal(t, "output", said.String(), "started\n")
	u.ctr("c", "rm", "steps")
}

// TestCtrAttach: a second client takes over the output of a container, and its exit status.
func TestCtrAttach(t *testing.T) { eachCtr(t, testCtrAttach) }

func testCtrAttach(t *testing.T) {
	u := newUser(t)
	u.ctr("run", "-d", ref, "box", "sh", "-c", "trap 'echo ending; exit 6' TERM; sleep 1000 & >/ready; wait")
	u.ready("box")
	attach := u.Command("t", "attach", "box")
	var said bytes.Buffer
	attach.Stdout = &said
	if err := attach.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "attachment", func() bool { return reads(t, attach.Process.Pid, "box-stdout") })
	u.ctr("t", "kill", "box")
	watch := time.AfterFunc(patience, func() { _ = attach.Process.Kill() })
	_ = attach.Wait()
	watch.Stop()
	if code := attach.ProcessState.ExitCode(); code != 6 {
		t.Errorf("attach: exit status %d, not 6", code)
	}
	equal(t, "output", said.String(), "ending\n")
	u.ctr("c", "rm", "box") // attach has deleted the task
}

// reads says whether a process has a file of that name open for reading.
func reads(t *testing.T, pid int, name string) bool {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err != nil || filepath.Base(target) != name {
			continue
		}
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, filepath.Base(fd)))
		var pos, flags int64
		if _, serr := fmt.Sscanf(string(info), "pos: %d\nflags: %o", &pos, &flags); err == nil && serr == nil && flags&unix.O_PATH == 0 {
			return true
		}
	}
	return false
}

// TestCtrEvents: the stream tells what happened, in order, once.
func TestCtrEvents(t *testing.T) { eachCtr(t, testCtrEvents) }

func testCtrEvents(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	watched := u.Command("events")
	var said lines
	watched.Stdout = &said
	if err := watched.Start(); err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() {
		_ = watched.Process.Kill()
		_ = watched.Wait()
	})
	defer stop()
	// Nobody tells that a subscription of this ctr stands: something is done until it is heard of.
	n := 0
	until(t, "first event", func() bool {
		n++
		u.ctr("ns", "label", u.Namespace, fmt.Sprintf("n=%d", n))
		return strings.Contains(said.String(), "/namespaces/update")
	})
	u.ctr("images", "tag", ref, "example.org/y:1")
	u.ctr("images", "rm", "example.org/y:1")
	u.fails(2, "run", "--rm", ref, "box", "sh", "-c", "exit 2")
	u.ctr("run", "-d", ref, "more", "sleep", "1000")
	u.ctr("t", "exec", "--exec-id", "e", "more", "true")
	u.ctr("t", "pause", "more")
	u.ctr("t", "resume", "more")
	c.finish(t, "more")
	want := []string{
		"/images/create", "/images/delete",
		"/snapshot/prepare", "/containers/create", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete", "/snapshot/remove", "/containers/delete",
		"/snapshot/prepare", "/containers/create", "/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit",
		"/tasks/paused", "/tasks/resumed", "/tasks/exit", "/tasks/delete", "/containers/delete", "/snapshot/remove",
	}
	topics := func() (got []string) {
		for _, line := range strings.Split(said.String(), "\n") {
			if f := strings.Fields(line); len(f) > 5 && f[4] == u.Namespace && f[5] != "/namespaces/update" && f[5] != "/content/delete" { // the collector, when it likes
				got = append(got, f[5])
			}
		}
		return got
	}
	until(t, "last event", func() bool { return len(topics()) >= len(want) })
	stop()
	equal(t, "topics", strings.Join(topics(), "\n"), strings.Join(want, "\n"))
	at := `"20`
	if containerd2 != "" {
		at = `{"seconds":`
	}
	has(t, said.String(), `/tasks/exit {"container_id":"box","id":"box","pid":`, `"exit_status":2,"exited_at":`+at, `/images/create {"name":"example.org/y:1"}`)
}

// lines is what a command wrote so far.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
