// Package stdio carries a process's streams between the container and the client. It knows files, not containers.
//
// A stream is two FIFOs with us in between:
//
//	container ── bundle/stdio/ID.stdout ──▶ shim ── the client's FIFO ──▶ client
//
// The container holds its FIFO O_RDWR: while no shim lives it gets neither SIGPIPE nor end of file, the kernel keeps
// what it writes, and the next shim reads on where the last one stopped. We hold both ends of the client's FIFO too, so
// that a client may vanish and come back without anybody noticing. A client that stops reading stops its own
// container's stream and nothing else.
//
// A terminal has one pseudo-terminal instead of the container's three FIFOs.
package stdio

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logger"
	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
	"github.com/managerd/managerd/shimapi"
)

// pipeSize is what we ask the kernel to buffer per FIFO, in bytes; it may grant less (pipe(7)).
const pipeSize = 1 << 20

// Config names a process's streams as the client asked for them: a path of a FIFO, "fifo://PATH", or, for output only,
// "file://PATH" (appended), a log URI of package logsink, "binary://PROGRAM" (package logger), or "null://". Input that is
// empty is /dev/null; output is too, or it is kept in a ring.
type Config struct {
	Dir                   string // where the container-side FIFOs are made
	ExecID                string // empty for the init process
	Stdin, Stdout, Stderr string
	Terminal              bool
	UID, GID              int    // owner of the container-side FIFOs
	Restored              bool   // the process comes from a checkpoint, and may hold FIFOs: it gets some, also for output to nowhere
	Ring                  int64  // bytes that are kept of the output when neither Stdout nor Stderr is named; 0: none
	ID                    string // what a logger is told: the container's, or the exec's
	Loggers               *logger.Host
	// OnClosed, if set, is told of handles (see Handles) that are closed for good while the others go on. It must not wait.
	OnClosed func(kinds ...string)
}

// Streams are the open streams of one process. Close releases everything.
type Streams struct {
	cfg    Config
	paths  []string   // container-side FIFOs that we made
	files  []*os.File // the container's ends, until Started
	stdin  *os.File   // these three are in files
	stdout *os.File
	stderr *os.File

	copies sync.WaitGroup

	mu         sync.Mutex // guards all below
	in         *input
	outs       []stream
	logs       map[string]*logsink.Log // by their URI: both streams may go into one
	loggers    map[string]*logger.Logger
	master     *os.File // terminal
	client     *target  // terminal: where output goes, until SetConsole
	inputDst   *os.File // no terminal: where input goes, until OpenInput
	inputSrc   *os.File // the client's side of it, when it was taken over, until OpenInput
	inputEnded bool     // CloseStdin was called
	closed     bool
}

// Open makes and opens the FIFOs of a process and starts to copy its output. Errors: InvalidArgument for a stream that cannot be
// what it should, NotImplemented for a kind of stream that we do not have.
func Open(cfg Config) (_ *Streams, err error) {
	s := &Streams{cfg: cfg}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if cfg.Stdin != "" {
		// OpenInput opens it, but what is wrong with it is said now. To try by opening would let the client's own open
		// through, and leave it with a broken pipe.
		if _, err := resolve(cfg.Stdin, "stdin"); err != nil {
			return nil, err
		}
	}
	if cfg.Terminal {
		return s, s.openTerminal()
	}
	if cfg.Stdin != "" {
		if s.inputDst, s.stdin, err = s.fifo(sink{stream: "stdin"}, true); err != nil {
			return nil, err
		}
	}
	for _, o := range s.outputs() {
		if o.sink.none() {
			continue
		}
		logsink.Discard(s.logBase(o.sink)) // of a process that was to have this name, and whose shim died under it
		dst, err := s.openTarget(o.sink)
		if err != nil {
			return nil, err
		}
		ours, theirs, err := s.fifo(o.sink, false)
		if err != nil {
			dst.discard()
			return nil, err
		}
		*o.end = theirs
		s.startOutput(o, ours, dst)
	}
	if err = s.startLoggers(false); err != nil {
		return nil, err
	}
	return s, nil
}

// outputStream is one of the two that a process without a terminal has.
type outputStream struct {
	sink
	handle, client string    // kinds of its handles
	end            **os.File // the container's
}

func (s *Streams) outputs() []outputStream {
	return []outputStream{
		{s.sinkOf("stdout"), Stdout, ClientStdout, &s.stdout}, {s.sinkOf("stderr"), Stderr, ClientStderr, &s.stderr},
	}
}

func (s *Streams) startOutput(o outputStream, src *os.File, dst *target) {
	out := dst.stream(src, o.handle, o.client, s.handlesClosed)
	s.outs = append(s.outs, out)
	s.spawn(out.run)
}

func (s *Streams) handlesClosed(kinds ...string) {
	if s.cfg.OnClosed != nil {
		s.cfg.OnClosed(kinds...)
	}
}

