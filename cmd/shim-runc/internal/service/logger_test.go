package service_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logger/loggertest"
	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	shim "github.com/managerd/managerd/protos/shim/v1"
)

// until waits for a condition.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("in vain: " + what)
		}
	}
}

// logger is the pid of the logger of the container's output; of one that was killed that of the next.
func (f *fixture) logger() (pid int) {
	f.t.Helper()
	until(f.t, "a logger runs", func() bool {
		pid = int(f.output("", "stdout").LoggerPid)
		return pid > 0
	})
	return pid
}

// output is what Describe says of a stream.
func (f *fixture) output(execID, stream string) *shim.Output {
	f.t.Helper()
	for _, p := range f.describe().Processes {
		for _, o := range p.Outputs {
			if p.ExecId == execID && o.Stream == stream {
				return o
			}
		}
	}
	f.t.Fatalf("process %q has no %s", execID, stream)
	return nil
}

// ticks is what a container prints that runs until its input ends.
func ticking(id string) string {
	return "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); usleep 300; done; echo end of " + id
}

// lines checks that a log has all that ticking prints.
func lines(t testing.TB, path, id string) {
	t.Helper()
	var want strings.Builder
	for i := range 3000 {
		fmt.Fprintln(&want, "line", i)
	}
	fmt.Fprintln(&want, "end of", id)
	if got, err := os.ReadFile(path); err != nil || string(got) != want.String() {
		t.Errorf("%d bytes of %d, %v", len(got), want.Len(), err)
	}
}

// TestLoggerSurvives: the logger of a container stays through an upgrade and through the death of the shim; one that dies
// with the shim is started again. Not a line is lost.
func TestLoggerSurvives(t *testing.T) {
	f := serve(t, "logger", shimbin.Spec("logger", "sh", "-c", ticking("logger")))
	dir := filepath.Dir(f.dir)
	uri := loggertest.URI(dir, loggertest.Copies)
	f.create(func(r *task.CreateTaskRequest) { r.Stdout, r.Stderr = uri, uri })
	f.start("")
	pid := f.output("", "stdout").LoggerPid
	f.upgrade()
	f.succeed()
	if o := f.output("", "stdout"); o.LoggerPid != pid || o.LoggerRestarts != 0 || o.Sink != "binary" {
		t.Errorf("logger %v, it was %d", o, pid)
	}
	_ = f.cmd.Process.Kill()
	if err := unix.Kill(int(pid), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	f.succeed()
	starts := func(n int) bool {
		data, err := os.ReadFile(filepath.Join(dir, "starts"))
		return err == nil && strings.Count(string(data), " CONTAINER_ID=logger CONTAINER_NAMESPACE=test\n") == n
	}
	until(t, "another logger runs", func() bool { return starts(2) })
	if err := unix.Kill(f.logger(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "and another", func() bool { return starts(3) })
	if o := f.output("", "stdout"); o.LoggerError != "by signal SIGKILL" {
		t.Errorf("%v", o)
	}
	if s := f.wait("").ExitStatus; s != 0 {
		t.Errorf("status %d", s)
	}
	last := f.output("", "stdout").LoggerPid
	f.remove("")
	if err := unix.Kill(int(last), 0); last != 0 && !errors.Is(err, unix.ESRCH) {
		t.Errorf("a logger is left: %v", err)
	}
	lines(t, filepath.Join(dir, "stdout"), "logger")
}

// TestLoggerHangs: a logger that does nothing any more holds up no request, of its own container or another process, for
// longer than a bounded while; a terminal's and an exec's neither.
func TestLoggerHangs(t *testing.T) {
	f := serve(t, "loghang", shimbin.Spec("loghang", "yes"))
	uri := loggertest.URI(filepath.Dir(f.dir), loggertest.Stalls)
	f.create(func(r *task.CreateTaskRequest) { r.Stdout, r.Stderr = uri, uri })
	f.start("")
	if err := f.exec("tty", func(r *task.ExecProcessRequest) { r.Stdout, r.Terminal = uri, true }, "yes"); err != nil {
		t.Fatal(err)
	}
	f.start("tty")
	until(t, "the terminal's stream waits", func() bool { return f.output("tty", "stdout").Waiting != "" })
	begin := time.Now()
	if out := f.capture("e", "echo", "hello"); out != "hello\n" {
		t.Errorf("an exec: %q", out)
	}
	f.kill("tty", unix.SIGKILL)
	if s := f.wait("tty").ExitStatus; s != 137 {
		t.Errorf("status %d", s)
	}
	f.kill("", unix.SIGKILL)
	if s := f.wait("").ExitStatus; s != 137 {
		t.Errorf("status %d", s)
	}
	f.remove("")
	if took := time.Since(begin); took > 30*time.Second {
		t.Errorf("it took %v", took)
	}
	starts, err := os.ReadFile(filepath.Join(filepath.Dir(f.dir), "starts"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(starts)) {
		var pid int
		if _, err := fmt.Sscan(line, &pid); err != nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			t.Errorf("a logger is left: %s", line)
		}
	}
	if !strings.Contains(string(starts), "CONTAINER_ID=tty ") {
		t.Errorf("an exec's logger is told another id: %s", starts)
	}
}

// TestLoggerRefused: a container whose logger cannot run is not made, and an exec is not started; both can be tried again.
func TestLoggerRefused(t *testing.T) {
	f := serve(t, "logbad", shimbin.Spec("logbad", "sleep", "1000"))
	dies := loggertest.URI(filepath.Dir(f.dir), loggertest.Dies)
	_, err := f.Create(ctx, &task.CreateTaskRequest{ID: "logbad", Bundle: f.dir, Rootfs: bind(), Stdout: dies})
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "exit status 7: no such; log driver") {
		t.Errorf("create: %v", err)
	}
	f.create(nil)
	f.start("")
	if err := f.exec("e", func(r *task.ExecProcessRequest) { r.Stdout = "binary:///no/such" }, "true"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Start(ctx, &task.StartRequest{ID: "logbad", ExecID: "e"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("start: %v", err)
	}
	f.remove("e")
}
