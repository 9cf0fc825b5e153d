package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// Process is what a session needs to have done to its process. Each call may take as long as a daemon is away.
type Process interface {
	// Wait gives the exit status.
	Wait(ctx context.Context) (uint32, error)
	Kill(ctx context.Context, signal uint32) error
	Resize(ctx context.Context, width, height uint32) error
	// CloseStdin ends its input.
	CloseStdin(ctx context.Context) error
}

// Session is one client at one process, in the foreground.
type Session struct {
	Streams *Streams // open
	In      io.Reader
	Console *Console // ours, for the process's terminal; nil: it has none, or we have none
	// SigProxy sends the signals that we get to the process. Without it they end the session: the process lives on.
	SigProxy   bool
	DetachKeys []byte

	signals chan os.Signal
}

// Result is how a session ended.
type Result struct {
	Status   uint32 // of the process
	Detached bool   // the process lives on: by the detach keys, or by Signal
	Signal   syscall.Signal
}

// resting are the signals that are about ourselves alone.
var resting = []os.Signal{
	unix.SIGCHLD, unix.SIGPIPE, unix.SIGURG, unix.SIGWINCH, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.SIGCONT,
}

// Catch begins to collect signals, for Attend to pass on: to be called before the process is started, so that none is lost.
// The returned function gives them back their effect.
func (s *Session) Catch() (release func()) {
	s.signals = make(chan os.Signal, 128)
	var all []os.Signal
	for n := unix.SIGHUP; n <= unix.SIGSYS; n++ {
		all = append(all, n)
	}
	signal.Notify(s.signals, without(all, resting)...)
	return func() { signal.Stop(s.signals) }
}

func without(all, those []os.Signal) (rest []os.Signal) {
	for _, s := range all {
		found := false
		for _, t := range those {
			found = found || s == t
		}
		if !found {
			rest = append(rest, s)
		}
	}
	return rest
}

// Attend stays with a process that runs until it has ended and all its output is written, or until the client leaves it.
// The terminal is raw meanwhile, and as it was before in the end, also in a panic.
func (s *Session) Attend(ctx context.Context, p Process) (Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if s.Console != nil {
		restore, err := s.Console.raw()
		if err != nil {
			return Result{}, fmt.Errorf("cannot make the terminal raw: %w", err)
		}
		defer restore()
		stop := s.followSize(ctx, p)
		defer stop()
	}
	type end struct {
		status uint32
		err    error
	}
	ended := make(chan end, 1)
	go func() {
		status, err := p.Wait(ctx)
		ended <- end{status, err}
	}()
	detach := make(chan struct{}, 1)
	if s.Streams.in != nil && s.In != nil {
		// Nobody can wait for this one: a read of a terminal or a pipe goes on until something comes.
		go s.input(ctx, p, s.Streams.in, detach)
	}
	forward := make(chan syscall.Signal, 128)
	defer close(forward)
	go func() { // in order, and beside us: the daemon may be away
		for sig := range forward {
			_ = p.Kill(ctx, uint32(sig)) // it has ended, or soon will have: Wait tells
		}
	}()
	for {
		select {
		case e := <-ended:
			s.Streams.Drain()
			return Result{Status: e.status}, e.err
		case <-detach:
			return Result{Detached: true}, nil
		case sig := <-s.signals:
			number, ok := sig.(syscall.Signal)
			switch {
			case !ok:
			case !s.SigProxy && (number == unix.SIGINT || number == unix.SIGTERM || number == unix.SIGHUP || number == unix.SIGQUIT):
				return Result{Detached: true, Signal: number}, nil
			case s.SigProxy:
				select {
				case forward <- number:
				default: // so many have not been delivered that one more makes no difference
				}
			}
		}
	}
}

// input copies our input to the process until it ends; then the process's ends too.
func (s *Session) input(ctx context.Context, p Process, to io.Writer, detach chan<- struct{}) {
	from := io.Reader(s.In)
	if s.Console != nil {
		from = &keyReader{r: s.In, keys: s.DetachKeys}
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				return
			}
		}
		switch {
		case errors.Is(err, errDetach):
			detach <- struct{}{}
			return
		case err != nil:
			_ = p.CloseStdin(ctx) // what may fail is that there is nobody any more whose input it was
			return
		}
	}
}

// followSize keeps the size of the process's terminal that of ours, until the returned function is called.
func (s *Session) followSize(ctx context.Context, p Process) (stop func()) {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, unix.SIGWINCH)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if width, height, err := s.Console.Size(); err == nil && width > 0 && height > 0 {
				_ = p.Resize(ctx, uint32(width), uint32(height)) // what has ended has no size
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() {
		signal.Stop(changed)
		cancel()
		<-done
	}
}
