package reaper

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stranger starts a shell that is a child of another process, which is its reaper: reap lets that happen.
func stranger(t *testing.T, script string) (pid int, reap func()) {
	t.Helper()
	// The parent reports the child's pid, and waits for it only when its input ends.
	cmd := exec.Command("/bin/sh", "-c", "(trap '' TERM; "+script+") </dev/null & echo $!; read x; wait")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := shared.Guard(cmd.Start); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 32)
	n, err := out.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range strings.TrimSpace(string(buf[:n])) {
		pid = 10*pid + int(c-'0')
	}
	return pid, func() { _ = in.Close() }
}

func pidfd(t *testing.T, pid int) *os.File {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "pidfd")
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}

func TestAdoptRunning(t *testing.T) {
	for script, want := range map[string]Exit{"sleep 0.2; exit 42": {Status: 42}, "sleep 0.2; kill -9 $(exec sh -c 'echo $PPID')": {Status: 137, Signaled: true}} {
		pid, reap := stranger(t, script)
		p, err := shared.Adopt(pid, StartTicks(pid), nil)
		if err != nil {
			t.Fatal(err)
		}
		e := p.Exit() // while it is a zombie
		reap()
		if e.Status != want.Status || e.Signaled != want.Signaled || e.Unknown != "" {
			t.Errorf("%q: %+v", script, e)
		}
	}
}

// TestAdoptReaped: it ended, and somebody reaped it, while nobody looked but held a pidfd.
func TestAdoptReaped(t *testing.T) {
	keeps := tells()
	pid, reap := stranger(t, "sleep 0.05; exit 42")
	ticks, fd := StartTicks(pid), pidfd(t, pid)
	await(t, "zombie", func() bool { return readStat(pid).zombie })
	zombie, err := shared.Adopt(pid, ticks, pidfd(t, pid))
	if err != nil {
		t.Fatal(err)
	}
	if e := zombie.Exit(); e.Status != 42 || e.Unknown != "" {
		t.Errorf("zombie: %+v", e)
	}
	reap()
	await(t, "reaped", func() bool { return !readStat(pid).there })
	p, err := shared.Adopt(pid, ticks, fd)
	if err != nil {
		t.Fatal(err)
	}
	switch e := p.Exit(); {
	case keeps && (e.Status != 42 || e.Unknown != ""):
		t.Errorf("with a pidfd: %+v", e)
	case !keeps && (e.Status != UnknownStatus || e.Unknown == ""):
		t.Errorf("with a pidfd that keeps nothing: %+v", e)
	}
	p, err = shared.Adopt(pid, ticks, nil)
	if err != nil {
		t.Fatal(err)
	}
	if e := p.Exit(); e.Status != UnknownStatus || e.Unknown == "" {
		t.Errorf("without a pidfd: %+v", e)
	}
	if err := p.Signal(unix.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal: %v", err)
	}
}

// TestAdoptOther: the number belongs to another process by now.
func TestAdoptOther(t *testing.T) {
	p, err := shared.Adopt(os.Getpid(), StartTicks(os.Getpid())-1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if e := p.Exit(); e.Unknown == "" {
		t.Errorf("%+v", e)
	}
}

// TestAdoptChild: a process that is our child after all is waited for, and leaves no zombie.
func TestAdoptChild(t *testing.T) {
	var pid int
	_ = shared.Guard(func() error {
		proc, err := os.StartProcess("/bin/sh", []string{"sh", "-c", "sleep 0.1; exit 7"}, &os.ProcAttr{})
		if err != nil {
			t.Fatal(err)
		}
		pid = proc.Pid
		return proc.Release()
	})
	p, err := shared.Adopt(pid, StartTicks(pid), nil)
	if err != nil {
		t.Fatal(err)
	}
	if e := p.Exit(); e.Status != 7 || e.Unknown != "" {
		t.Errorf("%+v", e)
	}
	if readStat(pid).there {
		t.Error("it is left as a zombie")
	}
}
