package reaper

import (
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var shared *Reaper

func TestMain(m *testing.M) {
	var err error
	if shared, err = New(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if z := zombies(); code == 0 && len(z) > 0 {
		fmt.Fprintln(os.Stderr, "zombies left behind:", z)
		code = 1
	}
	os.Exit(code)
}

// start forks a shell without anybody but the reaper to wait for it.
func start(script string) (*Process, error) {
	return shared.Fork(func() (int, error) {
		p, err := os.StartProcess("/bin/sh", []string{"sh", "-c", script}, &os.ProcAttr{Files: []*os.File{nil, nil, nil}})
		if err != nil {
			return 0, err
		}
		defer func() { _ = p.Release() }()
		return p.Pid, nil
	})
}

func TestExits(t *testing.T) {
	for _, c := range []struct {
		script   string
		status   int
		signaled bool
	}{
		{"exit 0", 0, false}, {"exit 42", 42, false}, {"exit 255", 255, false},
		{"kill -9 $$", 137, true}, {"kill -TERM $$", 143, true},
	} {
		p, err := start(c.script)
		if err != nil {
			t.Fatal(err)
		}
		if e := p.Exit(); e.Status != c.status || e.Signaled != c.signaled || e.At.IsZero() {
			t.Errorf("%q: %+v", c.script, e)
		}
		if err := p.Signal(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("signal after the end: %v", err)
		}
	}
}

func TestSignal(t *testing.T) {
	p, err := start("exec sleep 100")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if e := p.Exit(); e.Status != 137 {
		t.Errorf("%+v", e)
	}
}

func TestForkError(t *testing.T) {
	want := errors.New("no")
	if _, err := shared.Fork(func() (int, error) { return 0, want }); !errors.Is(err, want) {
		t.Errorf("got %v", err)
	}
}

// startWaited forks a shell of which an os.Process is kept, until the reaper calls its Wait.
func startWaited(script string) (*Process, error) {
	var proc *os.Process
	return shared.ForkWaited(func() (pid int, err error) {
		if proc, err = os.StartProcess("/bin/sh", []string{"sh", "-c", script}, &os.ProcAttr{Files: []*os.File{nil, nil, nil}}); err != nil {
			return 0, err
		}
		return proc.Pid, nil
	}, func() (*os.ProcessState, error) { return proc.Wait() })
}

// TestForkWaited: whoever reaps, exits are right, and no descriptor waits for the garbage collector.
func TestForkWaited(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	var before int
	for i := range 100 {
		if i == 1 { // the first one opens Go's poller
			before = descriptors(t)
		}
		p, err := startWaited("exit " + strconv.Itoa(i))
		if err != nil {
			t.Fatal(err)
		}
		if e := p.Exit(); e.Status != i || e.Unknown != "" {
			t.Errorf("%+v, want status %d", e, i)
		}
		p.Forget()
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
	p, err := startWaited("kill -9 $$")
	if err != nil {
		t.Fatal(err)
	}
	if e := p.Exit(); e.Status != 137 || !e.Signaled {
		t.Errorf("%+v", e)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestStress is the reason for the fork guard: short processes with random codes, others that the caller waits for
// itself, and double-forking daemons whose orphans fall to us, all at once. Every code is right, no zombie is left.
func TestStress(t *testing.T) {
	const workers = 16
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	var wg sync.WaitGroup
	for w := range workers {
		rnd := rand.New(rand.NewSource(int64(w)))
		wg.Add(1)
		go func() {
			defer wg.Done()
			for range rounds {
				code := rnd.Intn(256)
				switch rnd.Intn(3) {
				case 0: // ours to wait for
					begin := start
					if rnd.Intn(2) == 0 {
						begin = startWaited
					}
					p, err := begin("exit " + strconv.Itoa(code))
					if err != nil {
						t.Error(err)
						return
					}
					if e := p.Exit(); e.Status != code {
						t.Errorf("exit %d, want %d", e.Status, code)
					}
				case 1: // somebody else's, inside the guard
					err := shared.Guard(func() error { return exec.Command("/bin/sh", "-c", "exit "+strconv.Itoa(code)).Run() })
					var ee *exec.ExitError
					if got := 0; errors.As(err, &ee) {
						if got = ee.ExitCode(); got != code {
							t.Errorf("exit %d, want %d", got, code)
						}
					} else if err != nil || code != 0 {
						t.Errorf("want exit %d, got error %v", code, err)
					}
				case 2: // a daemon: its grandchild outlives it and becomes our orphan
					p, err := start(fmt.Sprintf("(sh -c 'exit 3' &) ; (sleep 0.0%d &) ; exit %d", rnd.Intn(5), code))
					if err != nil {
						t.Error(err)
						return
					}
					if e := p.Exit(); e.Status != code {
						t.Errorf("exit %d, want %d", e.Status, code)
					}
				}
			}
		}()
	}
	wg.Wait()
	deadline := time.Now().Add(20 * time.Second)
	for len(children()) > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("still there: %v", children())
		}
		time.Sleep(10 * time.Millisecond) // polls for the kernel's list to empty, which tells nobody
	}
}

func TestFreeze(t *testing.T) {
	shared.Freeze()
	forked := make(chan struct{})
	go func() {
		defer close(forked)
		if p, err := start("exit 1"); err != nil || p.Exit().Status != 1 {
			t.Errorf("%v", err)
		}
	}()
	select {
	case <-forked:
		t.Error("forked while frozen")
	case <-time.After(50 * time.Millisecond):
	}
	shared.Thaw()
	<-forked
}

// children lists our children, "pid state" each, from /proc.
func children() []string {
	var out []string
	entries, err := os.ReadDir("/proc")
	if err != nil {
		panic(err)
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		data, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
		if len(f) > 1 && f[1] == strconv.Itoa(os.Getpid()) {
			out = append(out, e.Name()+" "+f[0])
		}
	}
	return out
}

func zombies() []string {
	var out []string
	for _, c := range children() {
		if strings.HasSuffix(c, " Z") {
			out = append(out, c)
		}
	}
	return out
}
