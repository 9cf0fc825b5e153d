package logsink

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi/failpoint"

	"github.com/managerd/managerd/cmd/shim-runc/internal/fdtable"
)

// Config says where a log is, and where what a successor needs is kept.
type Config struct {
	Target
	Base string // path of our own files, to which "-sink", "-stdout" and "-stderr" are added
	Lazy bool   // the file is beside Base, on a file system that answers: it is opened when there is output, in the process's own table

	Patience time.Duration // how long Open waits for the file system; 0: ten seconds
}

// Log is an open log. Close releases it; its Streams are to be closed first.
type Log struct {
	cfg Config

	mu      sync.Mutex     // guards all below; held while a file is written
	table   *fdtable.Table // where the log's files are opened, nil before, and of a lazy log
	file    *fdtable.File  // nil: to be opened
	state   *os.File       // nil: as above
	rec     record
	surplus surplus    // of a raw log
	torn    bool       // the file may be longer than recorded, by an entry that we did not write whole
	resumed bool       // an earlier process's record was read
	gens    []identity // the files that were opened, oldest first; the last one is file
	dropped int        // how many were taken off the front of gens
	live    int        // streams that may still write
	opened  [2]bool    // streams that there are
	closed  bool
	changed chan struct{}          // closed when there is more to read; nil when nobody waits
	readers map[*fdtable.Table]int // tables in which readers open files, and how many do

	losses [2]struct{ entries, bytes atomic.Int64 } // as rec has them, for whoever must not wait for mu
}

// identity is a file, whatever its name.
type identity struct{ dev, ino uint64 }

// keepGens is how many files a reader that follows the log may be behind.
const keepGens = 1100

// Open opens a log, or goes on with one that another process wrote. A file that exists is appended to. Errors: FailedPrecondition
// for a file that another Log is writing, InvalidArgument for what is not a regular file, Unavailable when the file system has
// not answered in time; it may then make an empty file later.
func Open(cfg Config) (*Log, error) {
	l := &Log{cfg: cfg}
	var err error
	l.state, err = os.OpenFile(cfg.Base+"-sink", os.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		if err = l.rec.read(l.state); err != nil {
			_ = l.state.Close()
			return nil, fmt.Errorf("cannot go on with log %s: %w", cfg.Path, err)
		}
		l.resumed = true
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("cannot open log %s: %w", cfg.Path, err)
	}
	if cfg.Lazy || l.resumed {
		// Whoever goes on must not wait for a file system that does not answer; and what is in the way may go away: it is
		// tried again with each write.
		for i := range names {
			l.tellLossLocked(i)
		}
		if l.rec.file != (identity{}) {
			l.gens = []identity{l.rec.file}
		}
		l.wakes()
		return l, nil
	}
	if err := l.openWithin(cmp.Or(cfg.Patience, 10*time.Second)); err != nil {
		l.Remove()
		return nil, fmt.Errorf("cannot open log %s: %w", cfg.Path, err)
	}
	return l, nil
}

// openWithin opens the file, or gives it up: then it is closed as soon as it is there.
func (l *Log) openWithin(patience time.Duration) error {
	opened := make(chan error, 1)
	var late atomic.Bool
	l.wakes()
	go func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		err := l.openLocked()
		if err != nil || !late.CompareAndSwap(false, true) {
			l.closeLocked()
			l.rests()
		}
		opened <- err
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case err := <-opened:
		return err
	case <-timer.C:
	}
	if late.CompareAndSwap(false, true) {
		return fmt.Errorf("its file system has not answered for %v, is its server there?: %w", patience, errdefs.ErrUnavailable)
	}
	return <-opened
}

// Target is what the log is.
func (l *Log) Target() Target { return l.cfg.Target }

// Reopen begins a new file at the log's path, if somebody renamed or removed the one that was there. The old one gets
// nothing any more once this has returned.
func (l *Log) Reopen() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.file == nil { // a file that is not open yet is opened by its path anyway
		return nil
	}
	if id, _, err := stat(l.cfg.Path); err == nil && id == l.rec.file {
		return nil
	}
	if err := l.fixLocked(); err != nil {
		return fmt.Errorf("cannot reopen log %s: %w", l.cfg.Path, err)
	}
	old, rec := l.file, l.rec
	l.file = nil
	if err := l.openLocked(); err != nil {
		l.file, l.rec = old, rec
		return fmt.Errorf("cannot reopen log %s: %w", l.cfg.Path, err)
	}
	return old.Close()
}

