package service

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestGate: it is shut only while nobody is inside, and who waits for that keeps nobody out.
func TestGate(t *testing.T) {
	var g gate
	g.enter()
	short, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := g.close(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("shut with somebody inside: %v", err)
	}
	shut := make(chan error, 1)
	go func() { shut <- g.close(context.Background()) }()
	for g.mu.Lock(); g.left == nil; g.mu.Lock() { // until it waits
		g.mu.Unlock()
	}
	g.mu.Unlock()
	g.enter() // those inside may wait for this one
	g.leave()
	g.leave()
	if err := <-shut; err != nil {
		t.Fatal(err)
	}
	in := make(chan struct{})
	go func() {
		g.enter()
		close(in)
	}()
	select {
	case <-in:
		t.Fatal("entered a gate that is shut")
	case <-time.After(10 * time.Millisecond):
	}
	g.open()
	<-in
	g.leave()
}

// TestParks: only what can be asked again may be under way.
func TestParks(t *testing.T) {
	for name, want := range map[string]bool{
		"/containerd.task.v3.Task/Wait": true, "/containerd.task.v2.Task/Wait": true, "/containerd.task.v3.Task/Create": false,
		"/managerd.shim.v1.Shim/Events": true, "/managerd.shim.v1.Shim/Upgrade": true, "/managerd.shim.v1.Shim/Park": false,
		"/managerd.shim.v1.Shim/Wait": false, "/other/Wait": false, "Wait": false, "": false,
	} {
		if got := parks(name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
}
