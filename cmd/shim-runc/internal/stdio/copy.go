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
	stall    stall
	named    *named // dst is a file that is opened by its path; nil: it is a FIFO or a terminal
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
		if p.named == nil {
			_ = p.dst.SetWriteDeadline(past)
		}
	})
}

// finish lets the copy end once src is empty.
func (p *pipe) finish() {
	p.finished.Store(true)
	_ = p.src.SetReadDeadline(past)
}

// woken says what to do after a wait for src has failed: nil to go on.
func (p *pipe) woken(err error) error {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	// From now on, when finished, an empty src is the end, and nothing waits for it. stopped is looked at after the deadline was taken
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
				p.stall.during(func() { n, serr = enlarge(srcFD, dstFD, p.most) })
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
			if !full && ended(srcFD) { // splice does not say so while dst is full
				n, serr = 0, nil
				return true
			}
			return full || p.finished.Load()
		})
		if err != nil {
			if err = p.woken(err); err != nil {
				return err
			}
			continue
		}
		if full {
			p.stall.waits(unreadClient)
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
			p.stall.waits(serr.Error())
			if err := p.pause(&refused); err != nil {
				return err
			}
		case serr != nil:
			return serr
		case n == 0:
			return nil
		default:
			p.moved.Add(n)
			p.stall.goes()
			refused = firstWait
		}
	}
}

// unreadClient is what is in the way of a stream whose FIFO is full.
const unreadClient = "the client does not read"

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

// cause is the system's word for an error.
func cause(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return err.Error()
}

// write hands all of b on.
func (p *pipe) write(b []byte) error {
	for wait := firstWait; ; {
		var n int
		var err error
		p.stall.during(func() { n, err = p.dst.Write(b) })
		b = b[n:]
		switch {
		case len(b) == 0:
			p.stall.goes()
			return nil
		case err != nil && !refuses(err):
			return err
		case err != nil:
			p.stall.waits(cause(err))
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

// ended says whether nothing is left in a pipe or a terminal, and nobody has it open who could write.
func ended(fd int) bool {
	for range 2 { // what was written between the looks for bytes and for writers is seen the second time
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, 0); err != nil || fds[0].Revents&(unix.POLLIN|unix.POLLHUP) != unix.POLLHUP {
			return false
		}
	}
	return true
}

func unreadFile(f *os.File) int {
	n := 0
	if c, err := f.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { n = unread(int(fd)) })
	}
	return n
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
