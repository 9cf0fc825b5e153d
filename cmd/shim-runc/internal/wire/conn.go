package wire

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// readSize is how much is read of a connection at once.
const readSize = 8 << 10

// conn is one client's connection. The server reads only whole frames out of it, and what it writes reaches the client
// only in whole frames, so that between two frames another process can go on.
type conn struct {
	*net.UnixConn
	raw      syscall.RawConn
	listener *Listener

	writing chan struct{} // a semaphore: held while a frame is written, and while the connection is frozen
	gone    chan struct{} // closed with the connection
	out     []byte        // what the server has written of a frame that is not whole; only its writer uses it

	mu     sync.Mutex
	wake   sync.Cond // of mu: thawed, or closed
	in     []byte    // read, and not yet a whole frame that was let through
	ready  []byte    // let through to the server
	calls  map[uint32]*call
	frozen bool
	closed bool
	ended  error // why no more can be read
}

func newConn(l *Listener, u *net.UnixConn) (*conn, error) {
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &conn{UnixConn: u, raw: raw, listener: l, writing: make(chan struct{}, 1), gone: make(chan struct{}), calls: map[uint32]*call{}}
	c.wake.L = &c.mu
	return c, nil
}

// Read gives the server bytes of whole frames, and waits while the connection is frozen.
func (c *conn) Read(p []byte) (int, error) {
	for {
		c.mu.Lock()
		c.letThroughLocked()
		for c.frozen && !c.closed && len(c.ready) == 0 {
			c.wake.Wait()
			c.letThroughLocked()
		}
		if len(c.ready) > 0 {
			n := copy(p, c.ready)
			c.ready = c.ready[n:]
			c.mu.Unlock()
			return n, nil
		}
		err := c.ended
		c.mu.Unlock()
		if err != nil {
			return 0, err
		}
		// The read and its bookkeeping are one step: a freeze finds each byte in the socket or in our buffers.
		if err := c.raw.Read(func(fd uintptr) bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.frozen || c.closed || c.readLocked(int(fd))
		}); err != nil {
			return 0, err
		}
	}
}

// readLocked reads once; false when there is nothing yet.
func (c *conn) readLocked(fd int) bool {
	var buf [readSize]byte
	for {
		n, err := unix.Read(fd, buf[:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return false
		case err != nil:
			c.ended = err
		case n == 0:
			c.ended = io.EOF
		default:
			c.in = append(c.in, buf[:n]...)
			if tooLong(c.in) {
				c.in, c.ended = nil, errTooLong
			}
		}
		return true
	}
}

// letThroughLocked hands the server every whole frame, unless frozen, and notes the calls.
func (c *conn) letThroughLocked() {
	if c.frozen {
		return
	}
	for {
		f, rest := cut(c.in)
		if f == nil {
			return
		}
		if f.kind() == typeRequest {
			c.calls[f.stream()] = newCall(f)
		}
		c.ready, c.in = append(c.ready, f...), rest
	}
}

// Write takes a part of a frame; the client gets it when it is whole. It waits while the connection is frozen.
func (c *conn) Write(p []byte) (int, error) {
	c.out = append(c.out, p...)
	for {
		f, rest := cut(c.out)
		if f == nil {
			return len(p), nil
		}
		select {
		case c.writing <- struct{}{}:
		case <-c.gone:
			return 0, net.ErrClosed
		}
		_, err := c.UnixConn.Write(f)
		if err == nil {
			c.note(f)
		}
		<-c.writing
		if err != nil {
			return 0, err
		}
		c.out = append([]byte(nil), rest...)
	}
}

// note keeps the books about a frame that the client has been sent.
func (c *conn) note(f frame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch k := c.calls[f.stream()]; {
	case k == nil:
	case f.kind() == typeResponse, f.flags()&flagRemoteClosed != 0:
		delete(c.calls, f.stream())
		c.listener.answered()
	case f.kind() == typeData:
		k.sent = append(k.sent[:0], f.payload()...)
	}
}

// Close ends the connection; its calls are forgotten, as nobody waits for their answers.
func (c *conn) Close() error {
	err := c.UnixConn.Close()
	c.mu.Lock()
	if !c.closed {
		close(c.gone)
	}
	c.closed = true
	if c.ended == nil {
		c.ended = net.ErrClosed
	}
	c.wake.Broadcast()
	c.mu.Unlock()
	c.listener.forget(c)
	return err
}

func (c *conn) setFrozen(frozen bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frozen = frozen
	if !frozen {
		c.wake.Broadcast()
	}
}

// state is what a successor needs; the connection is frozen. The file is a duplicate, for the caller to close; nil when
// the connection has been closed.
func (c *conn) state(now time.Time, o Options) (Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return Conn{}, nil
	}
	fd, err := duplicate(c.raw)
	if err != nil {
		return Conn{}, fmt.Errorf("cannot hand over a connection: %w", err)
	}
	f := os.NewFile(uintptr(fd), "connection")
	s := Conn{File: f}
	for _, id := range sorted(c.calls) {
		r, err := c.calls[id].again(now, o.Resume)
		if err != nil {
			_ = f.Close()
			return Conn{}, err
		}
		s.Unread = append(s.Unread, r...)
	}
	s.Unread = append(s.Unread, c.in...)
	return s, nil
}
