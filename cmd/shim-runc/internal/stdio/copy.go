package stdio

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// pipe is one direction: src is a FIFO or a terminal, dst a FIFO, a terminal or a file.
//
// One goroutine copies, and it alone closes the files, after its last use of their descriptor numbers: were they closed
// under it, splice could move bytes of whatever got the number next. Others ask it to end, with halt.
type pipe struct {
	src, dst *os.File
	moved    atomic.Int64 // bytes so far
	finished atomic.Bool  // end when src is empty, instead of waiting for more
	stopped  atomic.Bool  // end now
	once     sync.Once
	stop     chan struct{} // closed with stopped
}

// Why a copy ended before its end of file.
var (
	errFinished = errors.New("finished")
	errStopped  = errors.New("stopped")
)

var past = time.Unix(1, 0)

// halt ends the copy, whatever it waits for. It does not wait for that.
func (p *pipe) halt() {
	p.once.Do(func() {
		p.stopped.Store(true)
		close(p.stop)
		// Wake it. A file that has no deadlines never waits either.
		_ = p.src.SetReadDeadline(past)
		_ = p.dst.SetWriteDeadline(past)
	})
}

// finish lets the copy end once src is empty.
func (p *pipe) finish() {
	p.finished.Store(true)
	_ = p.src.SetReadDeadline(past)
}

// woken says what to do after a wait for src has failed: nil to go on.
func (p *pipe) woken(err error) error {
	if !errors.Is(err, os.ErrDeadlineExceeded) || !p.finished.Load() {
		return err
	}
	// From now on an empty src is the end, and nothing waits for it. stopped is looked at after the deadline was taken
	// back: halt sets it before it sets the deadline, so that one of the two is always seen.
	_ = p.src.SetReadDeadline(time.Time{})
	if p.stopped.Load() {
		return errStopped
	}
	return nil
}

// splice moves bytes from FIFO to FIFO inside the kernel until src is at its end of file (nil), it was halted
// (an error), or, when finished, src is empty (errFinished). Waiting is done in Go's poller.
func (p *pipe) splice() error {
	src, err := p.src.SyscallConn()
	if err != nil {
		return err
	}
	dst, err := p.dst.SyscallConn()
	if err != nil {
		return err
	}
	srcFD, dstFD := -1, -1
	if err := errors.Join(src.Control(func(fd uintptr) { srcFD = int(fd) }), dst.Control(func(fd uintptr) { dstFD = int(fd) })); err != nil {
		return err
	}
	var n int64
	var serr error
	try := func() { // one attempt; n and serr are its result
		for {
			n, serr = unix.Splice(srcFD, nil, dstFD, nil, pipeSize, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
			if !errors.Is(serr, unix.EINTR) {
				return
			}
		}
	}
	for {
		if p.stopped.Load() {
			return errStopped
		}
		full := false
		err := src.Read(func(uintptr) bool {
			try()
			if !errors.Is(serr, unix.EAGAIN) {
				return true
			}
			full = unread(srcFD) > 0
			return full || p.finished.Load()
		})
		if err != nil {
			if err = p.woken(err); err != nil {
				return err
			}
			continue
		}
		if full {
			err = dst.Write(func(uintptr) bool {
				try()
				return !errors.Is(serr, unix.EAGAIN) || unread(srcFD) == 0
			})
		}
		switch {
		case err != nil:
			return err
		case errors.Is(serr, unix.EAGAIN):
			if p.finished.Load() && unread(srcFD) == 0 {
				return errFinished
			}
		case serr != nil:
			return serr
		case n == 0:
			return nil
		default:
			p.moved.Add(n)
		}
	}
}

// plain copies with read(2) and write(2), for what splice(2) does not take: terminals and O_APPEND files. Its results are
// those of splice.
func (p *pipe) plain() error {
	buf := make([]byte, 32<<10)
	for {
		if p.finished.Load() && unreadFile(p.src) == 0 {
			return errFinished
		}
		n, err := p.src.Read(buf)
		if n > 0 {
			if werr := p.write(buf[:n]); werr != nil {
				return werr
			}
			p.moved.Add(int64(n))
		}
		switch {
		case err == nil:
		case errors.Is(err, syscall.EIO): // a terminal whose last other end was closed
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			if err = p.woken(err); err != nil {
				return err
			}
		case errors.Is(err, io.EOF):
			return nil
		default:
			return err
		}
	}
}

// write hands all of b on. A file that refuses (a full disk, a quota) is tried again until it takes it: meanwhile the
// kernel's pipe is the buffer, nothing is lost, and the stream goes on when there is room.
func (p *pipe) write(b []byte) error {
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		n, err := p.dst.Write(b)
		b = b[n:]
		switch {
		case len(b) == 0:
			return nil
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EFBIG), err == nil:
		default:
			return err
		}
		select {
		case <-p.stop:
			return errStopped
		case <-time.After(wait):
		}
	}
}

// unread is how many bytes wait in a pipe (FIONREAD, which x/sys calls TIOCINQ).
func unread(fd int) int {
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil {
		return 0
	}
	return n
}

func unreadFile(f *os.File) int {
	n := 0
	if c, err := f.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { n = unread(int(fd)) })
	}
	return n
}

// output copies what a process writes.
type output struct {
	pipe
	terminal bool          // src is a terminal's master, which is not ours to close
	eof      chan struct{} // closed when src was at its end and everything is in dst
	queue    bool          // dst is a FIFO, out of which a client takes; a file has what it was given
}

func newOutput(src, dst *os.File, terminal bool) *output {
	if !terminal {
		grow(dst)
	}
	fi, err := dst.Stat()
	return &output{
		pipe: pipe{src: src, dst: dst, stop: make(chan struct{})}, terminal: terminal, eof: make(chan struct{}),
		queue: err == nil && fi.Mode()&fs.ModeNamedPipe != 0,
	}
}

// untaken is how much of what was handed on the client has not read.
func (o *output) untaken() int {
	if !o.queue { // of a file, FIONREAD says how far its end is from where we stand in it
		return 0
	}
	return unreadFile(o.dst)
}

func (o *output) run() {
	defer func() {
		_ = o.dst.Close()
		if !o.terminal {
			_ = o.src.Close()
		}
	}()
	err := error(unix.EINVAL)
	if !o.terminal {
		err = o.splice()
	}
	if errors.Is(err, unix.EINVAL) {
		err = o.plain()
	}
	if err == nil {
		close(o.eof)
		o.linger()
	}
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

// input copies what the client writes.
type input struct {
	pipe
	terminal bool // dst is a terminal's master, which is not ours to close
}

func newInput(src, dst *os.File, terminal bool) *input {
	return &input{pipe: pipe{src: src, dst: dst, stop: make(chan struct{})}, terminal: terminal}
}

func (i *input) run() {
	if i.terminal {
		_ = i.plain()
	} else {
		_ = i.splice() // EPIPE: the process closed its input; the rest stays unread
		_ = i.dst.Close()
	}
	_ = i.src.Close()
}
