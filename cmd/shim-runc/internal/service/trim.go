package service

import (
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"time"
)

const (
	// trimAfter is how many execs make it worth while to give memory back to the kernel, which costs a garbage collection.
	trimAfter = 200
	// trimQuiet is how long no exec must have been deleted before that is done: the memory would be taken again at once.
	trimQuiet = 500 * time.Millisecond
	// trimFew is that of fewer execs.
	trimFew = 30 * time.Second
	// trimThreads is how many threads stay then. Go ends none by itself, and each has about 40 KiB of memory.
	trimThreads = 12
	// trimLatest is the longest time between two looks whether the daemon has taken the rest of the events.
	trimLatest = 5 * time.Minute
)

// trimmer gives back the memory that many execs needed for a while, and that Go's heap would keep, and their records.
type trimmer struct {
	compact func() (more bool) // drops records; more: the daemon has not taken all of them yet

	mu    sync.Mutex
	execs int           // deleted since it was last done
	timer *time.Timer   // nil before the first time
	few   *time.Timer   // likewise
	again time.Duration // until records are dropped next
}

// deleted counts an exec.
func (t *trimmer) deleted() {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch t.execs++; {
	case t.execs < trimAfter:
		if t.few == nil {
			t.few = time.AfterFunc(trimFew, func() { t.free() })
		} else {
			t.few.Reset(trimFew)
		}
	case t.timer == nil:
		t.timer = time.AfterFunc(trimQuiet, t.trim)
	default:
		t.timer.Reset(trimQuiet)
	}
}

// free gives back what execs have needed since it was last done, if there were any.
func (t *trimmer) free() (any bool) {
	t.mu.Lock()
	any = t.execs > 0
	t.execs = 0
	t.mu.Unlock()
	if any {
		retire(trimThreads)
		debug.FreeOSMemory()
	}
	return any
}

func (t *trimmer) trim() {
	more := t.compact()
	busy := t.free() // or it is only for the records that it is done again
	t.mu.Lock()
	defer t.mu.Unlock()
	if !more || busy {
		t.again = trimQuiet
	}
	if more && t.execs < trimAfter { // else an exec has set the timer
		t.again = min(2*t.again, trimLatest)
		t.timer.Reset(t.again)
	}
}

// retire ends idle threads, so that about keep are left.
func retire(keep int) {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	var held sync.WaitGroup
	end := make(chan struct{})
	for range len(tasks) - keep {
		held.Add(1)
		go func() {
			runtime.LockOSThread() // a thread that is locked when its goroutine ends, ends with it
			held.Done()
			<-end
		}()
	}
	held.Wait()
	close(end)
}
