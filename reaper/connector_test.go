package reaper

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// threads, set in the environment, makes this program end in a way that takes several threads.
const threads = "REAPER_TEST_THREADS"

func init() {
	if how := os.Getenv(threads); how != "" {
		_ = os.Unsetenv(threads)
		runtime.LockOSThread() // the first thread: init runs on it
		endInThreads(how)
	}
}

func endInThreads(how string) {
	go func() {
		runtime.LockOSThread()
		switch how {
		case "exec": // the first thread is killed, and this one takes its number
			panic(unix.Exec("/bin/sh", []string{"sh", "-c", "exit 7"}, nil))
		case "group":
			unix.Exit(8)
		case "first": // it has gone before
			for {
				if st := readStat(os.Getpid()); st.zombie {
					unix.Exit(9)
				}
			}
		}
	}()
	if how == "first" {
		_, _, _ = unix.Syscall(unix.SYS_EXIT, 0, 0, 0) // not a raw one: on one processor the other thread waits for it to be free
	}
	select {}
}

// listener is a connector, or the test is skipped: where nobody hears anything there is nothing to test.
func listener(t *testing.T) *connector {
	t.Helper()
	c := &connector{}
	if err := c.watch(os.Getpid()); err != nil {
		t.Skip(err)
	}
	c.forget(os.Getpid())
	return c
}

// held starts a child of another process, which runs script once begin has been called, and reaps it at once.
func held(t *testing.T, script string) (pid int, begin func()) {
	t.Helper()
	dir := t.TempDir()
	gate := dir + "/gate"
	if err := unix.Mkfifo(gate, 0o600); err != nil {
		t.Fatal(err)
	}
	pid, reap := stranger(t, "read go <"+gate+"; "+script)
	reap()
	return pid, func() {
		if err := os.WriteFile(gate, []byte("go\n"), 0); err != nil {
			t.Error(err)
		}
	}
}

func TestConnector(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := listener(t)
	for _, e := range []struct {
		name, script string
		want         unix.WaitStatus
		known        bool
	}{
		{"code", "exit 42", 42 << 8, true},
		{"signal", "kill -9 $(exec sh -c 'echo $PPID')", 9, true},
		{"exec by another thread", threads + "=exec exec " + self, 7 << 8, true},
		{"end by another thread", threads + "=group exec " + self, 8 << 8, true},
		{"the first thread first", threads + "=first exec " + self, 0, false},
	} {
		t.Run(e.name, func(t *testing.T) {
			pid, begin := held(t, e.script)
			if err := c.watch(pid); err != nil {
				t.Fatal(err)
			}
			begin()
			await(t, "reaped", func() bool { return !readStat(pid).there })
			if ws, known := c.exit(pid); ws != e.want || known != e.known {
				t.Errorf("%#x, %v", ws, known)
			}
			c.forget(pid)
			if ws, known := c.exit(pid); known {
				t.Errorf("when it is forgotten: %#x", ws)
			}
		})
	}
	if c.sock != nil {
		t.Error("the socket is open when nobody is watched")
	}
}

// TestConnectorMany: more than the filter lists, on a machine that is busy ending others.
func TestConnectorMany(t *testing.T) {
	c := listener(t)
	pids := map[int]int{}
	var begins []func()
	for i := range filtered + 10 {
		pid, begin := held(t, fmt.Sprintf("exit %d", i+1))
		if err := c.watch(pid); err != nil {
			t.Fatal(err)
		}
		pids[pid], begins = i+1, append(begins, begin)
	}
	var all sync.WaitGroup
	for _, begin := range begins {
		all.Go(begin)
	}
	all.Wait()
	for pid, code := range pids {
		await(t, "reaped", func() bool { return !readStat(pid).there })
		if ws, known := c.exit(pid); !known || ws.ExitStatus() != code {
			t.Errorf("process %d: %#x, %v, not %d", pid, ws, known, code)
		}
		c.forget(pid)
	}
}

// TestAdoptUntold: on a kernel that says nothing through a pidfd.
func TestAdoptUntold(t *testing.T) {
	listener(t)
	r := &Reaper{procs: map[int]*Process{}, begun: make(chan struct{})}
	r.Begin()
	pid, begin := held(t, "exit 42")
	p, err := r.Adopt(pid, StartTicks(pid), nil)
	if err != nil {
		t.Fatal(err)
	}
	begin()
	if e := p.Exit(); e.Status != 42 || e.Unknown != "" {
		t.Errorf("%+v", e)
	}
	p.Forget()
	if r.connector.sock != nil {
		t.Error("the connector listens on")
	}
}
