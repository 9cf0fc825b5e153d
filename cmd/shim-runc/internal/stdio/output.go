package stdio

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// output copies what a process writes.
type output struct {
	pipe
	terminal bool // src is a terminal's master, which is not ours to close
	sink     sink
	kind     string // of the handle that src is; empty for a terminal
	client   string // of the handle that dst is
	closed   func(kinds ...string)
	eof      chan struct{} // closed when src was at its end and everything is in dst
	queue    bool          // dst is a FIFO, out of which a client takes; a file has what it was given
}

// newOutput makes the copy of src to dst, or to a file that is opened by its path: dst is nil then, or the file as it was
// opened already.
func newOutput(src, dst *os.File, n *named, k sink, kind, client string, closed func(...string)) *output {
	o := &output{
		pipe: pipe{src: src, dst: dst, named: n, most: pipeSize, stop: make(chan struct{}), alone: newHolding()}, eof: make(chan struct{}),
		terminal: kind == "", sink: k, kind: kind, client: client, closed: closed, queue: n == nil,
	}
	if o.terminal {
		o.most = terminalSize
	}
	if o.queue && !o.terminal {
		grow(dst)
	}
	if dst != nil && n != nil {
		o.prepare()
	}
	return o
}

// prepare finds out how to write to a file that was opened.
func (o *output) prepare() {
	o.grows = false
	if fi, err := o.dst.Stat(); err == nil {
		o.grows = fi.Mode().IsRegular() && !o.terminal && appending(o.dst, false) == nil
	}
}

// terminalSize is the most bytes that the kernel gives of a terminal at once; it makes room for as many as are asked for.
const terminalSize = 4096

// appending sets or clears O_APPEND.
func appending(f *os.File, on bool) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	err = c.Control(func(fd uintptr) {
		var flags int
		if flags, ferr = unix.FcntlInt(fd, unix.F_GETFL, 0); ferr != nil {
			return
		}
		if flags &^= unix.O_APPEND; on {
			flags |= unix.O_APPEND
		}
		_, ferr = unix.FcntlInt(fd, unix.F_SETFL, flags)
	})
	return errors.Join(err, ferr)
}

func (o *output) holds() holding { return o.alone }

func (o *output) handles(add func(string, *os.File)) {
	if !o.terminal {
		add(o.kind, o.src)
	}
	if o.queue {
		add(o.client, o.dst)
	}
}

// untaken is how much of what was handed on the client has not read.
func (o *output) untaken() int {
	if !o.queue { // of a file, FIONREAD says how far its end is from where we stand in it
		return 0
	}
	return unreadFile(o.dst)
}

func (o *output) release() {}

func (o *output) state() Output {
	st := Output{Stream: o.sink.stream, Sink: o.sink.kind, Bytes: o.moved.Load()}
	st.Waiting, st.Since = o.stall.get()
	return st
}

func (o *output) run() {
	defer func() {
		if o.dst != nil {
			_ = o.dst.Close()
		}
		if o.terminal {
			o.closed(o.client)
			return
		}
		_ = o.src.Close()
		o.closed(o.kind, o.client)
	}()
	err := o.copy()
	if err == nil {
		close(o.eof)
		o.linger()
	}
}

// copy copies to the end.
func (o *output) copy() error {
	if o.dst == nil {
		if err := o.openFile(); err != nil {
			return err
		}
	}
	err := o.splice()
	if errors.Is(err, unix.EINVAL) {
		if o.grows {
			_ = appending(o.dst, true)
		}
		err = o.plain()
	}
	return err
}

// linger keeps the client's FIFO open while there is something unread in it: closing the last descriptor of a FIFO
// throws its contents away, and a client may come to open it a moment after a short process has ended. Nobody tells us
// that a pipe has run empty, so it looks, ever less often.
func (o *output) linger() {
	for wait := time.Millisecond; o.untaken() > 0; wait = min(wait+wait/4+1, 100*time.Millisecond) {
		select {
		case <-o.stop:
			return
		case <-time.After(wait):
		}
	}
}

// fresh is how long a client that has not read anything yet is waited for: there may be none.
const fresh = 250 * time.Millisecond

// drain is Streams.Drain for one stream, until deadline at the latest.
func (o *output) drain(patience time.Duration, deadline time.Time) {
	var moved, taken int64 = -1, -1 // into dst, and by the client out of it, when last looked
	eof, since := o.eof, time.Now()
	for wait := 100 * time.Microsecond; ; wait = min(2*wait, 10*time.Millisecond) {
		unread := int64(o.untaken())
		m, now := o.moved.Load(), time.Now()
		// With a descendant that holds the stream, empty is the end, and what was read is in dst: splice leaves nothing in
		// between.
		ended := eof == nil || wait > time.Millisecond && unreadFile(o.src) == 0 && m == moved
		bound := patience
		if ended && m == unread {
			bound = min(bound, fresh)
		}
		switch {
		case ended && unread == 0, now.After(deadline):
			return
		case m != moved || m-unread != taken:
			since = now
		case now.Sub(since) > bound:
			return
		}
		moved, taken = m, m-unread
		select {
		case <-eof:
			eof = nil // now it is the client's turn: no more of ours comes
		case <-o.stop:
			return
		case <-time.After(wait):
		}
	}
}
