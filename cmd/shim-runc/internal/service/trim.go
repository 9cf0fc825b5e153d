package service

import (
	"runtime/debug"
	"sync"
	"time"
)

const (
	// trimAfter is how many execs make it worth while to give memory back to the kernel, which costs a garbage collection.
	trimAfter = 200
	// trimQuiet is how long no exec must have been deleted before that is done: the memory would be taken again at once.
	trimQuiet = 500 * time.Millisecond
)

// trimmer gives back the memory that many execs needed for a while, and that Go's heap would keep.
type trimmer struct {
	mu    sync.Mutex
	execs int         // deleted since it was last done
	timer *time.Timer // nil before the first time
}

// deleted counts an exec.
func (t *trimmer) deleted() {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch t.execs++; {
	case t.execs < trimAfter:
	case t.timer == nil:
		t.timer = time.AfterFunc(trimQuiet, t.trim)
	default:
		t.timer.Reset(trimQuiet)
	}
}

func (t *trimmer) trim() {
	t.mu.Lock()
	t.execs = 0
	t.mu.Unlock()
	debug.FreeOSMemory()
}
