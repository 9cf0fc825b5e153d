// Package logger runs the programs that binary:// log URIs name, by containerd's contract: the program finds the container's
// standard output on descriptor 3, its standard error on 4, and a pipe on 5 that it closes when it is ready; its environment
// is CONTAINER_ID and CONTAINER_NAMESPACE, its arguments are the keys and values of the query.
//
// Descriptors 3 and 4 are the container's own FIFOs, so that no byte passes through the shim. Whoever uses this package
// holds the FIFOs too: a program that dies loses only what it had taken, and another one is started in its place, which
// reads on. One that another incarnation of the shim has started is known by a small record beside the FIFOs.
package logger

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/reaper"
)

// Ready is how long a program may take until it is ready.
const Ready = 30 * time.Second

// The waits of Close.
const (
	leaving  = 3 * time.Second // without progress, until the program is told to end
	ending   = 2 * time.Second // from there until it is killed
	vanish   = time.Second     // from there until it is left alone
	mostTime = 10 * time.Second
)

// The growing times between two attempts to keep a program running.
const (
	firstWait = 100 * time.Millisecond
	mostWait  = 10 * time.Second
)

// Host is what all loggers of a shim have in common.
type Host struct {
	Reaper    *reaper.Reaper
	Namespace string
	Log       *slog.Logger
	Ready     time.Duration // see the constant of that name; 0 is that
}

// Config is one logger. The files are the reading ends that whoever starts it holds, and keeps open until Close has
// returned; nil: the stream has no output.
type Config struct {
	Program
	ID             string // CONTAINER_ID: of the container, or of the exec
	Stdout, Stderr *os.File
	Base           string // path of our own files: the record, and with "-stderr" the program's standard error
}

// Program is what a URI says.
type Program struct {
	Path string
	Args []string
}

// Parse reads binary:///path?key=value: the program and its arguments, key, value and so on in the order of the query. A key
// that is there twice counts once, with its first value. Errors are InvalidArgument.
func Parse(u *url.URL) (Program, error) {
	p := Program{Path: u.Path}
	if u.Host != "" || !filepath.IsAbs(u.Path) {
		return p, fmt.Errorf("not an absolute path of a program, write binary:///path: %w", errdefs.ErrInvalidArgument)
	}
	seen := map[string]bool{}
	for pair := range strings.SplitSeq(u.RawQuery, "&") {
		if pair == "" {
			continue
		}
		rawKey, rawValue, _ := strings.Cut(pair, "=")
		key, err := url.QueryUnescape(rawKey)
		value, verr := url.QueryUnescape(rawValue)
		if err = errors.Join(err, verr); err != nil {
			return p, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		if !seen[key] {
			seen[key] = true
			p.Args = append(p.Args, key, value)
		}
	}
	return p, nil
}

// State is how a logger is.
type State struct {
	PID      int // 0: it does not run
	Restarts int // by this shim
	LastEnd  string
}

// Logger is a program that is kept running. Close ends it.
type Logger struct {
	host *Host
	cfg  Config
	said *said

	stop chan struct{} // closed by Close: it is not started again
	kept chan struct{} // closed when nobody keeps it running any more

	mu    sync.Mutex
	proc  *reaper.Process
	state State
}

// Start starts the program and waits until it is ready. When it dies before, or is not ready in time, the error has what it
// wrote to its standard error: InvalidArgument for a path that cannot be executed, else Unavailable.
func (h *Host) Start(ctx context.Context, cfg Config) (*Logger, error) {
	l, err := h.make(cfg)
	if err != nil {
		return nil, err
	}
	ready, err := l.start()
	if err == nil {
		err = l.awaitReady(ctx, ready)
	}
	if err != nil {
		l.said.close()
		l.removeFiles()
		return nil, err
	}
	go l.keep(ready)
	return l, nil
}

// Resume goes on with the logger of another incarnation: the one that still runs, or another one in its place.
func (h *Host) Resume(cfg Config) (*Logger, error) {
	l, err := h.make(cfg)
	if err != nil {
		return nil, err
	}
	if pid, ticks := l.find(); pid != 0 {
		p, err := h.Reaper.Adopt(pid, ticks, nil)
		if err != nil {
			l.said.close()
			return nil, err
		}
		l.proc, l.state.PID = p, pid
	}
	go l.keep(nil)
	return l, nil
}

func (h *Host) make(cfg Config) (*Logger, error) {
	l := &Logger{host: h, cfg: cfg, stop: make(chan struct{}), kept: make(chan struct{})}
	var err error
	if l.said, err = listen(cfg.Base + "-stderr"); err != nil {
		return nil, fmt.Errorf("cannot start logger %s: %w", cfg.Path, err)
	}
	return l, nil
}

// awaitReady waits for the end of file, or a byte, on the ready pipe.
func (l *Logger) awaitReady(ctx context.Context, ready *os.File) error {
	limit := l.host.Ready
	if limit == 0 {
		limit = Ready
	}
	deadline := time.Now().Add(limit)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	err := ready.SetReadDeadline(deadline)
	if err == nil {
		var n int
		if n, err = ready.Read(make([]byte, 1)); n > 0 || n == 0 && !errors.Is(err, os.ErrDeadlineExceeded) {
			err = nil
		}
	}
	why := ""
	switch {
	case err != nil:
		why = fmt.Sprintf("is not ready after %v", limit)
	case dying(l.proc.Pid()):
		why = "ended before it was ready"
	default:
		return nil
	}
	_ = ready.Close()
	_ = l.proc.Signal(unix.SIGKILL)
	select {
	case <-l.proc.Done():
		if err == nil {
			why += ", " + describe(l.proc.Exit())
		}
	case <-time.After(vanish):
	}
	return fmt.Errorf("logger %s %s%s: %w", l.cfg.Path, why, quoted(l.said.tail()), errdefs.ErrUnavailable)
}

// keep starts the program again whenever it has ended and there may be something to read. ready is the pipe of the one that
// runs, which stays open so that writing to it later does no harm.
func (l *Logger) keep(ready *os.File) {
	defer close(l.kept)
	defer func() { _ = ready.Close() }()
	wait := firstWait
	for {
		l.mu.Lock()
		proc := l.proc
		l.mu.Unlock()
		if proc != nil {
			began := time.Now()
			<-proc.Done()
			_ = ready.Close()
			ready = nil
			over := l.over()
			l.ended(proc, over)
			if over {
				return
			}
			if time.Since(began) > mostWait {
				wait = firstWait
			}
			select {
			case <-l.stop:
				return
			case <-time.After(wait):
			}
			wait = min(2*wait, mostWait)
		} else if l.over() {
			return
		}
		select {
		case <-l.stop:
			return
		default:
		}
		var err error
		if ready, err = l.start(); err != nil {
			l.mu.Lock()
			l.proc, l.state.LastEnd = nil, err.Error()
			l.mu.Unlock()
			l.host.Log.Error("output waits for its logger", "error", err, "again in", wait)
			select {
			case <-l.stop:
				return
			case <-time.After(wait):
			}
			wait = min(2*wait, mostWait)
			continue
		}
		l.mu.Lock()
		l.state.Restarts++
		l.mu.Unlock()
	}
}

// ended notes how the program has ended.
func (l *Logger) ended(proc *reaper.Process, over bool) {
	how := describe(proc.Exit())
	l.mu.Lock()
	l.state.PID, l.state.LastEnd = 0, how
	l.mu.Unlock()
	if said := l.said.tail(); !over && !l.stopping() {
		l.host.Log.Warn("a logger ended while its container writes, another one is started", "logger", l.cfg.Path, "how", how, "said", said)
	}
}

func (l *Logger) stopping() bool {
	select {
	case <-l.stop:
		return true
	default:
		return false
	}
}

// over says that nothing more can come out of the FIFOs.
func (l *Logger) over() bool { return atEnd(l.cfg.Stdout) && atEnd(l.cfg.Stderr) }

// unread is how many bytes wait in the FIFOs.
func (l *Logger) unread() int { return Unread(l.cfg.Stdout) + Unread(l.cfg.Stderr) }

// State says how it is.
func (l *Logger) State() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state
}

