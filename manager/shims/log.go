package shims

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/bundle"
)

// maxLine is the most bytes of a shim's log line that are kept together.
const maxLine = 16 << 10

// shimLog copies what a shim logs into our log. The FIFO is held O_RDWR: it has no end while we look, and what was
// logged while no daemon lived, as much as fits a pipe, is still there.
type shimLog struct {
	file *os.File
	done chan struct{} // closed when the copy has ended

	mu   sync.Mutex
	last string
}

func copyLog(b *bundle.Bundle, log *slog.Logger) (*shimLog, error) {
	fd, err := unix.Open(b.LogFIFO(), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", b.LogFIFO(), err)
	}
	l := &shimLog{file: os.NewFile(uintptr(fd), b.LogFIFO()), done: make(chan struct{})}
	go l.copy(log.With("shim_namespace", b.Namespace, "shim_id", b.ID))
	return l, nil
}

func (l *shimLog) copy(log *slog.Logger) {
	defer close(l.done)
	var rest []byte
	buf := make([]byte, maxLine)
	for {
		n, err := l.file.Read(buf)
		rest = append(rest, buf[:n]...)
		for {
			i := bytes.IndexByte(rest, '\n')
			if i < 0 && len(rest) < maxLine && err == nil {
				break
			}
			if i < 0 {
				i = len(rest)
			}
			l.tell(log, string(rest[:i]))
			if rest = rest[min(i+1, len(rest)):]; len(rest) == 0 {
				break
			}
		}
		if err != nil {
			return
		}
	}
}

func (l *shimLog) tell(log *slog.Logger, line string) {
	if strings.TrimSpace(line) == "" {
		return
	}
	l.mu.Lock()
	l.last = line
	l.mu.Unlock()
	log.Log(context.Background(), level(line), "shim: "+line)
}

// level finds the level in a line as slog, and logrus in shims of others, write it.
func level(line string) slog.Level {
	_, after, found := strings.Cut(line, "level=")
	word, _, _ := strings.Cut(after, " ")
	switch strings.ToLower(word) {
	case "debug", "trace":
		return slog.LevelDebug
	case "warn", "warning":
		return slog.LevelWarn
	case "error", "fatal", "panic":
		return slog.LevelError
	}
	if !found && strings.Contains(line, "panic") {
		return slog.LevelError
	}
	return slog.LevelInfo
}

// lastLine is what a shim that has ended said last. The copy ends.
func (l *shimLog) lastLine() string {
	// What it wrote is in the pipe already: the deadline ends the wait for more, which nobody will write.
	_ = l.file.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	<-l.done
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

func (l *shimLog) close() {
	_ = l.file.Close()
	<-l.done
}
