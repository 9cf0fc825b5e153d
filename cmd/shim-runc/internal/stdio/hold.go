package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
)

// holding is a semaphore that a copy has while there is a byte in this process and nowhere else: one that was read and is
// not written yet. Whoever has it may replace the process, as if it was killed, and no byte is lost.
type holding chan struct{}

func newHolding() holding { return make(holding, 1) }

// read reads what there is into buf, and waits for some: then, and only then, it returns with the semaphore taken. 0 bytes
// are the end of file, io.EOF.
func (h holding) read(f *os.File, buf []byte) (n int, err error) {
	c, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var rerr error
	err = c.Read(func(fd uintptr) bool {
		h <- struct{}{}
		for {
			if n, rerr = unix.Read(int(fd), buf); !errors.Is(rerr, unix.EINTR) {
				break
			}
		}
		if n <= 0 {
			n = 0
			<-h
		}
		return !errors.Is(rerr, syscall.EAGAIN)
	})
	switch {
	case err != nil:
		return 0, err
	case rerr != nil:
		return 0, rerr
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// Hold waits until each byte of the streams is in the kernel or in a file, and no log is open, and keeps it so until Let: what this
// process alone has is lost when it is replaced, and the file system of a log may not answer then. When ctx ends before, nothing is
// held, and the error says what is in the way.
func (s *Streams) Hold(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.holdingsLocked()
	for i, h := range all {
		select {
		case h <- struct{}{}:
		case <-ctx.Done():
			for _, h := range all[:i] {
				<-h
			}
			return fmt.Errorf("output or input that was read cannot be written now: %w", ctx.Err())
		}
	}
	var resting []*logsink.Log
	for _, l := range s.logs {
		if err := l.Rest(ctx); err != nil {
			for _, l := range resting {
				l.Wake()
			}
			for _, h := range all {
				<-h
			}
			return err
		}
		resting = append(resting, l)
	}
	return nil
}

// Let ends a Hold that succeeded.
func (s *Streams) Let() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.logs {
		l.Wake()
	}
	for _, h := range s.holdingsLocked() {
		<-h
	}
}

func (s *Streams) holdingsLocked() []holding {
	var all []holding
	if s.in != nil {
		all = append(all, s.in.alone)
	}
	for _, o := range s.outs {
		all = append(all, o.holds())
	}
	return all
}
