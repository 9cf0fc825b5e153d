package stdio

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// openTerminal opens the client's ends; copying starts when there is a master.
func (s *Streams) openTerminal() (err error) {
	if s.cfg.Stdin != "" {
		if s.clientIn, err = openClient(s.cfg.Stdin, "stdin"); err != nil {
			return err
		}
	}
	if s.cfg.Stdout != "" {
		if s.client, err = openClient(s.cfg.Stdout, "stdout"); err != nil {
			return err
		}
	}
	return nil
}

// SetConsole takes over the master of the process's terminal and starts to copy. The file must be in non-blocking mode.
func (s *Streams) SetConsole(master *os.File) error {
	s.mu.Lock()
	s.master = master
	s.mu.Unlock()
	dst := s.client
	if dst == nil {
		var err error
		// Somebody has to read, or the process blocks on a full terminal.
		if dst, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
			return err
		}
	}
	s.client = nil
	out := newOutput(master, dst)
	s.outs = append(s.outs, out)
	s.spawn(func() {
		if out.plain(nil) == nil {
			close(out.eof)
			out.linger()
		}
		_ = out.dst.Close()
	})
	if s.clientIn != nil {
		s.in = newInput(s.clientIn, master)
		s.clientIn = nil
		s.spawn(func() {
			_ = s.in.plain(&s.in.finished)
			_ = s.in.src.Close() // the master is not the input's to close
		})
	}
	return nil
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
		return err
	}
	var ierr error
	err = c.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(width), Row: uint16(height)})
	})
	return errors.Join(err, ierr)
}

func (s *Streams) closeTerminal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range []*os.File{s.client, s.clientIn, s.master} {
		if f != nil {
			_ = f.Close()
		}
	}
}
