package stdio

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// pipe is one direction: src is a FIFO or a terminal, dst a FIFO, a terminal or a file.
type pipe struct {
	src, dst *os.File
	moved    atomic.Int64 // bytes so far
}

// errFinished ends a copy that was asked to stop when src is empty.
var errFinished = errors.New("finished")

// splice moves bytes from FIFO to FIFO inside the kernel until src is at its end of file (nil), an end has been closed
// (an error), or, with finished set and src empty, errFinished. Waiting is done in Go's poller.
func (p *pipe) splice(finished *atomic.Bool) error {
	src, err := p.src.SyscallConn()
	if err != nil {
		return err
	}
	dst, err := p.dst.SyscallConn()
	if err != nil {
		return err
	}
	dstFD := -1
	if err := dst.Control(func(fd uintptr) { dstFD = int(fd) }); err != nil {
		return err
	}
	srcFD := -1
	if err := src.Control(func(fd uintptr) { srcFD = int(fd) }); err != nil {
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
		full := false
		err := src.Read(func(uintptr) bool {
			try()
			if !errors.Is(serr, unix.EAGAIN) {
				return true
			}
			full = unread(srcFD) > 0
			return full || finished != nil && finished.Load()
		})
		if errors.Is(err, os.ErrDeadlineExceeded) && finished != nil && finished.Load() {
			// Woken by finish: from now on an empty src is the end, and nothing waits for it.
			_ = p.src.SetReadDeadline(time.Time{})
			continue
		}
		if err == nil && full {
			err = dst.Write(func(uintptr) bool {
				try()
				return !errors.Is(serr, unix.EAGAIN) || unread(srcFD) == 0
			})
		}
		switch {
		case err != nil:
			return err
		case errors.Is(serr, unix.EAGAIN):
			if finished != nil && finished.Load() && unread(srcFD) == 0 {
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

// plain copies with read(2) and write(2), for what splice(2) does not take: terminals and O_APPEND files. finished is
// as for splice.
func (p *pipe) plain(finished *atomic.Bool) error {
	buf := make([]byte, 32<<10)
	for {
		if finished != nil && finished.Load() && unreadFile(p.src) == 0 {
			return errFinished
		}
		n, err := p.src.Read(buf)
		if n > 0 {
			if _, werr := p.dst.Write(buf[:n]); werr != nil {
				return werr
			}
			p.moved.Add(int64(n))
		}
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded) && finished != nil && finished.Load():
			_ = p.src.SetReadDeadline(time.Time{})
		case errors.Is(err, syscall.EIO): // a terminal whose last other end was closed
			return nil
		default:
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
	eof  chan struct{} // src is at its end, everything is in dst
	once sync.Once
	stop chan struct{} // closed by close
}

func newOutput(src, dst *os.File) *output {
	grow(dst)
	return &output{pipe: pipe{src: src, dst: dst}, eof: make(chan struct{}), stop: make(chan struct{})}
}

func (o *output) run() {
	err := o.splice(nil)
	if errors.Is(err, unix.EINVAL) {
		err = o.plain(nil)
	}
	if err != nil {
		return // closed, or dst failed: nothing more can be handed on
	}
	close(o.eof)
	o.linger()
	_ = o.dst.Close()
	_ = o.src.Close()
}

// linger keeps the client's FIFO open while there is something unread in it: closing the last descriptor of a FIFO
// throws its contents away, and a client may come to open it a moment after a short process has ended. Nobody tells us
// that a pipe has run empty, so it looks, ever less often.
func (o *output) linger() {
	for wait := time.Millisecond; unreadFile(o.dst) > 0; wait = min(2*wait, 50*time.Millisecond) {
		select {
		case <-o.stop:
			return
		case <-time.After(wait):
		}
	}
}

// drain is Streams.Drain for one stream.
func (o *output) drain(patience time.Duration) {
	last, since := int64(-1), time.Now()
	for wait := 100 * time.Microsecond; ; wait = min(2*wait, 10*time.Millisecond) {
		select {
		case <-o.eof:
			return
		case <-o.stop:
			return
		case <-time.After(wait):
		}
		moved := o.moved.Load()
		if wait > time.Millisecond && unreadFile(o.src) == 0 && moved == last {
			return // empty, and what was read is in dst: splice leaves nothing in between
		}
		if moved != last {
			last, since = moved, time.Now()
		} else if time.Since(since) > patience {
			return
		}
	}
}

func (o *output) close() {
	o.once.Do(func() { close(o.stop) })
	_ = o.src.Close()
	_ = o.dst.Close()
}

// input copies what the client writes.
type input struct {
	pipe
	finished atomic.Bool
}

func newInput(src, dst *os.File) *input {
	return &input{pipe: pipe{src: src, dst: dst}}
}

func (i *input) run() {
	_ = i.splice(&i.finished) // EPIPE: the process closed its input; the rest stays unread
	_ = i.dst.Close()
	_ = i.src.Close()
}

// finish lets the copy end when src is empty.
func (i *input) finish() {
	i.finished.Store(true)
	_ = i.src.SetReadDeadline(time.Unix(1, 0))
}

func (i *input) close() {
	_ = i.src.Close()
	_ = i.dst.Close()
}
