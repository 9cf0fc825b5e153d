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
	greeting greeting
	ended    chan struct{} // closed when nothing more is accepted
	once     sync.Once     // closes ended

	mu     sync.Mutex
	silent map[*gated]struct{} // accepted, and the greeting was not read yet
	empty  chan struct{}       // closed when silent is empty and shut waits for that
}

// greeting says how many bytes a client says at first, before which the server has no connection; by the first ones that it
// has said, up to 33.
type greeting func(said []byte) int

// greetingHTTP2 is a preface of 24 bytes and a frame of settings, whose header begins with the length of the rest (RFC 9113,
// 3.4 and 4.1).
func greetingHTTP2(said []byte) int {
	const preface, header = 24, 9
	if len(said) < preface+header {
		return preface + header
	}
	return preface + header + int(said[preface])<<16 + int(said[preface+1])<<8 + int(said[preface+2])
}

// greetingTTRPC is any byte.
func greetingTTRPC([]byte) int { return 1 }

// gated is a connection that tells its gate when the client has greeted.
type gated struct {
	net.Conn
	gate *gate
	once sync.Once

	// Of the reader alone, until the greeting is whole.
	said  []byte
	total int
}

func newGate(l net.Listener, g greeting) *gate {
	return &gate{Listener: l, greeting: g, ended: make(chan struct{}), silent: map[*gated]struct{}{}}
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
	known := &gated{Conn: c, gate: g, said: make([]byte, 0, 33)}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.silent[known] = struct{}{}
	return known, nil
}

// shut takes no more connections, and returns when every client that was let in has greeted: from then on gRPC serves all
// of them. Those that do not within patience are turned away.
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
	if c.total >= 0 {
		c.said = append(c.said, p[:min(n, cap(c.said)-len(c.said))]...)
		if c.total += n; err != nil || c.total >= c.gate.greeting(c.said) { // greeted, or gone
			c.total, c.said = -1, nil
			c.once.Do(c.leave)
		}
	}
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
