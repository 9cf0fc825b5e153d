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
	most     int          // bytes that are moved at once
	grows    bool         // dst is a regular file, to whose end is written
	moved    atomic.Int64 // bytes so far
	finished atomic.Bool  // end when src is empty, instead of waiting for more
	stopped  atomic.Bool  // end now
	once     sync.Once
	stop     chan struct{} // closed with stopped
	alone    holding       // while plain has bytes
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

// splice moves bytes inside the kernel until src is at its end of file (nil), it was halted (an error), or, when finished,
// src is empty (errFinished). Waiting is done in Go's poller. At no moment is a byte in this process alone: whenever it is
// killed, each is either still in src or in dst already. EINVAL comes at once, when the kernel cannot do it with these two.
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
			if p.grows {
				n, serr = enlarge(srcFD, dstFD, p.most)
			} else {
				n, serr = unix.Splice(srcFD, nil, dstFD, nil, p.most, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
			}
			if !errors.Is(serr, unix.EINTR) {
				return
			}
		}
	}
	for refused := firstWait; ; {
		if p.stopped.Load() {
			return errStopped
		}
		full := false
		err := src.Read(func(uintptr) bool {
			try()
			if !errors.Is(serr, unix.EAGAIN) {
				return true
			}
			full = !p.grows && unread(srcFD) > 0
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
		case errors.Is(serr, unix.EIO): // a terminal whose last other end was closed
			return nil
		case refuses(serr):
			if err := p.pause(&refused); err != nil {
				return err
			}
		case serr != nil:
			return serr
		case n == 0:
			return nil
		default:
			p.moved.Add(n)
			refused = firstWait
		}
	}
}

// enlarge moves what is in a pipe to the end of a file. splice(2) takes no O_APPEND file: a lock keeps others of us, who may
// write to the same file, from finding the same end.
func enlarge(src, dst, most int) (int64, error) {
	if unread(src) > 0 { // else it is about EAGAIN or the end of src
		if err := unix.Flock(dst, unix.LOCK_EX); err == nil {
			defer func() { _ = unix.Flock(dst, unix.LOCK_UN) }()
		} else if errors.Is(err, unix.EINTR) {
			return 0, err
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(dst, &st); err != nil {
		return 0, err
	}
	return unix.Splice(src, nil, dst, &st.Size, most, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
}

// plain copies with read(2) and write(2), for what splice(2) does not take: devices, and terminals on old kernels or whose
// output goes to a file. Its results are those of splice. What is in buf is lost when this process is killed.
func (p *pipe) plain() error {
	buf := make([]byte, 32<<10)
	for {
		if p.finished.Load() && unreadFile(p.src) == 0 {
			return errFinished
		}
		n, err := p.alone.read(p.src, buf)
		if n > 0 {
			werr := p.write(buf[:n])
			<-p.alone
			if werr != nil {
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

// firstWait is the first of the growing times between two attempts to write to a file that refuses.
const firstWait = 50 * time.Millisecond

// refuses says whether a file may take later what it does not take now: a full disk, a quota, a limit. It is tried again
// until it does: meanwhile the kernel's pipe is the buffer, nothing is lost, and the stream goes on when there is room.
func refuses(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG)
}

// pause waits before a file is tried again.
func (p *pipe) pause(wait *time.Duration) error {
	defer func() { *wait = min(2**wait, time.Second) }()
	select {
	case <-p.stop:
		return errStopped
	case <-time.After(*wait):
		return nil
	}
}

// write hands all of b on.
func (p *pipe) write(b []byte) error {
	for wait := firstWait; ; {
		n, err := p.dst.Write(b)
		b = b[n:]
		switch {
		case len(b) == 0:
			return nil
		case err != nil && !refuses(err):
			return err
		}
		if err := p.pause(&wait); err != nil {
			return err
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
	terminal bool   // src is a terminal's master, which is not ours to close
	kind     string // of the handle that src is; empty for a terminal
	client   string // of the handle that dst is
	closed   func(kinds ...string)
	eof      chan struct{} // closed when src was at its end and everything is in dst
	queue    bool          // dst is a FIFO, out of which a client takes; a file has what it was given
}

func newOutput(src, dst *os.File, kind, client string, closed func(...string)) *output {
	o := &output{
		pipe: pipe{src: src, dst: dst, most: pipeSize, stop: make(chan struct{}), alone: newHolding()}, eof: make(chan struct{}),
		terminal: kind == "", kind: kind, client: client, closed: closed,
	}
	if o.terminal {
		o.most = terminalSize
	} else {
		grow(dst)
	}
	if fi, err := dst.Stat(); err == nil {
		o.queue = fi.Mode()&fs.ModeNamedPipe != 0
		o.grows = fi.Mode().IsRegular() && !o.terminal && appending(dst, false) == nil
	}
	return o
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

func (o *output) run() {
	defer func() {
		_ = o.dst.Close()
		if o.terminal {
			o.closed(o.client)
			return
		}
		_ = o.src.Close()
		o.closed(o.kind, o.client)
	}()
	err := o.splice()
	if errors.Is(err, unix.EINVAL) {
		if o.grows {
			_ = appending(o.dst, true)
		}
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
	closed   func(kinds ...string)
}

func newInput(src, dst *os.File, terminal bool, closed func(...string)) *input {
	return &input{pipe: pipe{src: src, dst: dst, most: pipeSize, stop: make(chan struct{}), alone: newHolding()}, terminal: terminal, closed: closed}
}

func (i *input) run() {
	// EPIPE: the process closed its input; the rest stays unread.
	if err := i.splice(); errors.Is(err, unix.EINVAL) {
		_ = i.plain()
	}
	_ = i.src.Close()
	if i.terminal {
		i.closed(ClientStdin)
		return
	}
	_ = i.dst.Close()
	i.closed(Stdin, ClientStdin)
}
