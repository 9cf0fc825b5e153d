package external

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
)

// streams are the files of one launch, in the form that go-runc takes. The program inherits them, and what it starts
// from it: never a pipe of ours, on which go-runc would wait for as long as the container lives.
type streams struct {
	pidFile             string
	stdin, stdout, errs *os.File
	null                *os.File
	listener            *net.UnixListener // for the terminal, or nil
	path                string
}

func newStreams(files engine.IO, dir string) (*streams, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	s := &streams{pidFile: filepath.Join(dir, "pid"), null: null, stdin: files.Stdin, stdout: files.Stdout, errs: files.Stderr}
	for _, f := range []**os.File{&s.stdin, &s.stdout, &s.errs} {
		if *f == nil {
			*f = null
		}
	}
	if files.Console != nil {
		s.path = filepath.Join(dir, "pty.sock")
		if s.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: s.path, Net: "unix"}); err != nil {
			_ = null.Close()
			return nil, fmt.Errorf("cannot make the console socket: %w", err)
		}
	}
	return s, nil
}

func (s *streams) close() {
	_ = s.null.Close()
	if s.listener != nil {
		_ = s.listener.Close()
	}
}

// socketPath is where the program sends the terminal.
type socketPath string

// Path makes it go-runc's ConsoleSocket.
func (p socketPath) Path() string { return string(p) }

// socket is nil without a terminal.
func (s *streams) socket() runc.ConsoleSocket {
	if s.listener == nil {
		return nil
	}
	return socketPath(s.path)
}

// master takes the terminal that the program has sent before it ended; nil without one.
func (s *streams) master() (*os.File, error) {
	if s.listener == nil {
		return nil, nil
	}
	fail := func(err error) (*os.File, error) { return nil, fmt.Errorf("cannot receive the terminal: %w", err) }
	_ = s.listener.SetDeadline(time.Now().Add(patience))
	conn, err := s.listener.AcceptUnix()
	if err != nil {
		return fail(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(patience))
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return fail(err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return fail(errors.Join(errors.New("the runtime sent none"), err))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return fail(errors.Join(fmt.Errorf("the runtime sent %d descriptors", len(fds)), err))
	}
	if err := unix.SetNonblock(fds[0], true); err != nil { // for Go's poller
		_ = unix.Close(fds[0])
		return fail(err)
	}
	return os.NewFile(uintptr(fds[0]), "ptmx"), nil
}

// The rest is go-runc's IO.

// Set gives a command its streams.
func (s *streams) Set(cmd *exec.Cmd) { cmd.Stdin, cmd.Stdout, cmd.Stderr = s.stdin, s.stdout, s.errs }

// Close does nothing: the files are the caller's.
func (s *streams) Close() error { return nil }

// Stdin is nil: nothing is copied here.
func (s *streams) Stdin() io.WriteCloser { return nil }

// Stdout is nil.
func (s *streams) Stdout() io.ReadCloser { return nil }

// Stderr is nil.
func (s *streams) Stderr() io.ReadCloser { return nil }
