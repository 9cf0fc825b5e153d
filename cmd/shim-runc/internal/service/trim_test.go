package service

import (
	"os"
	"runtime"
	"sync"
	"testing"
	"time"
)

func TestRetire(t *testing.T) {
	threads := func() int {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(tasks)
	}
	// As many blocked at a time are as many threads.
	const many = 60
	var held, over sync.WaitGroup
	end := make(chan struct{})
	for range many {
		held.Add(1)
		over.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			held.Done()
			<-end
		})
	}
	held.Wait()
	close(end)
	over.Wait()
	if n := threads(); n < many {
		t.Fatalf("only %d threads to begin with", n)
	}
	const keep = 12
	retire(keep)
	const others = 10 // of the runtime and of tests that run beside
	deadline := time.Now().Add(20 * time.Second)
	for threads() > keep+others {
		if time.Now().After(deadline) {
			t.Fatalf("%d threads are left of %d, not %d", threads(), many, keep)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestFewExecs: what fewer execs than are worth a trim have needed is given back too, when it has been quiet for longer.
func TestFewExecs(t *testing.T) {
	var tr trimmer
	tr.compact = func() bool { t.Error("records are dropped for a few execs"); return false }
	for range 3 {
		tr.deleted()
	}
	if tr.few == nil || !tr.few.Stop() || tr.timer != nil {
		t.Error("nothing is to be done when it is quiet")
	}
	if !tr.free() || tr.free() {
		t.Error("it is given back once")
	}
}
