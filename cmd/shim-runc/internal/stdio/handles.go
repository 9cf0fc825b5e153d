package stdio

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
	"github.com/managerd/managerd/shimapi/parking"
)

// The kinds of descriptors that the streams of a process may have. Whoever holds a copy of all of them keeps the
// container from an end of file on its input, the client from one on its output, a terminal from hanging up, and the
// kernel from throwing away what nobody has read yet.
const (
	Stdin        = parking.Stdin        // writing end of what the container reads
	Stdout       = parking.Stdout       // reading end of what it writes
	Stderr       = parking.Stderr       //
	ClientStdin  = parking.ClientStdin  // the client's FIFO, both ends
	ClientStdout = parking.ClientStdout //
	ClientStderr = parking.ClientStderr //
	Terminal     = parking.Terminal     // the master
)

// Handles gives copies of the descriptors that are open now, by kind; the caller closes them. Files into which output is
// written are not among them: they are there without anybody.
func (s *Streams) Handles() map[string]*os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]*os.File{}
	add := func(kind string, f *os.File) {
		if f == nil {
			return
		}
		if c, err := f.SyscallConn(); err == nil {
			_ = c.Control(func(fd uintptr) {
				if n, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); err == nil {
					out[kind] = os.NewFile(uintptr(n), f.Name())
				}
			})
		}
	}
	add(Terminal, s.master)
	add(Stdin, s.inputDst)
	if s.in != nil {
		add(ClientStdin, s.in.src)
		if !s.in.terminal {
			add(Stdin, s.in.dst)
		}
	}
	for _, o := range s.outs {
		o.handles(add)
	}
	if s.client != nil && s.client.named == nil {
		add(ClientStdout, s.client.file)
	}
	return out
}

// Reopen goes on with the streams of a process that another incarnation of this program has started, from the byte where
// that stopped. held are its handles, as far as somebody has kept them, and belong to the Streams from here on; what is
// missing is opened by its name. A terminal of which nobody kept the master is gone. With input, it is copied from the
// client at once; else OpenInput is to be called.
func Reopen(cfg Config, held map[string]*os.File, input bool) (*Streams, error) {
	s := &Streams{cfg: cfg}
	s.mu.Lock()
	defer s.mu.Unlock()
	take := func(kind string) *os.File {
		f := held[kind]
		delete(held, kind)
		return f
	}
	defer func() {
		for _, f := range held {
			_ = f.Close()
		}
	}()
	s.inputSrc = take(ClientStdin)
	var problems []error
	if cfg.Terminal {
		master := take(Terminal)
		if master == nil {
			return s, fmt.Errorf("nobody has kept the terminal: %w", fs.ErrNotExist)
		}
		k := s.sinkOf("stdout")
		if k.kind == sinkBinary {
			if err := s.handTerminal(&k, false); err != nil {
				problems = append(problems, err)
			}
		}
		s.client = s.reopenClient(take(ClientStdout), k, &problems)
		s.setMasterLocked(master)
	} else {
		for _, o := range s.outputs() {
			if o.sink.none() {
				continue
			}
			src, err := s.reopenFIFO(take(o.handle), o.sink.stream, unix.O_RDONLY)
			if err == nil && o.sink.kind == sinkBinary {
				src, err = quiet(src)
			}
			if err != nil {
				problems = append(problems, err)
				continue
			}
			s.startOutput(o, src, s.reopenClient(take(o.client), o.sink, &problems))
		}
		if cfg.Stdin != "" {
			var err error
			// ENXIO: the process has closed its input, or has ended.
			if s.inputDst, err = s.reopenFIFO(take(Stdin), "stdin", unix.O_WRONLY); err != nil && !errors.Is(err, unix.ENXIO) {
				problems = append(problems, err)
			}
		}
	}
	if err := s.startLoggers(true); err != nil {
		problems = append(problems, err)
	}
	if input && (s.inputDst != nil || s.master != nil) {
		if err := s.openInputLocked(); err != nil {
			problems = append(problems, err)
		}
	}
	return s, errors.Join(problems...)
}

// reopenFIFO gives our end of a container-side FIFO.
func (s *Streams) reopenFIFO(held *os.File, stream string, flags int) (*os.File, error) {
	path := s.path(stream)
	s.paths = append(s.paths, path)
	if held != nil {
		return held, nil
	}
	f, err := openRaw(path, flags|unix.O_NONBLOCK)
	if err == nil {
		grow(f)
	}
	return f, err
}

// reopenClient gives where an output goes. A client that is gone has nobody who would read it, and the process must not be
// held up by that: then it is /dev/null. A file is opened by whoever writes to it, and so is a log: it may not answer.
func (s *Streams) reopenClient(held *os.File, k sink, problems *[]error) *target {
	if held != nil {
		return &target{sink: k, file: held}
	}
	if k.kind == sinkFile || k.kind == sinkFIFO {
		path := k.uri
		if k.url != nil {
			path = k.url.Path
		}
		if _, err := os.Stat(s.logBase(k) + "-sink"); err == nil || s.logs[k.uri] != nil {
			t := &target{sink: k}
			err := s.openLog(t, func() (logsink.Target, error) { return rawTarget(path), nil })
			if err == nil {
				return t
			}
			*problems = append(*problems, err)
		}
		if k.kind == sinkFile {
			return &target{sink: k, named: newNamed(k.uri, k.stream, path)}
		}
	}
	t, err := s.openTarget(k)
	if err == nil {
		return t
	}
	*problems = append(*problems, err)
	k.kind = sinkNull
	if t, err = s.openTarget(k); err != nil {
		panic(fmt.Sprintf("stdio: no %s: %v", os.DevNull, err)) // out of descriptors: the next successor may have more luck
	}
	return t
}
