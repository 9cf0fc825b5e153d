package stdio

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logger"
	"github.com/managerd/managerd/cmd/shim-runc/internal/logger/loggertest"
	"github.com/managerd/managerd/reaper"
)

// host runs the loggers of a test.
func host(t testing.TB) *logger.Host {
	t.Helper()
	r, err := reaper.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return &logger.Host{Reaper: r, Namespace: "test", Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
}

// logging is the configuration of a process whose output a logger takes.
func logging(t testing.TB, does string) (dir string, cfg Config) {
	t.Helper()
	dir = t.TempDir()
	uri := loggertest.URI(dir, does)
	return dir, Config{Dir: t.TempDir(), Stdout: uri, Stderr: uri, ID: "web", Loggers: host(t)}
}

func mustRead(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// until waits for a condition.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("in vain: " + what)
		}
	}
}

// guarded runs a command that ends, safe from the reaper's sweep.
func guarded(t testing.TB, cfg Config, script string) *Streams {
	t.Helper()
	var s *Streams
	if err := cfg.Loggers.Reaper.Guard(func() error {
		var cmd *exec.Cmd
		s, cmd = run(t, cfg, script)
		return cmd.Wait()
	}); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestLogger: a logger gets both streams on its descriptors, who it is for in its environment, and its end when they end;
// nothing is left.
func TestLogger(t *testing.T) {
	dir, cfg := logging(t, loggertest.Copies)
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.SplitN(strings.TrimSpace(mustRead(t, dir+"/starts")), " ", 2); got[1] != "CONTAINER_ID=web CONTAINER_NAMESPACE=test" {
		t.Errorf("environment %q", got)
	}
	pid := s.Outputs()[0].Logger.PID
	if pid == 0 || s.Outputs()[1].Logger.PID != pid {
		t.Errorf("%+v", s.Outputs())
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the logger of a process that never was: %v", err)
	}

	s = guarded(t, cfg, "seq 1 200000; echo error >&2; printf unfinished")
	s.Drain(5 * time.Second)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if got := mustRead(t, dir+"/stdout"); got != numbers(200000)+"unfinished" {
		t.Errorf("%d bytes of stdout", len(got))
	}
	if got := mustRead(t, dir+"/stderr"); got != "error\n" {
		t.Errorf("stderr is %q", got)
	}
	if left, _ := os.ReadDir(cfg.Dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestLoggerFails: what is wrong with a logger is said when the process is made, in its own words, and leaves nothing.
func TestLoggerFails(t *testing.T) {
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("not a program"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		uri  string
		is   func(error) bool
		says string
	}{
		"missing":   {"binary:///no/such/logger", errdefs.IsInvalidArgument, "/no/such/logger: no such file"},
		"text":      {"binary://" + text, errdefs.IsInvalidArgument, "permission denied"},
		"dies":      {loggertest.URI(t.TempDir(), loggertest.Dies), errdefs.IsUnavailable, "ended before it was ready, exit status 7: no such; log driver"},
		"not ready": {loggertest.URI(t.TempDir(), loggertest.Dawdles), errdefs.IsUnavailable, "is not ready after 300ms"},
		"false":     {"binary:///bin/false", errdefs.IsUnavailable, "exit status 1"},
	} {
		t.Run(name, func(t *testing.T) {
			_, cfg := logging(t, loggertest.Copies)
			cfg.Stdout, cfg.Stderr, cfg.Loggers.Ready = c.uri, c.uri, 300*time.Millisecond
			_, err := Open(cfg)
			if !c.is(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v", err)
			}
			if left, _ := os.ReadDir(cfg.Dir); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// TestLoggerDies: a logger that is killed again and again loses nothing, because it is started again on the same FIFO.
func TestLoggerDies(t *testing.T) {
	const lines = 2000000
	dir, cfg := logging(t, loggertest.Copies)
	var s *Streams
	kills := 0
	if err := cfg.Loggers.Reaper.Guard(func() error {
		var cmd *exec.Cmd
		s, cmd = run(t, cfg, fmt.Sprintf("seq 1 %d", lines))
		return cmd.Process.Release()
	}); err != nil {
		t.Fatal(err)
	}
	for ; kills < 3; kills++ {
		at := int64(kills+1) * 3 << 20
		until(t, "the log grows", func() bool {
			fi, err := os.Stat(dir + "/stdout")
			return err == nil && fi.Size() > at
		})
		st := s.Outputs()[0].Logger
		if err := unix.Kill(st.PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		until(t, "another one runs", func() bool { return s.Outputs()[0].Logger.Restarts == kills+1 })
		if st = s.Outputs()[0].Logger; st.LastEnd != "by signal SIGKILL" {
			t.Errorf("%+v", st)
		}
	}
	want := numbers(lines)
	until(t, "all is written", func() bool {
		fi, err := os.Stat(dir + "/stdout")
		return err == nil && fi.Size() >= int64(len(want))
	})
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if got := mustRead(t, dir+"/stdout"); got != want {
		t.Errorf("%d bytes, %d were written", len(got), len(want))
	}
}

// TestLoggerStalls: one that neither reads nor ends holds nobody up for long, and what it did not take is told.
func TestLoggerStalls(t *testing.T) {
	_, cfg := logging(t, loggertest.Stalls)
	s := guarded(t, cfg, "echo one line")
	pid := s.Outputs()[0].Logger.PID
	begin := time.Now()
	s.Drain(100 * time.Millisecond)
	err := s.Close()
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
	if err == nil || !strings.Contains(err.Error(), "did not take the last 9 bytes of output: it did not end, and was killed") {
		t.Errorf("%v", err)
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the logger is still there: %v", err)
	}
}

// TestLoggerTerminal: a terminal's output goes to a logger as well.
func TestLoggerTerminal(t *testing.T) {
	dir, cfg := logging(t, loggertest.Copies)
	cfg.Terminal = true
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	master, slave := openPTY(t)
	if err := s.SetConsole(master); err != nil {
		t.Fatal(err)
	}
	if _, err := slave.WriteString("hello\n"); err != nil {
		t.Fatal(err)
	}
	_ = slave.Close()
	s.Drain(5 * time.Second)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if got := mustRead(t, dir+"/stdout"); got != "hello\r\n" {
		t.Errorf("%q", got)
	}
}