// Close closes the files. Readers that follow the log come to its end.
func (l *Log) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.closeLocked()
	l.rests()
	l.tellLocked()
}

// Remove removes what was kept for a successor, of a log that was closed for good. The log itself stays.
func (l *Log) Remove() { Discard(l.cfg.Base) }

// Discard removes what is kept for a successor beside base (see Config), and not the log.
func Discard(base string) {
	for _, suffix := range []string{"-sink", "-stdout", "-stderr"} {
		_ = os.Remove(base + suffix)
	}
}

func (l *Log) closeLocked() {
	if l.file != nil {
		_ = l.file.Close()
	}
	if l.state != nil {
		_ = l.state.Close()
	}
	l.table.Close()
	l.table, l.file, l.state = nil, nil, nil
}

// tableLocked gives the table in which the log's files are opened, for the caller to close.
func (l *Log) tableLocked() (t *fdtable.Table, err error) {
	if l.cfg.Lazy {
		return nil, nil
	}
	if l.table != nil {
		l.table.Hold()
		return l.table, nil
	}
	if t, err = fdtable.New(); err == nil && !l.closed {
		t.Hold()
		l.table = t
	}
	return t, err
}

// tellLocked wakes the readers that follow.
func (l *Log) tellLocked() {
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// openLocked opens the file at the log's path and records it.
func (l *Log) openLocked() (err error) {
	if l.closed {
		return fs.ErrClosed
	}
	if l.state == nil {
		if l.state, err = os.OpenFile(l.cfg.Base+"-sink", os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(l.cfg.Path), 0o755); err != nil {
		return err
	}
	// O_NONBLOCK: to open what turns out to be a FIFO must not wait.
	mode := uint32(0o640)
	if l.cfg.Format == Raw {
		mode = 0o644
	}
	table, err := l.tableLocked()
	if err != nil {
		return err
	}
	defer table.Close()
	f, err := table.Open(l.cfg.Path, unix.O_RDWR|unix.O_CREAT|unix.O_APPEND|unix.O_NONBLOCK, mode)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("not a regular file: %w", errdefs.ErrInvalidArgument)
	}
	if l.cfg.Format != Raw {
		if err := lock(f); err != nil {
			return err
		}
	}
	id := identity{uint64(st.Dev), st.Ino}
	if l.cfg.Format == Raw {
		l.surplus = surplus{}
		if more := st.Size - l.rec.length; l.resumed && id == l.rec.file && more > 0 {
			l.surplus = surplus{at: l.rec.length, length: more}
		}
		l.rec.length, l.torn = st.Size, false
	} else if l.resumed && id == l.rec.file {
		l.rec.length = min(l.rec.length, st.Size)
		l.torn = st.Size > l.rec.length
	} else {
		l.rec.length, l.torn = st.Size, false
	}
	l.resumed = false
	l.rec.file = id
	failpoint.Hit("logsink.made")
	if err := l.commitLocked(); err != nil {
		return err
	}
	failpoint.Hit("logsink.opened")
	if len(l.gens) == 0 || l.gens[len(l.gens)-1] != id {
		l.gens = append(l.gens, id)
		if len(l.gens) > keepGens {
			l.gens = l.gens[1:]
			l.dropped++
		}
	}
	l.file = f
	return nil
}

// lock keeps others that would write to the file away, in this process or another: a file with two writers has no
// length that one of them could know. The range is one that nobody else locks; the kernel lets it go with the file.
func lock(f *fdtable.File) error {
	r := unix.Flock_t{Type: unix.F_WRLCK, Start: 1 << 62, Len: 1}
	err := f.Do(func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &r) })
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("another process writes its output there, give this one a file of its own: %w", errdefs.ErrFailedPrecondition)
	}
	return nil // a file system without locks has no protection, and works
}

// fixLocked takes an entry that is not whole off the end of the file.
func (l *Log) fixLocked() error {
	if !l.torn {
		return nil
	}
	if err := l.file.Truncate(l.rec.length); err != nil {
		return err
	}
	l.torn = false
	return nil
}

