package server

import (
	"net"
	"sync"
	"time"
)

// gate stands before a listener of gRPC, which, when it is told to stop, closes a connection that was accepted and that it
// has not begun with, and waits for one that says nothing. Closed first, the gate lets no call fail: what is accepted is
// served, and who connects later waits, in the queue of the socket that the service manager holds, for the next daemon.
type gate struct {
	net.Listener
	ended chan struct{} // closed when nothing more is accepted
	once  sync.Once     // closes ended

	mu     sync.Mutex
	silent map[*gated]struct{} // accepted, and nothing was read yet
	empty  chan struct{}       // closed when silent is empty and shut waits for that
}

// gated is a connection that tells its gate when the client has begun to speak.
type gated struct {
	net.Conn
	gate *gate
	once sync.Once
}

func newGate(l net.Listener) *gate {
	return &gate{Listener: l, ended: make(chan struct{}), silent: map[*gated]struct{}{}}
}

// Accept is called by one goroutine, until it fails.
func (g *gate) Accept() (net.Conn, error) {
	c, err := g.Listener.Accept()
	if err != nil {
		if t, ok := err.(interface{ Temporary() bool }); !ok || !t.Temporary() { // then gRPC does not try again
			g.once.Do(func() { close(g.ended) })
		}
		return nil, err
	}
	known := &gated{Conn: c, gate: g}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.silent[known] = struct{}{}
	return known, nil
}

// shut takes no more connections, and returns when every client that was let in has spoken: from then on gRPC serves all
// of them. Those that say nothing within patience are turned away.
func (g *gate) shut(patience time.Duration) {
	_ = g.Close()
	<-g.ended
	g.mu.Lock()
	empty := make(chan struct{})
	if g.empty = empty; len(g.silent) == 0 {
		g.mu.Unlock()
		return
	}
	g.mu.Unlock()
	select {
	case <-empty:
		return
	case <-time.After(patience):
	}
	g.mu.Lock()
	var left []*gated
	for c := range g.silent {
		left = append(left, c)
	}
	g.mu.Unlock()
	for _, c := range left {
		_ = c.Close()
	}
}

func (c *gated) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.once.Do(c.leave) // spoken, or gone
	return n, err
}

func (c *gated) Close() error {
	c.once.Do(c.leave)
	return c.Conn.Close()
}

func (c *gated) leave() {
	g := c.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.silent, c)
	if len(g.silent) == 0 && g.empty != nil {
		close(g.empty)
		g.empty = nil
	}
}
