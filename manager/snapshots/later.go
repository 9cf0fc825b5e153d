package snapshots

import "sync"

// later does things one after the other, behind those who asked for them. Its zero value is ready.
type later struct {
	mu    sync.Mutex
	queue []func()
	busy  bool
}

func (l *later) do(fn func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = append(l.queue, fn)
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
		fn := l.queue[0]
		l.queue = l.queue[1:]
		l.mu.Unlock()
		fn()
	}
}

// wait waits for what was asked for before.
func (l *later) wait() {
	done := make(chan struct{})
	l.do(func() { close(done) })
	<-done
}
