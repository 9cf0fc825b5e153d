package command_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/image"
)

// bin holds the programs, archive an image of them all.
var bin, archive string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "mctl-test-")
		if err != nil {
			panic(err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		if bin, err = harness.Programs(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		archive = filepath.Join(dir, "busybox.tar")
		if err := image.Write(archive, image.Options{}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// world is a daemon with the busybox image.
type world struct {
	*testing.T
	*harness.Daemon
	dead bool // killManager has killed the daemon
}

func newWorld(t *testing.T) *world {
	if os.Getuid() != 0 {
		t.Fatal("needs root: containers are made")
	}
	w := &world{T: t, Daemon: harness.Test(t, bin)}
	t.Cleanup(func() { // before the harness looks for what is left
		for _, what := range []string{"tasks", "containers"} {
			ids, _, _ := w.mctl(what, "ls", "-q")
			for _, id := range strings.Fields(ids) {
				args := []string{what, "rm", id}
				if what == "tasks" {
					args = append(args, "-f")
				}
				if _, errs, status := w.mctl(args...); status != 0 {
					t.Errorf("cleaning up: mctl %v: %s", args, errs)
				}
			}
		}
	})
	w.ok("images", "import", archive)
	return w
}

// run runs a command line with input.
func (w *world) run(cmd *exec.Cmd, input string) (out, errs string, status int) {
	w.Helper()
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	if input != "" {
		cmd.Stdin = strings.NewReader(input)
	}
	err := cmd.Run()
	if err != nil && cmd.ProcessState == nil {
		w.Fatal(err)
	}
	return o.String(), e.String(), harness.Status(err)
}

func (w *world) mctl(args ...string) (out, errs string, status int) {
	w.Helper()
	return w.run(w.Mctl(args...), "")
}

// ok runs mctl, which must succeed and have nothing to complain about, and gives what it printed.
func (w *world) ok(args ...string) string {
	w.Helper()
	out, errs, status := w.mctl(args...)
	if status != 0 || errs != "" {
		w.Fatalf("mctl %q: status %d, %s", args, status, errs)
	}
	return out
}

// exits runs mctl, which must exit with status, and say nothing of its own.
func (w *world) exits(status int, args ...string) string {
	w.Helper()
	out, errs, got := w.mctl(args...)
	if got != status || strings.Contains(errs, "mctl:") {
		w.Fatalf("mctl %q: status %d, want %d: %s", args, got, status, errs)
	}
	return out
}

// fails runs mctl, which must fail with status and say all of these words, on one line.
func (w *world) fails(status int, words []string, args ...string) {
	w.Helper()
	_, errs, got := w.mctl(args...)
	if got != status {
		w.Fatalf("mctl %q: status %d, want %d: %s", args, got, status, errs)
	}
	if !strings.HasPrefix(errs, "mctl: ") || strings.Count(errs, "\n") != 1 {
		w.Errorf("mctl %q does not say one sentence: %s", args, errs)
	}
	for _, word := range words {
		if !strings.Contains(errs, word) {
			w.Errorf("mctl %q does not say %q: %s", args, word, errs)
		}
	}
}

// eventually waits for what the world must come to.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// status is a task's, as tasks ls shows it; empty: there is none.
func (w *world) status(id string) string {
	w.Helper()
	for _, line := range strings.Split(w.ok("tasks", "ls"), "\n") {
		if f := strings.Fields(line); len(f) == 3 && f[0] == id {
			return f[2]
		}
	}
	return ""
}

func (w *world) running(id string) {
	w.Helper()
	eventually(w.T, "task "+id+" runs", func() bool { return w.status(id) == "RUNNING" })
}

// background is a mctl that goes on while the test does something.
type background struct {
	*exec.Cmd
	out, errs log
	done      chan error
}

// log is what somebody wrote so far.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (w *world) begin(args ...string) *background {
	w.Helper()
	b := &background{Cmd: w.Mctl(args...), done: make(chan error, 1)}
	b.Stdout, b.Stderr = &b.out, &b.errs
	if err := b.Start(); err != nil {
		w.Fatal(err)
	}
	go func() { b.done <- b.Wait() }()
	w.Cleanup(func() { _ = b.Process.Kill() })
	return b
}

// says waits until it has written that.
func (b *background) says(t *testing.T, what string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%v says %q", b.Args, what), func() bool { return strings.Contains(b.out.String(), what) })
}

// end waits for it.
func (b *background) end(t *testing.T) int {
	t.Helper()
	select {
	case err := <-b.done:
		var e *exec.ExitError
		if err != nil && !errors.As(err, &e) {
			t.Fatal(err)
		}
		return harness.Status(err)
	case <-time.After(60 * time.Second):
		_ = b.Process.Kill()
		t.Fatalf("%v does not end: %s%s", b.Args, &b.out, &b.errs)
		return 0
	}
}
