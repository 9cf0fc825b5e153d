package service_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
)

// TestTerminal: a terminal for init and for an exec, sized, with input.
func TestTerminal(t *testing.T) {
	spec := shimbin.Spec("tty", "sh", "-c", "test -t 0 && test -t 2 && echo terminal; read x; stty size; echo got $x")
	f := serve(t, "tty", spec)
	in, out, _ := f.fifos("init")
	f.create(func(r *task.CreateTaskRequest) { r.Stdin, r.Stdout, r.Terminal = in, out, true })
	got := read(t, out)
	f.start("")
	if _, err := f.ResizePty(ctx, &task.ResizePtyRequest{ID: "tty", Width: 101, Height: 37}); err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(in, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.WriteString("hello\n")
	_ = w.Close()
	if s := f.wait("").ExitStatus; s != 0 {
		t.Errorf("status %d", s)
	}
	text := strings.ReplaceAll(<-got, "\r", "")
	for _, want := range []string{"terminal\n", "37 101\n", "got hello\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %q", want, text)
		}
	}
}

func TestNoTerminal(t *testing.T) {
	f := running(t, "notty", nil)
	if _, err := f.ResizePty(ctx, &task.ResizePtyRequest{ID: "notty", Width: 1, Height: 1}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("resize: %v", err)
	}
}

// TestCloseIO: input ends with CloseIO, also when that comes before the exec was started.
func TestCloseIO(t *testing.T) {
	f := running(t, "closeio", nil)
	for _, early := range []bool{false, true} {
		in, out, _ := f.fifos(map[bool]string{true: "early", false: "late"}[early])
		w, err := os.OpenFile(in, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = w.WriteString("all of it\n")
		if err := f.exec("e", func(r *task.ExecProcessRequest) { r.Stdin, r.Stdout = in, out }, "cat"); err != nil {
			t.Fatal(err)
		}
		if !early {
			f.start("e")
		}
		if _, err := f.CloseIO(ctx, &task.CloseIORequest{ID: "closeio", ExecID: "e", Stdin: true}); err != nil {
			t.Fatal(err)
		}
		if early {
			f.start("e")
		}
		got := read(t, out)
		if s := f.wait("e").ExitStatus; s != 0 {
			t.Errorf("status %d", s)
		}
		if text := <-got; text != "all of it\n" {
			t.Errorf("early %v: %q", early, text)
		}
		_ = w.Close()
		f.remove("e")
	}
}

// TestStalledReader: a client that does not read stops its own container's output, and no request.
func TestStalledReader(t *testing.T) {
	f := running(t, "stalled", nil)
	_, out, _ := f.fifos("e")
	client, err := os.OpenFile(out, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	if err := f.exec("e", func(r *task.ExecProcessRequest) { r.Stdout = out }, "yes"); err != nil {
		t.Fatal(err)
	}
	f.start("e")
	for ; ; time.Sleep(time.Millisecond) {
		// Both kernel buffers are full when the one that we can see is.
		if n, err := unix.IoctlGetInt(int(client.Fd()), unix.TIOCINQ); err != nil || n >= 64<<10 {
			break
		}
	}
	begin := time.Now()
	if s := f.runExec("other", nil, "true"); s != 0 {
		t.Errorf("another exec: %d", s)
	}
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("another exec took %v", took)
	}
	f.kill("e", unix.SIGKILL)
	if s := f.wait("e").ExitStatus; s != 137 {
		t.Errorf("status %d", s)
	}
	f.remove("e")
	if took := time.Since(begin); took > 6*time.Second {
		t.Errorf("kill, wait and delete took %v", took)
	}
}

// TestDaemonised: a grandchild that holds stdout does not hold up the exit.
func TestDaemonised(t *testing.T) {
	f := running(t, "daemon", nil)
	_, out, _ := f.fifos("e")
	if err := f.exec("e", func(r *task.ExecProcessRequest) { r.Stdout = out }, "sh", "-c", "sleep 1000 & echo started; exit 4"); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	f.start("e")
	got := read(t, out)
	if s := f.wait("e").ExitStatus; s != 4 {
		t.Errorf("status %d", s)
	}
	if took := time.Since(begin); took > time.Second {
		t.Errorf("the exit took %v", took)
	}
	f.remove("e")
	if text := <-got; text != "started\n" {
		t.Errorf("%q", text)
	}
}

// TestExecNames: an exec's id names its streams in the bundle, and nothing outside.
func TestExecNames(t *testing.T) {
	f := running(t, "names", nil)
	for _, id := range []string{"../../x", "a/b", ".init", "..", "a\x00b", "a\nb", strings.Repeat("i", 225)} {
		_, out, _ := f.fifos("n")
		err := f.exec(id, func(r *task.ExecProcessRequest) { r.Stdout = out }, "true")
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.20q: %v", id, err)
		}
		for _, path := range []string{"n.in", "n.out", "n.err"} {
			if err := os.Remove(filepath.Join(filepath.Dir(f.dir), path)); err != nil {
				t.Fatal(err)
			}
		}
	}
	longest := strings.Repeat("i", 224)
	if out := f.capture(longest[:200]+"-_.é", "echo", "hello"); out != "hello\n" {
		t.Errorf("%q", out)
	}
	if status := f.runExec(longest, nil, "true"); status != 0 {
		t.Errorf("status %d", status)
	}
}
