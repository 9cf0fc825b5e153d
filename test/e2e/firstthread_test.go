package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// TestFirstThread: a shim's first thread, which stands for the process in /proc, is not the one that libcontainer moves into
// a container's mount namespace. Which one that is depends on Go's scheduler: hence many, made at once.
func TestFirstThread(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	want, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	bundles := filepath.Join(u.State(), "io.containerd.runtime.v2.task", u.Namespace)
	const many = 20
	failed := make([]error, many)
	var all sync.WaitGroup
	for n := range many {
		all.Go(func() { _, failed[n] = c.run(fmt.Sprint("c", n), "sleep 1000") })
	}
	all.Wait()
	if err := errors.Join(failed...); err != nil {
		t.Fatal(err)
	}
	shims := u.Shims()
	for _, pid := range shims {
		cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
		if err != nil || filepath.Dir(cwd) != bundles {
			t.Errorf("shim %d works in %q: %v", pid, cwd, err)
		}
		if mnt, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid)); err != nil || mnt != want {
			t.Errorf("shim %d is in %s, not %s: %v", pid, mnt, want, err)
		}
	}
	if len(shims) != many {
		t.Errorf("%d shims", len(shims))
	}
	for n := range many {
		c.finish(t, fmt.Sprint("c", n))
	}
}
