package stdio

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
)

// stream is one direction of output, while it is copied.
type stream interface {
	run()
	halt() // asks run to end, and does not wait for it
	drain(patience time.Duration, deadline time.Time)
	handles(add func(kind string, f *os.File)) // tells those that are its own (see Handles)
	holds() holding
}

// logged copies what a process writes into a log of ours. As with pipe, its goroutine alone closes the files.
type logged struct {
	src      *os.File
	terminal bool   // src is a terminal's master, which is not ours to close
	kind     string // of the handle that src is; empty for a terminal
	closed   func(kinds ...string)
	to       *logsink.Stream
	moved    atomic.Int64  // bytes so far
	idle     atomic.Bool   // all that was taken is in the log, but for a line without an end
	eof      chan struct{} // closed when src was at its end and everything is in the log
	once     sync.Once
	stop     chan struct{}
	alone    holding // while what was read of a terminal is not in the spool
}

func newLogged(src *os.File, to *logsink.Stream, kind string, closed func(...string)) *logged {
	return &logged{src: src, to: to, terminal: kind == "", kind: kind, closed: closed, eof: make(chan struct{}), stop: make(chan struct{}), alone: newHolding()}
}

func (o *logged) holds() holding { return o.alone }

func (o *logged) handles(add func(string, *os.File)) {
	if !o.terminal {
		add(o.kind, o.src)
	}
}

func (o *logged) halt() {
	o.once.Do(func() {
		close(o.stop)
		_ = o.src.SetReadDeadline(past)
	})
}

func (o *logged) stopped() bool {
	select {
	case <-o.stop:
		return true
	default:
		return false
	}
}

func (o *logged) run() {
	defer func() {
		o.to.Close()
		if !o.terminal {
			_ = o.src.Close()
			o.closed(o.kind)
		}
	}()
	if !o.put(false) { // what another process left in the spool
		return
	}
	for {
		n, err := o.take()
		o.moved.Add(n)
		switch {
		case n > 0:
			if !o.put(false) {
				return
			}
		case err == nil || errors.Is(err, syscall.EIO): // a terminal whose last other end was closed
			if o.put(true) {
				close(o.eof)
				o.tellLoss()
			}
			return
		case o.stopped():
			_ = o.to.Put(true) // once: what cannot be written now goes with the container
			return
		case errors.Is(err, os.ErrDeadlineExceeded): // time to try to tell of a loss
			if !o.put(false) {
				return
			}
		case errors.Is(err, os.ErrClosed):
			return
		case !o.pause(fullWait): // no room in the spool
			return
		}
	}
}

// fullWait is how often it is looked whether there is room again.
const fullWait = 250 * time.Millisecond

// take moves some of src into the spool, and waits for some to come: 0 and nil is its end.
func (o *logged) take() (n int64, err error) {
	o.idle.Store(true)
	defer o.idle.Store(false)
	if o.to.Lost() {
		_ = o.src.SetReadDeadline(time.Now().Add(fullWait))
	} else {
		_ = o.src.SetReadDeadline(time.Time{})
	}
	if o.stopped() { // halt may have set its deadline before this one
		_ = o.src.SetReadDeadline(past)
	}
	if o.terminal {
		return o.takeTerminal()
	}
	conn, err := o.src.SyscallConn()
	if err != nil {
		return 0, err
	}
	var terr error
	err = conn.Read(func(fd uintptr) bool {
		n, terr = o.to.Take(int(fd))
		return !errors.Is(terr, unix.EAGAIN)
	})
	if err != nil {
		return 0, err
	}
	return n, terr
}

func (o *logged) takeTerminal() (int64, error) {
	buf := make([]byte, 4<<10)
	n, err := o.alone.read(o.src, buf)
	if n > 0 {
		defer func() { <-o.alone }()
	}
	o.idle.Store(false)
	for b := buf[:n]; len(b) > 0; {
		m, terr := o.to.TakeBytes(b)
		if b = b[m:]; terr != nil && !o.pause(fullWait) {
			break
		}
	}
	if n > 0 {
		return int64(n), nil
	}
	if errors.Is(err, io.EOF) {
		return 0, nil
	}
	return 0, err
}

// put writes what was taken to the log, as soon as there is room. False: it was stopped before.
func (o *logged) put(last bool) bool {
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, fullWait) {
		if o.to.Put(last) == nil {
			return true
		}
		if !o.pause(wait) {
			return false
		}
	}
}

// tellLoss waits, after the end, until the log has room for how much was dropped. When it is stopped it tries a last time.
func (o *logged) tellLoss() {
	for o.to.Lost() {
		again := o.pause(fullWait)
		_ = o.to.Put(true)
		if !again {
			return
		}
	}
}

// pause waits; false when it was stopped.
func (o *logged) pause(d time.Duration) bool {
	select {
	case <-o.stop:
		return false
	case <-time.After(d):
		return true
	}
}

// drain is Streams.Drain for one stream. Nobody has to take anything out of a log: the end is when all is in it.
func (o *logged) drain(patience time.Duration, deadline time.Time) {
	moved, since := int64(-1), time.Now()
	for wait := 100 * time.Microsecond; ; wait = min(2*wait, 10*time.Millisecond) {
		// With a descendant that holds the stream, empty is the end.
		ended := wait > time.Millisecond && o.idle.Load() && unreadFile(o.src) == 0
		m, now := o.moved.Load(), time.Now()
		switch {
		case ended && m == moved, now.After(deadline):
			return
		case m != moved:
			since = now
		case now.Sub(since) > patience:
			return
		}
		moved = m
		select {
		case <-o.eof:
			return
		case <-o.stop:
			return
		case <-time.After(wait):
		}
	}
}
