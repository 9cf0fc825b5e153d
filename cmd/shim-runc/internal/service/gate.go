package service

import (
	"context"
	"sync"
)

// gate counts who is inside, and can be shut when nobody is. One that waits to be shut lets others in meanwhile: those
// inside may be waiting for them.
type gate struct {
	mu     sync.Mutex
	inside int
	shut   chan struct{} // not nil: closed when it opens again
	left   chan struct{} // not nil: closed when the next one leaves
}

// enter waits while the gate is shut.
func (g *gate) enter() {
	g.mu.Lock()
	for g.shut != nil {
		shut := g.shut
		g.mu.Unlock()
		<-shut
		g.mu.Lock()
	}
	g.inside++
	g.mu.Unlock()
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inside--
	if g.left != nil {
		close(g.left)
		g.left = nil
	}
}

// close shuts the gate once nobody is inside; the error is that of ctx.
func (g *gate) close(ctx context.Context) error {
	for {
		g.mu.Lock()
		if g.inside == 0 {
			g.shut = make(chan struct{})
			g.mu.Unlock()
			return nil
		}
		if g.left == nil {
			g.left = make(chan struct{})
		}
		left := g.left
		g.mu.Unlock()
		select {
		case <-left:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// open lets those in that wait.
func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.shut)
	g.shut = nil
}
