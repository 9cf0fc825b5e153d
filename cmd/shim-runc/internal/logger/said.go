package logger

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// most is how much is kept of what a program writes to its standard error, in bytes.
const most = 4 << 10

// said is the end of what a program wrote to its standard error. That is a FIFO which never blocks the program, and which it
// may write to while no shim lives.
type said struct {
	path string
	file *os.File // both ends
	done chan struct{}

	mu   sync.Mutex
	last []byte
}

// listen makes the FIFO, or opens the one of another incarnation.
func listen(path string) (*said, error) {
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	s := &said{path: path, done: make(chan struct{})}
	var err error
	if s.file, err = s.writingEnd(); err != nil {
		return nil, err
	}
	c, err := s.file.SyscallConn()
	if err != nil {
		_ = s.file.Close()
		return nil, err
	}
	go func() {
		defer close(s.done)
		_ = c.Read(func(fd uintptr) bool {
			s.take(int(fd))
			return false
		})
	}()
	return s, nil
}

// writingEnd opens the FIFO without O_NONBLOCK's lack of a reader, and with its lack of waiting.
func (s *said) writingEnd() (*os.File, error) {
	fd, err := unix.Open(s.path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: s.path, Err: err}
	}
	return os.NewFile(uintptr(fd), s.path), nil
}

// take reads what there is.
func (s *said) take(fd int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b [most]byte
	for {
		n, err := unix.Read(fd, b[:])
		if n <= 0 {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return
		}
		s.last = append(s.last, b[:n]...)
		if over := len(s.last) - most; over > 0 {
			s.last = append(s.last[:0], s.last[over:]...)
		}
	}
}

// tail gives what was written last, and forgets it.
func (s *said) tail() string {
	control(s.file, s.take)
	s.mu.Lock()
	defer s.mu.Unlock()
	text := string(bytes.TrimSpace(bytes.ToValidUTF8(s.last, []byte("?"))))
	s.last = nil
	return text
}

func (s *said) close() {
	_ = s.file.Close()
	<-s.done
}

// quoted appends what a program said to an error.
func quoted(said string) string {
	if said == "" {
		return ""
	}
	return ": " + strings.ReplaceAll(said, "\n", "; ")
}