// OpenInput opens the client's side of the input and starts to copy. It is to be called when the process is about to run,
// and not before: a client's own copy begins once we have opened the FIFO, and a client that comes to the end of a short
// input while its create request is under way has no process yet whose input it could close (Debian's ctr 1.6 then never
// does). With a terminal it is called after SetConsole. A second call does nothing.
func (s *Streams) OpenInput() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.openInputLocked()
}

func (s *Streams) openInputLocked() error {
	if s.cfg.Stdin == "" || s.in != nil {
		return nil
	}
	dst := s.inputDst
	if s.cfg.Terminal {
		dst = s.master
	}
	if s.closed || dst == nil {
		return fmt.Errorf("cannot open the input: its other side is not there: %w", errdefs.ErrFailedPrecondition)
	}
	src := s.inputSrc
	if src == nil {
		var err error
		if src, err = s.openStdin(); err != nil {
			return err
		}
	}
	s.inputDst, s.inputSrc = nil, nil
	s.in = newInput(src, dst, s.cfg.Terminal, s.handlesClosed)
	if s.inputEnded {
		s.in.finish()
	}
	s.spawn(s.in.run)
	return nil
}

func (s *Streams) openStdin() (*os.File, error) {
	c, err := resolve(s.cfg.Stdin, "stdin")
	if err != nil {
		return nil, err
	}
	return openClient(c, sink{stream: "stdin", uri: s.cfg.Stdin})
}

func (s *Streams) spawn(run func()) {
	s.copies.Add(1)
	go func() {
		defer s.copies.Done()
		run()
	}()
}

// fifo makes the container-side FIFO of a stream and opens both ends, ours first.
func (s *Streams) fifo(of sink, input bool) (ours, theirs *os.File, err error) {
	path := s.path(of.stream)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, nil, &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	s.paths = append(s.paths, path)
	if s.cfg.UID != 0 || s.cfg.GID != 0 {
		if err := os.Chown(path, s.cfg.UID, s.cfg.GID); err != nil {
			return nil, nil, err
		}
	}
	// Reading ends open without a writer when O_NONBLOCK is set, and the container's O_RDWR never waits (fifo(7)).
	if input {
		theirs, err = openRaw(path, unix.O_RDONLY|unix.O_NONBLOCK)
		if err == nil {
			err = unix.SetNonblock(int(theirs.Fd()), false)
		}
		if err == nil {
			ours, err = openRaw(path, unix.O_WRONLY|unix.O_NONBLOCK)
		}
	} else {
		ours, err = openRaw(path, unix.O_RDONLY|unix.O_NONBLOCK)
		if err == nil {
			theirs, err = openRaw(path, unix.O_RDWR)
		}
		if err == nil && of.kind == sinkBinary {
			ours, err = quiet(ours)
		}
	}
	if theirs != nil {
		s.files = append(s.files, theirs)
	}
	if err != nil {
		if ours != nil {
			_ = ours.Close()
		}
		return nil, nil, err
	}
	if of.kind != sinkRing { // it grows when much comes
		grow(ours)
	}
	return ours, theirs, nil
}

// path is where a stream's container-side FIFO is, or another file of ours.
func (s *Streams) path(stream string) string {
	return filepath.Join(s.cfg.Dir, shimapi.StdioName(s.cfg.ExecID, stream))
}

// openRaw opens without os.OpenFile's changes of O_NONBLOCK: what goes to a container must block.
func openRaw(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// grow asks for a larger pipe; over the user's limit (pipe-user-pages-soft) it stays as it is.
func grow(f *os.File) {
	if c, err := f.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) })
	}
}

// Files gives the container's ends, nil for /dev/null. They stay ours: Started closes them.
func (s *Streams) Files() (stdin, stdout, stderr *os.File) { return s.stdin, s.stdout, s.stderr }

// Started must be called when the process has its ends, or could not be made: only then is an end of file seen.
func (s *Streams) Started() {
	for _, f := range s.files {
		_ = f.Close()
	}
	s.files, s.stdin, s.stdout, s.stderr = nil, nil, nil, nil
}

// CloseStdin ends the process's input once everything that the client wrote has been delivered. It does not wait. A
// terminal's process sees no end of its input by that: it is only that nothing more is copied.
func (s *Streams) CloseStdin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inputEnded = true
	if s.in != nil {
		s.in.finish()
	}
}

// drainMost bounds Drain, however slowly a client goes on reading.
const drainMost = 10 * time.Second

// Drain waits until the client has taken everything that the process had written when it ended: to the end of file, or,
// when a descendant still holds the stream, until the FIFO has been empty. Clients are told of the exit after that, and
// some (Debian's ctr 1.6) then read no more. A client that does not read is waited for at most as long as patience without
// progress, one that has not begun to for a moment only, and one that reads slowly for ten seconds; copying goes on after
// that.
func (s *Streams) Drain(patience time.Duration) {
	s.mu.Lock()
	outs := s.outs
	s.mu.Unlock()
	deadline := time.Now().Add(drainMost)
	for _, o := range outs {
		o.drain(patience, deadline)
	}
}
