package logsink

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi/failpoint"
)

// spooled is how many bytes of a stream are taken before they must go into the log.
const spooled = 256 << 10

// Stream is one stream into a log. One goroutine uses it. Close ends it.
type Stream struct {
	log   *Log
	index int
	name  string

	spool   *os.File // nil before there is output
	taken   int64    // its length: how much was ever taken
	punched int64    // how much of it was given back
	reason  string   // why something was dropped last
}

var names = [2]string{"stdout", "stderr"}

// Stream opens a stream of the log, "stdout" or "stderr", each at most once.
func (l *Log) Stream(name string) (*Stream, error) {
	s := &Stream{log: l, name: name}
	for i, n := range names {
		if n == name {
			s.index = i
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	f, err := os.OpenFile(s.path(), os.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil { // another process has left what it had taken
		fi, serr := f.Stat()
		if serr != nil {
			_ = f.Close()
			return nil, serr
		}
		s.spool, s.taken = f, fi.Size()
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l.live++
	l.opened[s.index] = true
	return s, nil
}

func (s *Stream) path() string { return s.log.cfg.Base + "-" + s.name }

// Close lets go of the spool. What is in it stays for a successor, until the Log's Remove.
func (s *Stream) Close() {
	if s.spool != nil {
		_ = s.spool.Close()
		s.spool = nil
	}
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	if s.log.live--; s.log.live == 0 {
		s.log.tellLocked()
	}
}

// open makes the spool, if there is none yet.
func (s *Stream) open() error {
	if s.spool != nil {
		return nil
	}
	f, err := os.OpenFile(s.path(), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	s.spool = f
	return nil
}

// Take moves what is in a FIFO into the spool: bytes moved, 0 at the end of file, EAGAIN when it is empty now. Other
// errors are the spool's (a full disk): nothing was taken, unless the log is one that drops. A stream must be Put before more
// is taken than it spools.
func (s *Stream) Take(fifo int) (int64, error) {
	if err := s.open(); err != nil {
		return s.discard(fifo, err)
	}
	if s.log.cfg.Newest > 0 {
		if err := s.skip(fifo); err != nil {
			return 0, err
		}
	}
	for {
		at := s.taken
		n, err := unix.Splice(fifo, nil, int(s.spool.Fd()), &at, spooled, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		switch {
		case errors.Is(err, unix.EINTR):
		case err == nil:
			failpoint.Hit("logsink.taken")
			s.taken += n
			return n, nil
		case errors.Is(err, unix.EAGAIN):
			return 0, err
		default:
			return s.discard(fifo, err)
		}
	}
}

// skip throws away what is in a FIFO beyond the newest that is kept, and counts it: to write it would cost the process its
// time, and it would be gone a moment later.
func (s *Stream) skip(fifo int) error {
	n, err := unix.IoctlGetInt(fifo, unix.TIOCINQ)
	if size, serr := unix.FcntlInt(uintptr(fifo), unix.F_GETPIPE_SZ, 0); err == nil && serr == nil && size < skipSize && n >= size/2 {
		_, _ = unix.FcntlInt(uintptr(fifo), unix.F_SETPIPE_SZ, skipSize) // refused over the user's limit, see pipe(7)
	}
	over := int64(n) - s.log.cfg.Newest
	if over > 7*s.log.cfg.Newest { // of a flood less is kept
		over = int64(n) - s.log.cfg.Newest/4
	}
	if err != nil || over <= 0 {
		return nil
	}
	if err := s.Put(true); err != nil { // what was begun ends here
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = null.Close() }()
	gone, err := unix.Splice(fifo, nil, int(null.Fd()), nil, int(over), unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
	if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
		return err
	}
	if gone > 0 {
		s.reason = "more came at once than is kept"
		s.log.drop(s, nil, gone)
	}
	return nil
}

// skipSize is what the kernel is to buffer of a process that prints faster than it is kept, in bytes.
const skipSize = 1 << 20

// discard takes bytes for which there is no room in the spool, and counts them, if the log drops.
func (s *Stream) discard(fifo int, reason error) (int64, error) {
	if !s.log.cfg.Drop {
		return 0, reason
	}
	b := make([]byte, 64<<10)
	n, err := unix.Read(fifo, b)
	if n > 0 {
		s.reason = cause(reason)
		s.log.drop(s, nil, int64(n))
	}
	return int64(max(n, 0)), err
}

// TakeBytes puts what was read of a terminal into the spool. It says how much was taken; an error is the spool's.
func (s *Stream) TakeBytes(b []byte) (int, error) {
	err := s.open()
	n := 0
	if err == nil {
		n, err = s.spool.WriteAt(b, s.taken)
		s.taken += int64(n)
	}
	if err != nil && s.log.cfg.Drop {
		s.reason = cause(err)
		s.log.drop(s, nil, int64(len(b)-n))
		return len(b), nil
	}
	return n, err
}

// scratch is what a batch is made in: a process that is silent holds none.
type scratch struct {
	raw    [spooled / 4]byte
	frames frames
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// Put writes what was taken to the log: all lines that have ended, or all, when last says that no more comes. An error
// says that there was no room (or another reason why the log cannot be written now); Put is to be called again after a
// while. A log that drops has no such errors.
func (s *Stream) Put(last bool) error {
	if s.log.cfg.Format == Raw {
		return s.putRaw()
	}
	work := scratches.Get().(*scratch)
	defer scratches.Put(work)
	for {
		p := s.log.progressOf(s)
		f := &work.frames
		f.reset(s.log.cfg.Format, s.name, time.Now())
		if p.lost != (lost{}) {
			f.note(s.loss(p.lost))
		}
		n := int(min(s.taken-p.done, int64(len(work.raw))))
		if n > 0 {
			if _, err := s.spool.ReadAt(work.raw[:n], p.done); err != nil {
				return fmt.Errorf("cannot read the spool: %w", err)
			}
			f.fill(work.raw[:n], last && p.done+int64(n) == s.taken)
		}
		if len(f.list) == 0 {
			return nil
		}
		used, err := s.log.write(s, f)
		if err != nil {
			if !s.log.cfg.Drop {
				return err
			}
			s.reason = cause(err)
			s.log.drop(s, f.list[used:], 0)
			if len(f.list[used:]) == 1 && f.list[used].note { // nothing but the note, which waits
				return nil
			}
		}
		s.punch()
	}
}

// putRaw is Put for a log without entries: everything that was taken, as it is.
func (s *Stream) putRaw() error {
	work := scratches.Get().(*scratch)
	defer scratches.Put(work)
	for {
		done := s.log.progressOf(s).done
		n := int(min(s.taken-done, int64(len(work.raw))))
		if n == 0 {
			return nil
		}
		if _, err := s.spool.ReadAt(work.raw[:n], done); err != nil {
			return fmt.Errorf("cannot read the spool: %w", err)
		}
		if err := s.log.append(s, work.raw[:n]); err != nil {
			return err
		}
		s.punch()
	}
}

// punch gives the room of what is in the log back. Where that cannot be done the spool grows, and is right all the same.
func (s *Stream) punch() {
	done := s.log.progressOf(s).done &^ 4095
	if s.spool == nil || done-s.punched < spooled/4 {
		return
	}
	if err := unix.Fallocate(int(s.spool.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, s.punched, done-s.punched); err == nil {
		s.punched = done
	}
}

// Lost says that something was dropped of which the log does not tell yet: Put tries again to.
func (s *Stream) Lost() bool { return s.log.progressOf(s).lost != lost{} }

// Loss is what was dropped.
type Loss struct{ Entries, Bytes int64 }

// Loss is what was dropped of which the log does not tell yet. Unlike all else it may be asked at any time, and never waits.
func (s *Stream) Loss() Loss {
	of := &s.log.losses[s.index]
	return Loss{of.entries.Load(), of.bytes.Load()}
}

// Log is the log that the stream goes into.
func (s *Stream) Log() *Log { return s.log }

// Left is how many bytes were taken that are not in the log: of a line without an end, unless Put has failed.
func (s *Stream) Left() int64 { return s.taken - s.log.progressOf(s).done }

func (s *Stream) loss(l lost) string {
	reason := s.reason
	if reason == "" {
		reason = "there was no room for it"
	}
	return fmt.Sprintf("[managerd: %d bytes of output (%d entries) were lost here: %s]", l.bytes, l.entries, reason)
}

// cause is the system's word for an error.
func cause(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return err.Error()
}
