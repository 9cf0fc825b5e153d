// Package session connects this program's streams, terminal and signals with a process in a container. It knows FIFOs and
// terminals, and asks for what it needs done to the process through an interface: no wire.
package session

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// dirPrefix names the directories that Make makes, so that Forget knows them.
const dirPrefix = "mctl-"

// quiet is how long the output of a process that has ended must have been still before it is taken to be complete although
// a descendant holds it open.
const quiet = 250 * time.Millisecond

// Streams are the FIFOs between us and a shim. We hold both ends of those that we read: a shim that is killed and
// replaced is no end of file. Close releases what is open and leaves the FIFOs, so that somebody may attach later;
// Forget removes them.
type Streams struct {
	Stdin, Stdout, Stderr string // paths; empty: none
	Terminal              bool

	in      *os.File
	outs    []*os.File
	keepers []*os.File // the writing ends of outs
	copies  sync.WaitGroup
	moved   atomic.Int64
	busy    atomic.Int64 // copies that are writing
}

// Make makes the FIFOs of a process, in a private directory below parent, which is made too.
func Make(parent, id string, stdin, terminal bool) (_ *Streams, err error) {
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make a directory for streams: %w; name another with --fifo-dir", err)
	}
	dir, err := os.MkdirTemp(parent, dirPrefix)
	if err != nil {
		return nil, fmt.Errorf("cannot make a directory for streams: %w; name another with --fifo-dir", err)
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(dir)
		}
	}()
	s := &Streams{Terminal: terminal}
	for _, f := range []struct {
		name   string
		wanted bool
		to     *string
	}{{"stdin", stdin, &s.Stdin}, {"stdout", true, &s.Stdout}, {"stderr", !terminal, &s.Stderr}} {
		if !f.wanted {
			continue
		}
		*f.to = filepath.Join(dir, id+"-"+f.name)
		if err := unix.Mkfifo(*f.to, 0o600); err != nil {
			return nil, &os.PathError{Op: "mkfifo", Path: *f.to, Err: err}
		}
	}
	return s, nil
}

// Forget removes FIFOs that Make made, and nothing else: other paths are left alone.
func Forget(paths ...string) {
	for _, p := range paths {
		dir := filepath.Dir(p)
		if p == "" || !strings.HasPrefix(filepath.Base(dir), dirPrefix) {
			continue
		}
		if fi, err := os.Lstat(p); err == nil && fi.Mode()&os.ModeNamedPipe != 0 {
			_ = os.Remove(p)
		}
		_ = os.Remove(dir) // fails until the last one is gone
	}
}

// Forget removes the FIFOs.
func (s *Streams) Forget() { Forget(s.Stdin, s.Stdout, s.Stderr) }

// ErrTaken says that somebody else reads the output.
var ErrTaken = errors.New("its output goes to another mctl already")

// Open opens the FIFOs and begins to copy output. What is no FIFO (a log file) is an error.
func (s *Streams) Open(stdout, stderr io.Writer) (err error) {
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.Stdin != "" {
		// O_RDWR waits for nobody, and never breaks.
		if s.in, err = openFIFO(s.Stdin, os.O_RDWR); err != nil {
			return err
		}
	}
	for _, o := range []struct {
		path string
		w    io.Writer
	}{{s.Stdout, stdout}, {s.Stderr, stderr}} {
		if o.path == "" || o.path == s.Stdout && len(s.outs) > 0 {
			continue
		}
		r, err := openFIFO(o.path, os.O_RDONLY)
		if err != nil {
			return err
		}
		s.outs = append(s.outs, r)
		if err := lock(r); err != nil {
			return err
		}
		k, err := openFIFO(o.path, os.O_WRONLY)
		if err != nil {
			return err
		}
		s.keepers = append(s.keepers, k)
		s.copies.Add(1)
		go func() {
			defer s.copies.Done()
			s.copy(o.w, r)
		}()
	}
	return nil
}

// openFIFO opens without waiting for another end.
func openFIFO(path string, how int) (*os.File, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Mode()&os.ModeNamedPipe == 0 {
		return nil, fmt.Errorf("%s is no FIFO", path)
	}
	return os.OpenFile(path, how|unix.O_NONBLOCK, 0)
}

// lock makes sure of being the only reader: two would share out the output among them.
func lock(f *os.File) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var lerr error
	if err := c.Control(func(fd uintptr) { lerr = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		return err
	}
	if errors.Is(lerr, unix.EWOULDBLOCK) {
		return ErrTaken
	}
	return lerr
}

// copy reads to the end. A writer that fails (a pipe whose reader went away) does not stop the container: the rest is
// thrown away.
func (s *Streams) copy(w io.Writer, r io.Reader) {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		s.moved.Add(int64(n))
		if n > 0 && w != nil {
			s.busy.Add(1)
			if _, werr := w.Write(buf[:n]); werr != nil {
				w = nil
			}
			s.busy.Add(-1)
		}
		if err != nil {
			return
		}
	}
}

// Drain waits, after the process has ended, until all that it wrote is written out: to the end of file, or, when a
// descendant holds the stream open, until nothing more has come for a moment.
func (s *Streams) Drain() {
	for _, k := range s.keepers {
		_ = k.Close()
	}
	s.keepers = nil
	done := make(chan struct{})
	go func() {
		s.copies.Wait()
		close(done)
	}()
	for last := int64(-1); ; {
		select {
		case <-done:
			return
		case <-time.After(quiet):
		}
		// Our own reader may be slow, and is waited for.
		now := s.moved.Load()
		if now == last && s.busy.Load() == 0 {
			return
		}
		last = now
	}
}

// Close ends all copying.
func (s *Streams) Close() {
	for _, f := range append(append([]*os.File{s.in}, s.outs...), s.keepers...) {
		if f != nil {
			_ = f.Close()
		}
	}
	s.in, s.outs, s.keepers = nil, nil, nil
	s.copies.Wait()
}
