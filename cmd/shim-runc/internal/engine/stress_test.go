package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// script ends with code, at once or after having left a daemon behind: a process that has forked twice, so that its parent
// is not the one that started it.
func script(rnd *rand.Rand, code int) string {
	return []string{
		fmt.Sprintf("exit %d", code),
		fmt.Sprintf("(sleep 0.0%d &) ; exit %d", rnd.Intn(10), code),
		fmt.Sprintf("(sh -c 'exit 3' &) ; exit %d", code),
		fmt.Sprintf("sleep 0.00%d; exit %d", rnd.Intn(10), code),
	}[rnd.Intn(4)]
}

// TestStress is what the reaper and its fork guard are for: 500 short containers and 2,000 short execs at once, while
// libcontainer waits for children of its own, a fifth of them in the host's pid namespace, where their daemons fall to us.
// Every status is right, and nobody is left. Under -short it is a tenth of that.
func TestStress(t *testing.T) {
	containers, execs := 500, 2000
	if testing.Short() {
		containers, execs = containers/10, execs/10
	}
	f := newFixture(t)
	// Execs run in these: every fifth exec in the one without a pid namespace. Their init reaps what falls to it.
	var hosts []*Container
	for i := range 5 {
		hosts = append(hosts, f.create(t, IO{}, func(s *specs.Spec) {
			if i == 0 {
				hostPID(s)
			}
		}, "sh", "-c", "while :; do sleep 0.1; done"))
		start(t, hosts[i])
	}
	var work sync.WaitGroup
	split := func(n, workers int, one func(rnd *rand.Rand, i int) error) {
		for w := range workers {
			rnd := rand.New(rand.NewSource(int64(w)))
			work.Add(1)
			go func() {
				defer work.Done()
				for i := w; i < n; i += workers {
					if err := one(rnd, i); err != nil {
						t.Error(err)
					}
				}
			}()
		}
	}
	split(containers, 8, func(rnd *rand.Rand, i int) error { return f.shortContainer(rnd, i%5 == 0) })
	split(execs, 16, func(rnd *rand.Rand, i int) error { return shortExec(rnd, hosts[i%5], i) })
	work.Wait()

	for _, c := range hosts {
		if err := c.Signal(unix.SIGKILL, true); err != nil {
			t.Error(err)
		}
		if e := c.Init().Exit(); e.Status != 137 {
			t.Errorf("exit %d of a killed container", e.Status)
		}
	}
	deadline := time.Now().Add(20 * time.Second)
	for left := offspring(t); len(left) > 0; left = offspring(t) {
		if time.Now().After(deadline) {
			t.Fatalf("left, as pid and state: %v", left)
		}
		time.Sleep(10 * time.Millisecond) // polls the kernel's list, whose last change tells nobody
	}
}

func hostPID(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[1:] }

// shortContainer runs a container to its end and removes it.
func (f *fixture) shortContainer(rnd *rand.Rand, shared bool) error {
	id, code := f.id(), rnd.Intn(256)
	spec := testSpec(id, "sh", "-c", script(rnd, code))
	if shared {
		hostPID(spec)
	}
	c, err := f.Create(context.Background(), id, f.bundle, spec, IO{})
	if err != nil {
		return err
	}
	if err := c.Start(context.Background()); err != nil {
		return errors.Join(err, c.Signal(unix.SIGKILL, true), c.Destroy())
	}
	if e := c.Init().Exit(); e.Status != code || e.Signaled {
		err = fmt.Errorf("container %s ended with %+v, want %d", id, e, code)
	}
	if derr := c.Destroy(); derr != nil {
		err = errors.Join(err, derr)
	}
	if _, serr := os.Stat(filepath.Join(f.root, id)); !errors.Is(serr, os.ErrNotExist) {
		err = errors.Join(err, fmt.Errorf("state of %s is left: %w", id, serr))
	}
	return err
}

func shortExec(rnd *rand.Rand, c *Container, i int) error {
	code := rnd.Intn(256)
	p, err := c.Exec(context.Background(), fmt.Sprint("e", i), &specs.Process{
		Args: []string{"sh", "-c", script(rnd, code)}, Env: []string{"PATH=/bin"}, Cwd: "/",
	}, IO{Tree: i%2 == 0})
	if err != nil {
		return err
	}
	if e := p.Exit(); e.Status != code || e.Signaled {
		return fmt.Errorf("exec %d ended with %+v, want %d", i, e, code)
	}
	return nil
}

// offspring lists our children, zombies too, each as its pid and state.
func offspring(t *testing.T) (left []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		data, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue // it has just ended
		}
		fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
		if len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) {
			left = append(left, e.Name()+" "+fields[0])
		}
	}
	return left
}
