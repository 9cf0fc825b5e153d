package snapshots

import (
	"testing"
	"time"
)

func TestLater(t *testing.T) {
	var l later
	var done []int
	for i := range 5 {
		l.do(func() { done = append(done, i) })
	}
	l.wait()
	if len(done) != 5 || done[0] != 0 || done[4] != 4 {
		t.Errorf("done: %v", done)
	}

	// At the end what has not begun is forgotten, who waits is let go, and what is stuck is left.
	began, stuck := make(chan struct{}), make(chan struct{})
	l.do(func() { close(began); <-stuck })
	<-began
	l.do(func() { t.Error("it was begun after the end") })
	waited := make(chan struct{})
	go func() { l.wait(); close(waited) }()
	for { // until it waits
		l.mu.Lock()
		n := len(l.queue)
		l.mu.Unlock()
		if n == 2 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	ended := make(chan struct{})
	go func() { l.end(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("the end waits for what is stuck")
	}
	close(stuck)
	<-waited
}
