package command_test

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestShimExec: with managerd dead, a further process runs in a container with its streams here, and only the container's name is
// known.
func TestShimExec(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "--env", "OWN=1", "busybox", "one", "sleep", "1000")
	w.killManager()
	shim := []string{"shim", "--state", w.State()}
	do := func(input string, args ...string) (out, errs string, status int) {
		t.Helper()
		return w.run(w.Mctl(append(shim, args...)...), input)
	}
	if out, errs, status := do("hello", "exec", "-e", "KEY=x", "--cwd", "/bin", "one", "sh", "-c", `cat; echo " $OWN$KEY $PWD"; echo err >&2; exit 4`); out != "hello 1x /bin\n" || errs != "err\n" || status != 4 {
		t.Errorf("%q, %q, status %d", out, errs, status)
	}
	if out, errs, status := do("", "exec", "-u", "65534", "one", "id", "-u"); out != "65534\n" || errs != "" || status != 0 {
		t.Errorf("%q, %q, status %d", out, errs, status)
	}
	if _, errs, status := do("", "exec", "--timeout", "300ms", "one", "sh", "-c", "sleep 1000 & sleep 1000"); status != 137 || !strings.Contains(errs, "its --timeout of 300ms was over") {
		t.Errorf("%q, status %d", errs, status)
	}
	if _, errs, status := do("", "exec", "--timeout", "1h", "one", "sh", "-c", "kill -9 $$"); status != 137 || errs != "" {
		t.Errorf("%q, status %d", errs, status)
	}
	eventually(t, "what the exec had begotten is gone", func() bool { return strings.Count(w.shim("ps", "one"), "\n") == 2 })
	w.shimFails([]string{"one", "/no/such"}, "exec", "one", "/no/such")
	w.shimFails([]string{"two", "mctl shim ls"}, "exec", "two", "true")
	w.fails(2, []string{"--timeout"}, append(shim, "exec", "--timeout", "-1s", "one", "true")...)
	w.fails(2, []string{"terminal", "--detach"}, append(shim, "exec", "-t", "one", "true")...)
	if strings.Contains(w.shim("inspect", "one"), "exec ") {
		t.Errorf("execs are left: %s", w.shim("inspect", "one"))
	}
	if left, _ := filepath.Glob(filepath.Join(w.State(), "fifo", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	resume := w.pause(w.shims()["one"].PID)
	w.shimFails([]string{"one", "does not answer", "mctl shim blackbox one"}, "exec", "one", "true")
	w.shimFails([]string{"one", "does not answer", "mctl shim blackbox one"}, "pprof", "one", "heap", "--timeout", "300ms")
	resume()
	w.startManager()
	w.running("one")
}

// TestTasksExecTimeout: the time limit goes by way of managerd, too.
func TestTasksExecTimeout(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "busybox", "one", "sleep", "1000")
	if _, errs, status := w.mctl("tasks", "exec", "--timeout", "300ms", "one", "sh", "-c", "setsid sleep 1000 & sleep 1000"); status != 137 || !strings.Contains(errs, "its --timeout of 300ms was over") {
		t.Errorf("%q, status %d", errs, status)
	}
	eventually(t, "what the exec had begotten is gone", func() bool { return strings.Count(w.ok("tasks", "ps", "one"), "\n") == 2 })
	w.exits(3, "tasks", "exec", "--timeout", "1m", "one", "sh", "-c", "exit 3")
	var exits []struct {
		TimedOut bool `json:"timed_out"`
	}
	w.decode(w.shim("exits", "one", "-o", "json"), &exits)
	if len(exits) != 2 || !exits[0].TimedOut || exits[1].TimedOut {
		t.Errorf("%+v", exits)
	}
	if out := w.shim("exits", "one"); !strings.Contains(out, "137 (time was over)") {
		t.Errorf("exits: %s", out)
	}
}

// TestShimTerminal: a terminal by way of the shim alone, left and come back to.
func TestShimTerminal(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "busybox", "one", "sleep", "1000")
	w.killManager()
	tm := w.terminal("shim", "--state", w.State(), "exec", "-t", "--exec-id", "e", "one", "sh")
	eventually(t, "the terminal has our size", func() bool { // which it is given while the shell begins
		tm.types("stty size\n")
		return strings.Contains(tm.shown.String(), "30 100")
	})
	tm.types("echo do''ne\n")
	tm.shows("done")
	tm.types("\x10\x11") // the detach keys
	tm.shows("mctl shim attach one --exec-id e")
	tm.ends(0)
	again := w.terminal("shim", "--state", w.State(), "attach", "--exec-id", "e", "one")
	again.types("echo ag''ain; exit 6\n")
	again.shows("again")
	again.ends(6)
}