// Close ends the logger. One that reads gets time to come to the end of its streams and to end by itself; else it is sent
// SIGTERM, and SIGKILL after that. It returns after a few seconds whatever the program does. An error says what was lost.
func (l *Logger) Close() error {
	close(l.stop)
	defer l.removeFiles()
	defer l.said.close()
	begin := time.Now()
	last, since := l.unread(), begin
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		select {
		case <-l.kept:
			return l.left("")
		case <-time.After(wait):
		}
		now, unread := time.Now(), l.unread()
		if unread != last {
			last, since = unread, now
		}
		// Who has read everything and does not see the end, because a descendant of the process has the stream, waits for us.
		if now.Sub(since) > leaving || now.Sub(begin) > mostTime || unread == 0 && !l.over() {
			break
		}
	}
	for _, step := range []struct {
		sig   unix.Signal
		bound time.Duration
	}{{unix.SIGTERM, ending}, {unix.SIGKILL, vanish}} {
		l.mu.Lock()
		proc := l.proc
		l.mu.Unlock()
		if proc != nil {
			_ = proc.Signal(step.sig)
		}
		select {
		case <-l.kept:
			how := ""
			if step.sig == unix.SIGKILL {
				how = "it did not end, and was killed"
			}
			return l.left(how)
		case <-time.After(step.bound):
		}
	}
	return l.left("it does not end, although it was killed")
}

// left says what nobody has read.
func (l *Logger) left(how string) error {
	if n := l.unread(); n > 0 {
		if how == "" {
			how = "it had ended"
		}
		return fmt.Errorf("logger %s did not take the last %d bytes of output: %s", l.cfg.Path, n, how)
	}
	if how != "" {
		return fmt.Errorf("logger %s: %s", l.cfg.Path, how)
	}
	return nil
}

func (l *Logger) removeFiles() {
	_ = os.Remove(l.cfg.Base)
	_ = os.Remove(l.cfg.Base + "-stderr")
}
