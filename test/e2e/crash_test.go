package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The crash test: how often the daemon is killed, how many clients work meanwhile, how many containers run all the time.
const (
	kills   = 100
	longest = 1200 * time.Millisecond // pause between two kills
	workers = 16
	steady  = 4
)

// seedEnv repeats a run: the same kills after the same pauses, the same containers.
const seedEnv = "MANAGERD_E2E_SEED"

func seed(t *testing.T) uint64 {
	t.Helper()
	s := uint64(time.Now().UnixNano())
	if v := os.Getenv(seedEnv); v != "" {
		var err error
		if s, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("%s: %v", seedEnv, err)
		}
	}
	t.Logf("%s=%d", seedEnv, s)
	return s
}

// TestCrash kills the daemon again and again, also while it starts, while containers start, exec, exit and are deleted.
// Whatever a client was told stays true, every exit code is the right one, nobody else dies, and nothing is left behind.
func TestCrash(t *testing.T) {
	seed := seed(t)
	u := newUser(t)
	c := newClient(t, u.Daemon)

	watched := watch(c)
	pids := map[string]uint32{}
	for i := range steady {
		id := fmt.Sprintf("steady%d", i)
		pid, err := c.run(id, "sleep 1000 & trap 'exit "+strconv.Itoa(50+i)+"' TERM; wait")
		if err != nil {
			t.Fatal(err)
		}
		pids[id] = pid
	}

	stop, begin := make(chan struct{}), time.Now()
	var work sync.WaitGroup
	runs := make([]int, workers)
	errs := make(chan error, workers)
	for w := range workers {
		r := rand.New(rand.NewPCG(seed, uint64(w)+1))
		work.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := (&life{client: c, id: fmt.Sprintf("w%d-%d", w, runs[w]), r: r}).live(); err != nil {
					errs <- err
					return
				}
				runs[w]++
			}
		})
	}
	r := rand.New(rand.NewPCG(seed, 0))
	var down []window
	for i := range kills {
		time.Sleep(time.Duration(r.IntN(1 + r.IntN(int(longest))))) // short ones are more frequent
		before := time.Now()
		if err := u.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := u.Spawn(); err != nil {
			t.Fatal(err)
		}
		if r.IntN(5) > 0 { // else the next kill may meet it while it starts
			if err := u.Ready(20 * time.Second); err != nil {
				t.Fatalf("after kill %d: %v", i+1, err)
			}
		}
		down = append(down, window{before, time.Now()})
	}
	if err := u.Ready(20 * time.Second); err != nil {
		t.Fatal(err)
	}
	close(stop)
	work.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	total := 0
	for _, n := range runs {
		total += n
	}
	t.Logf("%d kills, %d containers lived and died in %s", kills, total, time.Since(begin).Round(time.Millisecond))
	if total < kills {
		t.Errorf("only %d containers were run: nothing happened while the daemon was killed", total)
	}

	for i := range steady {
		id := fmt.Sprintf("steady%d", i)
		p, err := c.state(id, "")
		if err != nil {
			t.Error(err)
			continue
		}
		if p.Pid != pids[id] {
			t.Errorf("%s: pid %d, not %d", id, p.Pid, pids[id])
		}
		if err := c.kill(id, "", 15); err != nil {
			t.Error(err)
		}
		if got, err := c.wait(id, ""); err != nil || got != uint32(50+i) {
			t.Errorf("%s ended with %d (%v), not %d", id, got, err, 50+i)
		}
		if err := c.remove(id); err != nil {
			t.Error(err)
		}
	}
	if took := time.Since(begin); took > 90*time.Second {
		t.Errorf("it took %s", took)
	}
	watched.check(t, down)
}

// life is one container from its making to its end, driven by a client whose calls are cut off by kills at any moment:
// it then does not know whether the call was carried out, and asks again.
type life struct {
	*client
	id string
	r  *rand.Rand
}

