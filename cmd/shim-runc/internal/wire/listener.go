// Package wire keeps clients' ttrpc connections whole while another process, or another server in this one, takes them
// over: it can stop them all between two frames, and says which calls wait for their answer, so that a successor is
// asked the same again on the same connection. It knows frames and the names of calls, not what they mean.
package wire

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Options say what can be carried over.
type Options struct {
	// Parks says whether a call may be unanswered while frozen: asking a successor again must have the same result.
	Parks func(service, method string) bool
	// Resume makes the payload with which a parked call is asked again; sent is the newest message of its stream that
	// the client has, nil if it has none. A nil Resume leaves payloads as they are.
	Resume func(service, method string, payload, sent []byte) ([]byte, error)
}

// Conn is a connection to hand over.
type Conn struct {
	File   *os.File
	Unread []byte // what a successor reads first: the parked calls, and what the client sent that was not looked at
}

// Listener accepts connections that can be frozen and handed over.
type Listener struct {
	opts Options
	file *os.File // listening, non-blocking
	raw  syscall.RawConn
	addr net.Addr

	mu      sync.Mutex
	wake    sync.Cond // of mu: thawed, or closed
	conns   map[*conn]struct{}
	waiting []*conn // restored, not yet accepted
	held    []*conn // by Freeze, until Thaw
	frozen  bool
	closed  bool
	change  chan struct{} // closed and replaced when a call was answered or a connection went
}

var _ net.Listener = (*Listener)(nil)

// Listen takes over a listening unix socket and, from a predecessor, its connections: those are accepted first. All
// files are the listener's from here on, also after an error.
func Listen(f *os.File, opts Options, restored []Conn) (_ *Listener, err error) {
	l := &Listener{opts: opts, conns: map[*conn]struct{}{}, change: make(chan struct{})}
	l.wake.L = &l.mu
	defer func() {
		for _, r := range restored {
			_ = r.File.Close() // duplicated below
		}
		if err != nil {
			_ = f.Close()
			for _, c := range l.waiting {
				_ = c.UnixConn.Close()
			}
		}
	}()
	// The socket's own name, and a check that it is one that listens.
	inner, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", f.Name(), err)
	}
	l.addr = inner.Addr()
	if u, ok := inner.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	_ = inner.Close()
	if l.addr.Network() != "unix" {
		return nil, fmt.Errorf("cannot listen on %s: not a unix socket", l.addr)
	}
	// The net package's listener does not tell its descriptor's readiness. A file in non-blocking mode does.
	if l.raw, err = f.SyscallConn(); err != nil {
		return nil, err
	}
	fd, err := duplicate(l.raw)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", l.addr, err)
	}
	_ = f.Close()
	f = os.NewFile(uintptr(fd), "listener")
	l.file = f
	if l.raw, err = f.SyscallConn(); err != nil {
		return nil, err
	}
	for _, r := range restored {
		c, err := l.wrap(r.File)
		if err != nil {
			return nil, fmt.Errorf("cannot take over a connection: %w", err)
		}
		c.in = r.Unread
		l.waiting = append(l.waiting, c)
		l.conns[c] = struct{}{}
	}
	return l, nil
}

func (l *Listener) wrap(f *os.File) (*conn, error) {
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := nc.(*net.UnixConn)
	if !ok {
		_ = nc.Close()
		return nil, fmt.Errorf("a %T, not a unix socket", nc)
	}
	return newConn(l, u)
}

// Accept waits for the next connection; while frozen, it leaves them in the socket's queue.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		l.mu.Lock()
		for l.frozen && !l.closed {
			l.wake.Wait()
		}
		if len(l.waiting) > 0 && !l.closed {
			c := l.waiting[0]
			l.waiting = l.waiting[1:]
			l.mu.Unlock()
			return c, nil
		}
		l.mu.Unlock()
		var c *conn
		var aerr error
		err := l.raw.Read(func(fd uintptr) bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			if l.frozen || l.closed {
				return true
			}
			c, aerr = l.acceptLocked(int(fd))
			return !errors.Is(aerr, unix.EAGAIN)
		})
		switch {
		case err != nil:
			return nil, net.ErrClosed
		case aerr != nil:
			return nil, &net.OpError{Op: "accept", Net: "unix", Addr: l.addr, Err: aerr}
		case c != nil:
			return c, nil
		}
	}
}

