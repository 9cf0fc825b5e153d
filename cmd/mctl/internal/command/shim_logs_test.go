package command_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestLogs: what containers have written is printed, of every kind of log there is, with managerd dead, and followed; logs
// that were moved away are begun anew.
func TestLogs(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	logs := map[string]string{"ring": "", "json": "json-file://" + dir + "/json", "cri": "cri://" + dir + "/cri", "file": "file://" + dir + "/file"}
	script := "echo one; echo two; echo three >&2; while [ ! -e /go ]; do sleep 0.05; done; echo four; sleep 1000"
	for id, uri := range logs {
		run := []string{"run", "-d"}
		if uri != "" {
			run = append(run, "--log-uri", uri)
		}
		w.ok(append(run, "busybox", id, "sh", "-c", script)...)
	}
	w.ok("tasks", "exec", "-d", "--exec-id", "e", "ring", "sh", "-c", "echo from an exec; sleep 1000")
	w.killManager()
	for id := range logs {
		read := func(args ...string) (out, errs string) {
			out, errs, status := w.mctl(append([]string{"shim", "--state", w.State(), "logs", id}, args...)...)
			if status != 0 {
				t.Fatalf("%s: %s", id, errs)
			}
			return out, errs
		}
		eventually(t, "the output of "+id+" is logged", func() bool {
			out, errs := read()
			if id == "file" { // lines that do not say of which stream they are
				return len(out) == len("one\ntwo\nthree\n") && strings.Contains(out, "three\n") && errs == ""
			}
			return out == "one\ntwo\n" && errs == "three\n"
		})
		if out, errs := read("--tail", "2"); strings.Count(out+errs, "\n") != 2 || !strings.Contains(out, "two\n") {
			t.Errorf("%s: the tail is %q, %q", id, out, errs)
		}
		if id != "file" {
			if out, _ := read("--since", "1h", "-t"); !strings.Contains(out, "Z one\n") || len(out) < 60 {
				t.Errorf("%s: %q", id, out)
			}
			if out, _ := read("--since", time.Now().Add(time.Hour).Format(time.RFC3339)); out != "" {
				t.Errorf("%s: %q", id, out)
			}
		}
		follow := w.Mctl("logs", "--state", w.State(), "-f", "--tail", "0", id)
		var got strings.Builder
		follow.Stdout = &got
		if err := follow.Start(); err != nil {
			t.Fatal(err)
		}
		if uri := logs[id]; uri != "" {
			path := filepath.Join(dir, id)
			if err := os.Rename(path, path+".away"); err != nil {
				t.Fatal(err)
			}
			if out := w.shim("reopen-logs", id); out != path+"\n" {
				t.Errorf("%s: reopened %q", id, out)
			}
		}
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/root/go", w.containerPID(id)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		eventually(t, id+" says more", func() bool {
			out, _ := read("--tail", "1")
			return out == "four\n"
		})
		if uri := logs[id]; uri != "" {
			if data, err := os.ReadFile(filepath.Join(dir, id)); err != nil || !strings.Contains(string(data), "four") {
				t.Errorf("%s: the new file has %q, %v", id, data, err)
			}
		}
		w.shim("kill", "-s", "KILL", id)
		if err := follow.Wait(); err != nil {
			t.Errorf("%s: following: %v", id, err)
		}
		if got.String() != "four\n" {
			t.Errorf("%s: followed %q", id, got.String())
		}
	}
	if out := w.shim("logs", "ring", "e"); out != "from an exec\n" {
		t.Errorf("an exec: %q", out)
	}
	if out := w.shim("logs", "-o", "json", "cri", "--tail", "1"); !strings.HasSuffix(out, `"stream":"stdout","line":"four\n"}`+"\n") {
		t.Errorf("json: %s", out)
	}
	if out := w.shim("inspect", "-o", "json", "cri"); !strings.Contains(out, `"sink": "cri"`) {
		t.Errorf("inspect: %s", out)
	}
	w.shimFails([]string{"its lines have no times"}, "logs", "--since", "1m", "file")
	w.shimFails([]string{"x of container ring"}, "logs", "ring", "x")
	w.fails(2, []string{"neither a time"}, "logs", "--since", "yesterday", "ring")
}