// readyLocked makes the file one that can be written to.
func (l *Log) readyLocked() error {
	if l.file == nil {
		if err := l.openLocked(); err != nil {
			return err
		}
	}
	return l.fixLocked()
}

// rotateLocked moves every file on by one, and begins a new one.
func (l *Log) rotateLocked() error {
	path := l.cfg.Path
	// If it was renamed away there is nothing to move: the one that is there now is somebody's who made room for us.
	if id, _, err := stat(path); err == nil && id == l.rec.file {
		if l.cfg.MaxFile == 1 {
			err = os.Remove(path)
		} else {
			// After a rotation that was cut off one number is free: no further than there.
			last := 1
			for last < l.cfg.MaxFile-1 && exists(l.rotated(last)) {
				last++
			}
			for ; last > 0 && err == nil; last-- {
				err = os.Rename(l.rotated(last-1), l.rotated(last))
			}
		}
		if err != nil {
			return err
		}
	}
	failpoint.Hit("logsink.rotated")
	_ = l.file.Close()
	l.file = nil
	return l.openLocked()
}

// rotated names a file by how many are newer.
func (l *Log) rotated(n int) string {
	if n == 0 {
		return l.cfg.Path
	}
	return fmt.Sprintf("%s.%d", l.cfg.Path, n)
}

// write appends frames of a stream, as many as it can. used is how many of them are in the log, and recorded.
func (l *Log) write(s *Stream, f *frames) (used int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.tellLocked()
	for used < len(f.list) {
		if err := l.readyLocked(); err != nil {
			return used, err
		}
		start := 0
		if used > 0 {
			start = f.list[used-1].end
		}
		upto := len(f.list)
		if l.cfg.MaxSize > 0 {
			upto = used
			for upto < len(f.list) && l.rec.length+int64(f.list[upto].end-start) <= l.cfg.MaxSize {
				upto++
			}
			if upto == used && l.rec.length > 0 {
				if err := l.rotateLocked(); err != nil {
					return used, err
				}
				continue
			}
			upto = max(upto, used+1) // an entry that is longer than a file may be has one of its own
		}
		n, was, werr := l.file.WriteAfter(l.rec.length, f.out[start:f.list[upto-1].end])
		if werr == nil && was != l.rec.length { // others have cut it, or have written to it
			l.rec.length = was
			continue
		}
		whole := used
		for whole < upto && f.list[whole].end-start <= n {
			if f.list[whole].note {
				l.rec.streams[s.index].lost = lost{}
				l.tellLossLocked(s.index)
			}
			l.rec.streams[s.index].done += int64(f.list[whole].raw)
			whole++
		}
		if whole > used {
			l.rec.length += int64(f.list[whole-1].end - start)
		}
		if werr != nil {
			l.torn = true
		}
		failpoint.Hit("logsink.written")
		cerr := l.commitLocked()
		failpoint.Hit("logsink.recorded")
		used = whole
		if werr != nil {
			return used, errors.Join(werr, l.fixLocked())
		}
		if cerr != nil {
			return used, cerr
		}
	}
	return used, nil
}

// drop counts frames of a stream as lost.
func (l *Log) drop(s *Stream, list []frame, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &l.rec.streams[s.index]
	for _, f := range list {
		if !f.note {
			p.lost.entries++
			p.lost.bytes += int64(f.raw)
			p.done += int64(f.raw)
		}
	}
	p.lost.bytes += bytes
	l.tellLossLocked(s.index)
	// Without a record a successor would write these, instead of counting them: no harm.
	_ = l.commitLocked()
}

// only is the stream that goes into the log, if it is one.
func (l *Log) only() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch l.opened {
	case [2]bool{true, false}:
		return names[0]
	case [2]bool{false, true}:
		return names[1]
	}
	return ""
}

func (l *Log) tellLossLocked(index int) {
	of := l.rec.streams[index].lost
	l.losses[index].entries.Store(of.entries)
	l.losses[index].bytes.Store(of.bytes)
}

func (l *Log) progressOf(s *Stream) progress {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rec.streams[s.index]
}

func (l *Log) commitLocked() error {
	if l.state == nil {
		return nil
	}
	return l.rec.write(l.state)
}

func stat(path string) (identity, int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return identity{}, 0, err
	}
	return identity{uint64(st.Dev), st.Ino}, st.Size, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