func (l *Listener) acceptLocked(fd int) (*conn, error) {
	for {
		n, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return nil, err
		}
		f := os.NewFile(uintptr(n), "connection")
		c, err := l.wrap(f)
		_ = f.Close()
		if err != nil {
			return nil, err
		}
		l.conns[c] = struct{}{}
		return c, nil
	}
}

// Addr is where clients connect to.
func (l *Listener) Addr() net.Addr { return l.addr }

// Close stops accepting; connections stay.
func (l *Listener) Close() error {
	l.mu.Lock()
	l.closed = true
	l.wake.Broadcast()
	left := l.waiting
	l.waiting = nil
	l.mu.Unlock()
	for _, c := range left {
		_ = c.Close()
	}
	return l.file.Close()
}

// Freeze stops every connection between two frames once all calls but those that park are answered: no request is let
// through to the server, and nothing the server writes reaches a client, until Thaw. When ctx ends before, nothing is
// frozen, and the error names a call that was in the way. A handler whose client has gone is not waited for: a caller for
// whom that matters counts its handlers itself.
func (l *Listener) Freeze(ctx context.Context) error {
	l.mu.Lock()
	l.frozen = true
	conns := slices.Collect(maps.Keys(l.conns))
	l.mu.Unlock()
	for _, c := range conns {
		c.setFrozen(true)
	}
	held := 0
	fail := func(why string) error {
		for _, c := range conns[:held] {
			<-c.writing
		}
		l.unfreeze(conns)
		return fmt.Errorf("cannot stop connections: %s: %w", why, ctx.Err())
	}
	for {
		l.mu.Lock()
		change := l.change
		l.mu.Unlock()
		busy := l.busy(conns)
		if busy == "" {
			break
		}
		select {
		case <-change:
		case <-ctx.Done():
			return fail(busy + " is not answered")
		}
	}
	for _, c := range conns {
		select {
		case c.writing <- struct{}{}:
			held++
		case <-ctx.Done():
			return fail("a client does not read its answers")
		}
	}
	l.mu.Lock()
	l.held = conns
	l.mu.Unlock()
	return nil
}

// busy names a call that does not park.
func (l *Listener) busy(conns []*conn) string {
	for _, c := range conns {
		c.mu.Lock()
		for _, k := range c.calls {
			if !c.closed && (l.opts.Parks == nil || !l.opts.Parks(k.service, k.method)) {
				c.mu.Unlock()
				return k.service + "/" + k.method
			}
		}
		c.mu.Unlock()
	}
	return ""
}

// Thaw ends a Freeze that succeeded: everything goes on as if nothing had been.
func (l *Listener) Thaw() {
	l.mu.Lock()
	held := l.held
	l.held = nil
	l.mu.Unlock()
	for _, c := range held {
		<-c.writing
	}
	l.unfreeze(held)
}

func (l *Listener) unfreeze(conns []*conn) {
	for _, c := range conns {
		c.setFrozen(false)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.frozen = false
	l.wake.Broadcast()
}

// HandOver gives the listening socket and every connection, frozen before. The files are duplicates, for the caller to
// close. Nothing changes here: a Thaw can follow if no successor took them.
func (l *Listener) HandOver() (socket *os.File, conns []Conn, err error) {
	defer func() {
		if err != nil {
			for _, c := range conns {
				_ = c.File.Close()
			}
			conns = nil
		}
	}()
	l.mu.Lock()
	all := slices.Collect(maps.Keys(l.conns))
	l.mu.Unlock()
	now := time.Now()
	for _, c := range all {
		s, err := c.state(now, l.opts)
		if err != nil {
			return nil, conns, err
		}
		if s.File != nil {
			conns = append(conns, s)
		}
	}
	fd, err := duplicate(l.raw)
	if err != nil {
		return nil, conns, fmt.Errorf("cannot hand over %s: %w", l.addr, err)
	}
	return os.NewFile(uintptr(fd), "listener"), conns, nil
}

// answered tells a Freeze to look again.
func (l *Listener) answered() {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.change)
	l.change = make(chan struct{})
}

func (l *Listener) forget(c *conn) {
	l.mu.Lock()
	delete(l.conns, c)
	l.mu.Unlock()
	l.answered()
}

// duplicate gives another descriptor of the same file, which closes on exec.
func duplicate(raw syscall.RawConn) (fd int, err error) {
	cerr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(cerr, err)
}

func sorted(m map[uint32]*call) []uint32 { return slices.Sorted(maps.Keys(m)) }
