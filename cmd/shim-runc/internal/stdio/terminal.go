package stdio

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
)

// openTerminal opens where output goes; copying starts when there is a master.
func (s *Streams) openTerminal() (err error) {
	k := s.sinkOf("stdout")
	if k.kind == sinkBinary {
		if err := s.handTerminal(&k, true); err != nil {
			return err
		}
	}
	logsink.Discard(s.logBase(k)) // see Open
	// /dev/null too: somebody has to read, or the process blocks on a full terminal.
	if s.client, err = s.openTarget(k); err != nil {
		return err
	}
	return s.startLoggers(false) // who reads before anybody can write sees an end of file
}

// handTerminal hands a terminal's output to a logger, which is not started yet, and makes k the FIFO that it reads.
func (s *Streams) handTerminal(k *sink, make bool) error {
	path := s.path("stdout")
	s.paths = append(s.paths, path)
	if make {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return &os.PathError{Op: "mkfifo", Path: path, Err: err}
		}
	}
	src, err := openRaw(path, unix.O_RDONLY|unix.O_NONBLOCK)
	if err == nil {
		src, err = quiet(src)
	}
	if err != nil {
		return err
	}
	h := newHanded(src, *k, "", s.handlesClosed)
	s.outs = append(s.outs, h)
	k.uri, k.kind, k.url = path, sinkFIFO, nil
	return nil
}

// SetConsole takes over the master of the process's terminal and starts to copy its output. The file must be in non-blocking mode.
// It is called at most once; FailedPrecondition when Close was first.
func (s *Streams) SetConsole(master *os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = master.Close()
		return fmt.Errorf("cannot take over the terminal: its streams were closed: %w", errdefs.ErrFailedPrecondition)
	}
	s.setMasterLocked(master)
	return nil
}

func (s *Streams) setMasterLocked(master *os.File) {
	s.master = master
	out := s.client.stream(master, "", ClientStdout, s.handlesClosed)
	s.client = nil
	s.outs = append(s.outs, out)
	s.spawn(out.run)
}

// Resize sets the terminal's size in characters. FailedPrecondition if the process has none.
func (s *Streams) Resize(width, height uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.master == nil {
		return fmt.Errorf("process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	c, err := s.master.SyscallConn()
	if err != nil {
		return fmt.Errorf("terminal is closed: %w", errdefs.ErrFailedPrecondition)
	}
	var ierr error
	err = c.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(width), Row: uint16(height)})
	})
	return errors.Join(err, ierr)
}
