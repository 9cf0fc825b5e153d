package snapshots

import (
	"slices"
	"sync"
	"time"
)

// later does things one after the other, behind those who asked for them. Its zero value is ready.
type later struct {
	mu    sync.Mutex
	queue []thing
	busy  bool
}

type thing struct {
	fn     func()
	waited bool // somebody waits for it
}

func (l *later) do(fn func()) { l.add(thing{fn: fn}) }

func (l *later) add(t thing) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = append(l.queue, t)
	if !l.busy {
		l.busy = true
		go l.run()
	}
}

func (l *later) run() {
	for {
		l.mu.Lock()
		if len(l.queue) == 0 {
			l.busy = false
			l.mu.Unlock()
			return
		}
		t := l.queue[0]
		l.queue = l.queue[1:]
		l.mu.Unlock()
		t.fn()
	}
}

// wait waits for what was asked for before.
func (l *later) wait() {
	done := make(chan struct{})
	l.add(thing{func() { close(done) }, true})
	<-done
}

// ending is how long end waits for what is stuck, such as a deletion on a file system that hangs.
const ending = 5 * time.Second

// end forgets what has not begun, which the next start sweeps, and waits for what has.
func (l *later) end() {
	l.mu.Lock()
	l.queue = slices.DeleteFunc(l.queue, func(t thing) bool { return !t.waited })
	l.mu.Unlock()
	done := make(chan struct{})
	l.add(thing{func() { close(done) }, true})
	select {
	case <-done:
	case <-time.After(ending):
	}
}