// again calls until there is an answer of a daemon. done says of an error whether it means that an earlier try, whose
// answer was lost, was carried out.
func (l *life) again(what string, call func() error, done func(error) bool) error {
	for try := 0; ; try++ {
		err := call()
		switch {
		case err == nil:
			return nil
		case status.Code(err) == codes.Unavailable && l.ctx.Err() == nil:
			select {
			case <-time.After(time.Millisecond):
			case <-l.ctx.Done():
			}
		case try > 0 && done != nil && done(err):
			return nil
		default:
			return fmt.Errorf("%s: %s: %w", l.id, what, err)
		}
	}
}

func exists(err error) bool  { return status.Code(err) == codes.AlreadyExists }
func missing(err error) bool { return status.Code(err) == codes.NotFound }

// started says whether a start failed because it had been carried out already.
func started(err error) bool { return status.Code(err) == codes.FailedPrecondition || missing(err) }

func (l *life) live() error {
	code, kind := uint32(1+l.r.IntN(100)), l.r.IntN(3)
	script := fmt.Sprintf("exit %d", code) // gone at once
	if kind > 0 {
		script = fmt.Sprintf("sleep 1000 & trap 'exit %d' TERM; >/ready; wait", code)
	}
	s, err := l.sh(l.id, script)
	if err != nil {
		return err
	}
	steps := []struct {
		what string
		call func() error
		done func(error) bool
	}{
		{"prepare", func() error { return l.prepare(l.id) }, exists},
		{"container", func() error { return l.container(l.id, s) }, exists},
		{"create", func() error { _, err := l.create(l.id); return err }, exists},
		{"start", func() error { return l.start(l.id, "") }, started},
	}
	for _, s := range steps {
		if err := l.again(s.what, s.call, s.done); err != nil {
			return err
		}
	}
	if kind > 0 {
		for i := range 1 + l.r.IntN(3) {
			if err := l.execute(fmt.Sprintf("e%d", i), uint32(l.r.IntN(100))); err != nil {
				return err
			}
		}
	}
	if kind > 0 {
		signal := uint32(15)
		if kind == 2 {
			code, signal = 137, 9
		}
		if err := l.again("kill", func() error { return l.kill(l.id, "", signal) }, missing); err != nil {
			return err
		}
	}
	if err := l.ended(code); err != nil {
		return err
	}
	err = l.again("delete", func() error {
		got, err := l.deleteTask(l.id)
		if err == nil && got != code {
			return fmt.Errorf("deleted with code %d, not %d", got, code)
		}
		return err
	}, missing)
	if err != nil {
		return err
	}
	if err := l.again("delete container", func() error { return l.deleteContainer(l.id) }, missing); err != nil {
		return err
	}
	return l.again("remove snapshot", func() error { return l.removeSnapshot(l.id) }, missing)
}

// execute runs a second process in the container.
func (l *life) execute(name string, code uint32) error {
	err := l.again("exec", func() error {
		return l.exec(l.id, name, fmt.Sprintf("until [ -e /ready ]; do sleep 0.01; done; exit %d", code))
	}, exists)
	if err == nil {
		err = l.again("start exec", func() error { return l.start(l.id, name) }, started)
	}
	if err != nil {
		return err
	}
	err = l.again("wait for exec", func() error {
		got, err := l.wait(l.id, name)
		if err == nil && got != code {
			return fmt.Errorf("exec %s ended with %d, not %d", name, got, code)
		}
		return err
	}, nil)
	if err != nil {
		return err
	}
	return l.again("delete exec", func() error {
		got, err := l.deleteExec(l.id, name)
		if err == nil && got != code {
			return fmt.Errorf("exec %s was deleted with code %d, not %d", name, got, code)
		}
		return err
	}, missing)
}

// ended waits for the init's end.
func (l *life) ended(code uint32) error {
	return l.again("wait", func() error {
		got, err := l.wait(l.id, "")
		if err == nil && got != code {
			return fmt.Errorf("ended with %d, not %d", got, code)
		}
		return err
	}, nil)
}
