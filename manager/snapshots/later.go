package snapshots

import (
	"slices"
	"sync"
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

// drop forgets what has not begun.
func (l *later) drop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = slices.DeleteFunc(l.queue, func(t thing) bool { return !t.waited })
}