// TestShimAttach: an attached container's end is its client's; the container stays for managerd.
func TestShimAttach(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "-i", "busybox", "one", "sh", "-c", "read x; echo got $x; exit 5")
	w.killManager()
	out, errs, status := w.run(w.Mctl("shim", "--state", w.State(), "attach", "one"), "this\n")
	if out != "got this\n" || errs != "" || status != 5 {
		t.Errorf("%q, %q, status %d", out, errs, status)
	}
	w.startManager()
	eventually(t, "managerd knows that it has ended", func() bool { return w.status("one") == "STOPPED" })
	w.exits(5, "tasks", "wait", "one")
}

// TestShimProfiles: profiles of a shim, with managerd dead.
func TestShimProfiles(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "busybox", "one", "sleep", "1000")
	w.killManager()
	for _, name := range []string{"heap", "allocs", "goroutine", "threadcreate", "block", "mutex", "profile"} {
		file := filepath.Join(t.TempDir(), name)
		w.shim("pprof", "one", name, "--file", file, "--duration", "100ms")
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		// A pprof profile is compressed, and names what it counts.
		z, err := gzip.NewReader(bytes.NewReader(data))
		if err != nil {
			t.Errorf("%s: %v: %.80q", name, err, data)
			continue
		}
		if text, err := io.ReadAll(z); err != nil || !bytes.Contains(text, []byte("count")) {
			t.Errorf("%s: %d bytes, %v", name, len(text), err)
		}
	}
	if out := w.shim("trace", "one", "--duration", "50ms"); !strings.HasPrefix(out, "go 1.") || !strings.Contains(out[:16], " trace") {
		t.Errorf("trace: %.40q", out)
	}
	if out := w.shim("pprof", "one", "goroutine", "--debug", "2"); !strings.Contains(out, "service.(*Service).Profile") {
		t.Errorf("goroutines: %s", out)
	}
	w.shimFails([]string{"nothing", "goroutine", "trace"}, "pprof", "one", "nothing")
	w.shimFails([]string{"profile", "10m"}, "pprof", "one", "profile", "--duration", "11m")
	first := w.begin("shim", "--state", w.State(), "pprof", "one", "profile", "--duration", "5m")
	eventually(t, "one is being recorded", func() bool {
		return strings.Contains(w.shim("pprof", "one", "goroutine", "--debug", "2"), "service.record(")
	})
	w.shimFails([]string{"profile", "in use"}, "pprof", "one", "profile", "--duration", "1ms")
	_ = first.Process.Kill() // who has gone keeps nobody from recording
	eventually(t, "another is recorded", func() bool {
		_, _, status := w.mctl("shim", "--state", w.State(), "pprof", "one", "profile", "--duration", "1ms")
		return status == 0
	})
}

// TestShimOOM: who was killed for want of memory bears the mark, and the counters tell.
func TestShimOOM(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "--memory-limit", "64MiB", "busybox", "one", "sleep", "1000")
	w.exits(137, "tasks", "exec", "one", "tail", "/dev/zero")
	if out := w.ok("tasks", "metrics", "one"); !strings.Contains(out, "memory.oom_kill") {
		t.Errorf("metrics: %s", out)
	}
	if out := w.shim("exits", "one"); !strings.Contains(out, "137 (out of memory)") {
		t.Errorf("exits: %s", out)
	}
	var d struct {
		Kills uint64 `json:"oom_kills"`
		Level string `json:"oom_level"`
	}
	w.decode(w.shim("inspect", "one", "-o", "json"), &d)
	if d.Kills != 1 || d.Level != "own" {
		t.Errorf("inspect: %+v", d)
	}
	w.ok("run", "-d", "--memory-limit", "64MiB", "busybox", "two", "tail", "/dev/zero")
	w.exits(137, "tasks", "wait", "two")
	if out := w.shim("ls"); !strings.Contains(out, "stopped (out of memory)") || strings.Count(out, "out of memory") != 1 {
		t.Errorf("ls: %s", out)
	}
}
