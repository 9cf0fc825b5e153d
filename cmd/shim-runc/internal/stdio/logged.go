package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logger"
	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
)

// stream is one direction of output, while it is copied.
type stream interface {
	run()
	halt()    // asks run to end, and does not wait for it
	release() // lets go of what run does not close, when nobody uses it any more
	drain(patience time.Duration, deadline time.Time)
	reopen(ctx context.Context) (path string, err error) // begins a new file, if it is one that is not there by its name
	state() Output
	handles(add func(kind string, f *os.File)) // tells those that are its own (see Handles)
	holds() holding
}

// Output is how one stream of output is.
type Output struct {
	Stream  string // stdout, also a terminal's, or stderr
	Sink    string // fifo, file, json-file, cri, binary, null or ring
	Bytes   int64  // that were moved
	Waiting string // why nothing is written now; empty: it is
	Since   time.Time
	Lost    logsink.Loss // what the log does not tell of yet
	Logger  logger.State
}

// Outputs says how the streams are. It does not wait for any sink.
func (s *Streams) Outputs() []Output {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Output
	var terminals Output // what is said of its logger; its stream is the one that we copy
	for _, o := range s.outs {
		st := o.state()
		if h, ok := o.(*handed); ok && h.handle == "" {
			terminals = st
			continue
		}
		if terminals.Sink != "" {
			st.Sink, st.Logger = terminals.Sink, terminals.Logger
		}
		all = append(all, st)
	}
	return all
}

// logged copies what a process writes into a log of ours. As with pipe, its goroutine alone closes the files.
type logged struct {
	src      *os.File
	terminal bool // src is a terminal's master, which is not ours to close
	sink     sink
	kind     string // of the handle that src is; empty for a terminal
	closed   func(kinds ...string)
	to       *logsink.Stream
	stall    stall
	moved    atomic.Int64  // bytes so far
	idle     atomic.Bool   // all that was taken is in the log, but for a line without an end
	eof      chan struct{} // closed when src was at its end and everything is in the log
	once     sync.Once
	stop     chan struct{}
	alone    holding // while what was read of a terminal is not in the spool
}

func newLogged(src *os.File, to *logsink.Stream, k sink, kind string, closed func(...string)) *logged {
	return &logged{src: src, to: to, sink: k, terminal: kind == "", kind: kind, closed: closed, eof: make(chan struct{}), stop: make(chan struct{}), alone: newHolding()}
}

func (o *logged) holds() holding { return o.alone }
func (o *logged) release()       {}

func (o *logged) state() Output {
	st := Output{Stream: o.sink.stream, Sink: o.sink.kind, Bytes: o.moved.Load(), Lost: o.to.Loss()}
	st.Waiting, st.Since = o.stall.get()
	return st
}

// reopen begins a new file, and returns when nothing more goes into the old one.
func (o *logged) reopen(ctx context.Context) (string, error) {
	if o.sink.kind == sinkRing {
		return "", nil
	}
	path, done := o.to.Log().Target().Path, make(chan error, 1)
	go func() { done <- o.to.Log().Reopen() }()
	select {
	case err := <-done:
		return path, err
	case <-ctx.Done():
		why, _ := o.stall.get()
		if why == "" {
			why = "it is being written"
		}
		return "", fmt.Errorf("cannot reopen log %s: %s: %w", path, why, ctx.Err())
	}
}

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
			// What comes fast piles up, so that most of it is thrown away unseen: that costs the process least.
			if o.sink.kind == sinkRing && n >= flood && !o.pause(breath) {
				return
			}
		case err == nil || errors.Is(err, syscall.EIO): // a terminal whose last other end was closed
			if o.put(true) {
				close(o.eof)
				o.tellLoss()
			}
			return
		case o.stopped():
			_ = o.write(true) // once: what cannot be written now goes with the container
			return
		case errors.Is(err, os.ErrDeadlineExceeded): // time to try to tell of a loss
			if !o.put(false) {
				return
			}
		case errors.Is(err, os.ErrClosed):
			return
		default: // no room in the spool
			o.stall.waits("the spool: " + cause(err))
			if !o.pause(fullWait) {
				return
			}
		}
	}
}

// flood is how many bytes at once are much for a ring, and breath how long it then waits for more.
const (
	flood  = 8 << 10
	breath = 2 * time.Millisecond
)

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
		err := o.write(last)
		if err == nil {
			o.stall.goes()
			return true
		}
		o.stall.waits(cause(err))
		if !o.pause(wait) {
			return false
		}
	}
}

// write is a Put that may not return for a long time.
func (o *logged) write(last bool) (err error) {
	o.stall.during(func() { err = o.to.Put(last) })
	return err
}

// tellLoss waits, after the end, until the log has room for how much was dropped. When it is stopped it tries a last time.
func (o *logged) tellLoss() {
	for o.to.Lost() {
		again := o.pause(fullWait)
		_ = o.write(true)
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
