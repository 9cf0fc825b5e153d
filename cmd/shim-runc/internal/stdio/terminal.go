package stdio

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// openTerminal opens where output goes; copying starts when there is a master.
func (s *Streams) openTerminal() (err error) {
	out := s.cfg.Stdout
	if out == "" {
		// Somebody has to read, or the process blocks on a full terminal.
		f, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		s.client = &target{file: f}
		return nil
	}
	s.client, err = s.openTarget(out, "stdout")
	return err
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
