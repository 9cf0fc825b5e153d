package server

import (
	"encoding/binary"
	"net"
	"sync"
	"time"
)

// drain stands before a listener of ttrpc, whose server, when it closes a connection, forgets the calls on it, and whose
// protocol has no way to say that no more are taken. Drained first, a call was either answered, or the client could not send
// it (EPIPE, which ttrpc's client tells as ErrClosed) and may make it again: none is done and not answered.
type drain struct {
	net.Listener

	mu    sync.Mutex
	conns map[*drained]struct{}
	empty chan struct{} // closed when conns is empty and end waits for that
}

func newDrain(l net.Listener) *drain { return &drain{Listener: l, conns: map[*drained]struct{}{}} }

func (d *drain) Accept() (net.Conn, error) {
	c, err := d.Listener.Accept()
	if err != nil {
		return nil, err
	}
	known := &drained{Conn: c, drain: d}
	known.answered = sync.NewCond(&known.mu)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns[known] = struct{}{}
	return known, nil
}

// end has every connection closed once the calls that clients have sent are answered; those that are not within patience are
// left to the server. To be called when nothing more is accepted.
func (d *drain) end(patience time.Duration) {
	d.mu.Lock()
	empty := make(chan struct{})
	if len(d.conns) == 0 {
		close(empty)
	} else {
		d.empty = empty
	}
	for c := range d.conns {
		if half, ok := c.Conn.(interface{ CloseRead() error }); ok {
			_ = half.CloseRead() // what is in the socket can be read; an error says that there is no client
		}
	}
	d.mu.Unlock()
	select {
	case <-empty:
	case <-time.After(patience):
	}
}

// drained is a connection of a server whose calls are unary: an end that is read is not shown to the server, which would close
// at once, before what was sent is answered.
type drained struct {
	net.Conn
	drain *drain

	mu       sync.Mutex
	in, out  frames
	open     int // requests without an answer
	closed   bool
	answered *sync.Cond // open or closed has changed
}

func (c *drained) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open += c.in.count(p[:n])
	for err != nil && n == 0 && c.open > 0 && !c.closed {
		c.answered.Wait()
	}
	return n, err
}

func (c *drained) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open -= c.out.count(p[:n])
	c.closed = c.closed || err != nil // nobody hears the rest
	c.answered.Broadcast()
	return n, err
}

func (c *drained) Close() error {
	c.mu.Lock()
	c.closed = true
	c.answered.Broadcast()
	c.mu.Unlock()
	d := c.drain
	d.mu.Lock()
	if delete(d.conns, c); len(d.conns) == 0 && d.empty != nil {
		close(d.empty)
		d.empty = nil
	}
	d.mu.Unlock()
	return c.Conn.Close()
}

// frames counts the frames of ttrpc in a stream: four bytes of length (big endian, without the header), six more of header,
// payload.
type frames struct {
	head []byte
	rest int // of the payload
}

const ttrpcHeader = 10

// count says how many frames end in the next bytes of the stream.
func (f *frames) count(p []byte) (whole int) {
	for len(p) > 0 {
		if len(f.head) < ttrpcHeader {
			n := min(ttrpcHeader-len(f.head), len(p))
			f.head, p = append(f.head, p[:n]...), p[n:]
			if len(f.head) < ttrpcHeader {
				return whole
			}
			f.rest = int(binary.BigEndian.Uint32(f.head))
		}
		n := min(f.rest, len(p))
		f.rest, p = f.rest-n, p[n:]
		if f.rest == 0 {
			f.head = f.head[:0]
			whole++
		}
	}
	return whole
}
