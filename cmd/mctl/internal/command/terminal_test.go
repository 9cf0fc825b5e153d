package command_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// terminal is a mctl at a pseudo-terminal, of which we are the user.
type terminal struct {
	console.Console // the master
	*exec.Cmd
	t     *testing.T
	slave *os.File
	shown log
	done  chan error
}

func (w *world) terminal(args ...string) *terminal {
	w.Helper()
	master, path, err := console.NewPty()
	if err != nil {
		w.Fatal(err)
	}
	slave, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		w.Fatal(err)
	}
	tm := &terminal{Console: master, Cmd: w.Mctl(args...), t: w.T, slave: slave, done: make(chan error, 1)}
	w.Cleanup(func() {
		_ = tm.Process.Kill()
		_ = slave.Close()
		_ = master.Close()
	})
	if err := master.Resize(console.WinSize{Width: 100, Height: 30}); err != nil {
		w.Fatal(err)
	}
	tm.Stdin, tm.Stdout, tm.Stderr = slave, slave, slave
	tm.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := tm.Start(); err != nil {
		w.Fatal(err)
	}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			_, _ = tm.shown.Write(buf[:n])
			if err != nil {
				return
			}
		}
	}()
	go func() { tm.done <- tm.Wait() }()
	return tm
}

func (tm *terminal) types(text string) {
	tm.t.Helper()
	if _, err := tm.Console.Write([]byte(text)); err != nil {
		tm.t.Fatal(err)
	}
}

// shows waits until what was shown since the beginning holds text.
func (tm *terminal) shows(text string) {
	tm.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(tm.shown.String(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			tm.t.Fatalf("the terminal does not show %q but %q", text, tm.shown.String())
		}
	}
}

// raw says whether the terminal is raw now.
func (tm *terminal) raw() bool {
	tm.t.Helper()
	got, err := unix.IoctlGetTermios(int(tm.slave.Fd()), unix.TCGETS)
	if err != nil {
		tm.t.Fatal(err)
	}
	return got.Lflag&(unix.ICANON|unix.ECHO) == 0
}

// ends waits for the end of mctl, after which the terminal must be as before.
func (tm *terminal) ends(status int) {
	tm.t.Helper()
	select {
	case <-tm.done:
	case <-time.After(30 * time.Second):
		tm.t.Fatalf("%v does not end; shown was %q", tm.Args, tm.shown.String())
	}
	if got := tm.ProcessState.ExitCode(); got != status {
		tm.t.Errorf("%v: status %d, want %d; shown was %q", tm.Args, got, status, tm.shown.String())
	}
	if tm.raw() {
		tm.t.Errorf("%v leaves the terminal raw", tm.Args)
	}
}

// TestTerminal: a shell at a terminal: its size, keys, leaving and coming back, its end.
func TestTerminal(t *testing.T) {
	w := newWorld(t)
	tm := w.terminal("run", "--rm", "-t", "busybox", "one", "sh")
	tm.shows("/ # ")
	eventually(t, "the terminal is raw", tm.raw) // what the shell writes may be shown a moment before
	sized := func() bool {                       // which it is given while the shell begins
		tm.types("stty size\r")
		return strings.Contains(tm.shown.String(), "30 100")
	}
	eventually(t, "the terminal has our size", sized)
	tm.types("echo TERM=$TERM\r")
	tm.shows("TERM=xterm")
	if err := tm.Resize(console.WinSize{Width: 77, Height: 22}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the size has changed", func() bool {
		tm.types("stty size\r")
		return strings.Contains(tm.shown.String(), "22 77")
	})
	tm.types("cat -n\r")
	eventually(t, "cat answers", func() bool { // what is typed before it reads is echoed, without a number
		tm.types("ping\r")
		return strings.Contains(tm.shown.String(), "1\tping\r\n")
	})
	tm.types("\x03") // ctrl-c interrupts what runs there, not mctl; the terminal then throws away what was typed before
	eventually(t, "the shell is back", func() bool {
		_, after, ok := strings.Cut(tm.shown.String(), "^C")
		return ok && strings.Contains(after, "\r\n/ # ")
	})
	tm.types("echo still-$((40+2))\r")
	tm.shows("still-42")
	tm.types("\x10\x10x\x15\r") // a ctrl-p that is no detaching; the shell takes it for the line before, which ctrl-u clears
	tm.types("\x10\x11")
	tm.shows("mctl tasks attach one")
	tm.ends(0)

	tm = w.terminal("tasks", "attach", "one")
	eventually(t, "the shell answers", func() bool {
		tm.types("echo back-$((40+2))\r")
		return strings.Contains(tm.shown.String(), "back-42")
	})
	// The daemon may go meanwhile.
	if err := w.Kill(); err != nil {
		t.Fatal(err)
	}
	tm.types("echo without-$((40+2))\r")
	tm.shows("without-42")
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	tm.types("exit 7\r")
	tm.ends(7)

	// An exec, left and found again.
	w.ok("run", "-d", "busybox", "two", "sleep", "1000")
	tm = w.terminal("tasks", "exec", "-t", "--exec-id", "e", "--detach-keys", "ctrl-x,d", "two", "sh")
	tm.shows("/ # ")
	eventually(t, "the terminal has our size", sized)
	tm.types("\x18d")
	tm.shows("--exec-id e")
	tm.ends(0)
	tm = w.terminal("tasks", "attach", "--exec-id", "e", "two")
	tm.types("exit 8\r")
	tm.ends(8)
}

// TestTerminalRestored: however mctl ends, the terminal is as it was.
func TestTerminalRestored(t *testing.T) {
	w := newWorld(t)
	begin := func(flags ...string) *terminal {
		tm := w.terminal(append(append([]string{"run", "-t"}, flags...), "busybox", fmt.Sprintf("c%d", time.Now().UnixNano()), "sh", "-c", "echo up; sleep 1000")...)
		tm.shows("up")
		eventually(t, "the terminal is raw", tm.raw)
		return tm
	}
	id := func(tm *terminal) string { return tm.Args[len(tm.Args)-4] }

	tm := begin()
	w.ok("tasks", "kill", "-s", "KILL", id(tm))
	tm.ends(137)

	tm = begin("--sig-proxy=false")
	if err := tm.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	tm.ends(143)
	w.running(id(tm))

	tm = begin()
	w.ok("tasks", "rm", "-f", id(tm)) // somebody else's doing: whether the status is still told is a matter of who is first
	select {
	case <-tm.done:
	case <-time.After(30 * time.Second):
		t.Fatal("mctl waits for a task that is gone")
	}
	if tm.raw() {
		t.Error("the terminal is left raw when the task is removed")
	}

	tm = w.terminal("--timeout", "2s", "run", "-t", "busybox", "late", "sleep", "1000")
	tm.ends(1)
	tm.shows("--timeout 2s")
	tm = w.terminal("run", "-t", "busybox", "never", "no-such-program")
	tm.ends(1)
	tm.shows("no-such-program")
}
