package stdio

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
	"github.com/managerd/managerd/shimapi"
)

// logText gives what a json-file log has of a stream.
func logText(t testing.TB, path, stream string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, line := range bytes.Split(bytes.TrimSuffix(data, []byte("\n")), []byte("\n")) {
		var e struct{ Log, Stream, Time string }
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if e.Stream == stream {
			out.WriteString(e.Log)
		}
	}
	return out.String()
}

// numbers is what seq 1 n writes.
func numbers(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintln(&b, i+1)
	}
	return b.String()
}

// TestLog: both streams of a process in one log, all of it there when the process's end is told; nothing of ours is left.
func TestLog(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "logs", "log")
	uri := "json-file://" + path
	s, cmd := run(t, Config{Dir: dir, Stdout: uri, Stderr: uri}, "seq 1 100000; echo error >&2; printf unfinished")
	_ = cmd.Wait()
	s.Drain(5 * time.Second)
	if got := logText(t, path, "stdout"); got != numbers(100000)+"unfinished" {
		t.Errorf("%d bytes of stdout", len(got))
	}
	if got := logText(t, path, "stderr"); got != "error\n" {
		t.Errorf("stderr is %q", got)
	}
	s.Close()
	if left, _ := filepath.Glob(filepath.Join(dir, ".init.*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestLogDescendant: one that holds the stream does not hold up the exit of its parent, and what it writes is logged.
func TestLogDescendant(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, "in"), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "log")
	s, cmd := run(t, Config{Dir: dir, Stdout: "json-file://" + path}, "echo first; (read x; echo second) <"+filepath.Join(dir, "in")+" & exit 0")
	_ = cmd.Wait()
	begin := time.Now()
	s.Drain(10 * time.Second)
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("draining took %v", took)
	}
	if got := logText(t, path, "stdout"); got != "first\n" {
		t.Errorf("got %q", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "in"), []byte("go\n"), 0); err != nil {
		t.Fatal(err)
	}
	s.copies.Wait()
	if got := logText(t, path, "stdout"); got != "first\nsecond\n" {
		t.Errorf("got %q", got)
	}
}

// TestLogOfAnother: a process that was never made, as its shim died, leaves nothing to the next one of its name.
func TestLogOfAnother(t *testing.T) {
	for _, stream := range []string{"stdout", "stderr", "terminal"} {
		t.Run(stream, func(t *testing.T) {
			dir := t.TempDir()
			path, other := filepath.Join(dir, "log"), filepath.Join(dir, "other")
			cfg := Config{Dir: dir, ExecID: "e", Stdout: "file://" + path, Terminal: stream == "terminal"}
			switch stream {
			case "stderr":
				cfg.Stdout, cfg.Stderr = "", cfg.Stdout
			case "terminal":
				stream = "stdout"
			}
			log, err := logsink.Open(logsink.Config{Target: rawTarget(other), Base: filepath.Join(dir, shimapi.StdioName(cfg.ExecID, "log-"+stream))})
			if err != nil {
				t.Fatal(err)
			}
			left, err := log.Stream(stream)
			if err == nil {
				_, err = left.TakeBytes([]byte("of another\n"))
			}
			if err != nil {
				t.Fatal(err)
			}
			left.Close()
			log.Close()

			if cfg.Terminal {
				s, err := Open(cfg)
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = s.Close() }()
				master, slave := openPTY(t)
				if err := s.SetConsole(master); err != nil {
					t.Fatal(err)
				}
				if _, err := slave.WriteString("mine"); err != nil {
					t.Fatal(err)
				}
				_ = slave.Close()
				s.Drain(5 * time.Second)
			} else {
				s, cmd := run(t, cfg, "printf mine >&"+map[string]string{"stdout": "1", "stderr": "2"}[stream])
				_ = cmd.Wait()
				s.Drain(5 * time.Second)
			}
			for name, want := range map[string]string{path: "mine", other: ""} {
				if got, err := os.ReadFile(name); err != nil || string(got) != want {
					t.Errorf("%s has %q, not %q: %v", name, got, want, err)
				}
			}
		})
	}
}

func TestLogBadURI(t *testing.T) {
	dir := t.TempDir()
	for uri, is := range map[string]func(error) bool{
		"cri:///x?max-file=2":   errdefs.IsInvalidArgument,
		"cri://" + dir + "/":    errdefs.IsInvalidArgument,
		"json-file:///dev/full": errdefs.IsInvalidArgument,
	} {
		if _, err := Open(Config{Dir: dir, Stdout: uri}); !is(err) {
			t.Errorf("%s: %v", uri, err)
		}
		if left, _ := os.ReadDir(dir); len(left) != 0 {
			t.Errorf("%s left %v", uri, left)
		}
	}
}

// TestLogFull: the disk is full while a process prints much, and it can be killed and its streams closed; with room again,
// nothing is lost under block, and every loss is counted under drop.
func TestLogFull(t *testing.T) {
	const lines = 300000
	for _, policy := range []string{"block", "drop"} {
		t.Run(policy, func(t *testing.T) {
			dir, small := t.TempDir(), t.TempDir()
			if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=64m"); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = unix.Unmount(small, unix.MNT_DETACH) }()
			ballast := filepath.Join(small, "ballast")
			if err := os.WriteFile(ballast, make([]byte, 62<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(small, "log")
			s, cmd := run(t, Config{Dir: dir, Stdout: "json-file://" + path + "?full=" + policy}, fmt.Sprintf("seq 1 %d", lines))
			ended := make(chan struct{})
			go func() {
				_ = cmd.Wait()
				close(ended)
			}()
			if policy == "drop" {
				<-ended // it is never held up
				s.Drain(5 * time.Second)
			} else {
				for last := int64(-1); ; time.Sleep(100 * time.Millisecond) { // until it stands still
					fi, err := os.Stat(path)
					if err != nil {
						t.Fatal(err)
					}
					if fi.Size() == last && last > 0 {
						break
					}
					last = fi.Size()
				}
				select {
				case <-ended:
					t.Fatal("the process was not held up")
				default:
				}
			}
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			<-ended
			s.Drain(10 * time.Second)
			s.Close()
			got := logText(t, path, "stdout")
			if policy == "block" {
				if got != numbers(lines) {
					t.Errorf("%d bytes of %d", len(got), len(numbers(lines)))
				}
				return
			}
			note := regexp.MustCompile(`(?m)^\[managerd: (\d+) bytes of output .* were lost here: .*\]\n`)
			lost := 0
			for _, m := range note.FindAllStringSubmatch(got, -1) {
				n, _ := strconv.Atoi(m[1])
				lost += n
			}
			kept := len(note.ReplaceAllString(got, ""))
			if lost == 0 || kept+lost != len(numbers(lines)) {
				t.Errorf("%d bytes kept, %d lost, of %d", kept, lost, len(numbers(lines)))
			}
		})
	}
}

// TestLogFullKill: neither the end of a process nor closing waits for room.
func TestLogFullKill(t *testing.T) {
	dir, small := t.TempDir(), t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(small, unix.MNT_DETACH) }()
	s, cmd := run(t, Config{Dir: dir, Stdout: "cri://" + small + "/log"}, "exec yes")
	for fi, err := os.Stat(small + "/log"); err != nil || fi.Size() < 60<<10; fi, err = os.Stat(small + "/log") {
		time.Sleep(time.Millisecond)
	}
	begin := time.Now()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	s.Drain(100 * time.Millisecond)
	s.Close()
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
}
