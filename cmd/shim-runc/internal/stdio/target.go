package stdio

import (
	"context"
	"fmt"
	"os"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logger"
	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
)

// target is where a stream of output goes: one of the three. Either stream or discard takes it over.
type target struct {
	sink
	file  *os.File // nil for a file that is still to be opened
	named *named   // how to open it anew; nil: it is a FIFO
	log   *logsink.Stream
	hands bool // to a logger, which takes it itself
}

// openTarget opens what a stream's URI names.
func (s *Streams) openTarget(k sink) (*target, error) {
	t := &target{sink: k}
	switch k.kind {
	case sinkNull:
		f, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		t.file, t.named = f, newNamed(os.DevNull, k.stream, os.DevNull)
		return t, err
	case sinkBinary:
		t.hands = true
		if _, err := logger.Parse(k.url); err != nil {
			return nil, fmt.Errorf("cannot use %s %q: %w", k.stream, k.uri, err)
		}
		return t, nil
	case sinkFIFO, sinkFile:
		c, err := resolve(k.uri, k.stream)
		if err != nil {
			return nil, err
		}
		if c.fifo || c.device {
			if t.file, err = openClient(c, k); err != nil {
				return nil, err
			}
			if c.device {
				t.named = newNamed(k.uri, k.stream, c.path)
			}
			return t, nil
		}
		t.kind = sinkFile
		return t, s.openLog(t, func() (logsink.Target, error) { return rawTarget(c.path), nil })
	case sinkRing:
		return t, s.openLog(t, func() (logsink.Target, error) { return s.ring(), nil })
	}
	return t, s.openLog(t, func() (logsink.Target, error) { return logsink.Parse(k.url) })
}

func rawTarget(path string) logsink.Target {
	return logsink.Target{Format: logsink.Raw, Path: path, MaxFile: 1}
}

// openLog opens the log that t is for, or goes on with the one of another process or of the other stream.
func (s *Streams) openLog(t *target, parse func() (logsink.Target, error)) error {
	k := t.sink
	fail := func(err error) error { return fmt.Errorf("cannot use %s %q: %w", k.stream, k.uri, err) }
	log := s.logs[k.uri]
	if log == nil {
		into, err := parse()
		if err == nil {
			log, err = logsink.Open(logsink.Config{Target: into, Base: s.logBase(k), Lazy: k.kind == sinkRing})
		}
		if err != nil {
			return fail(err)
		}
		if s.logs == nil {
			s.logs = map[string]*logsink.Log{}
		}
		s.logs[k.uri] = log
	}
	to, err := log.Stream(k.stream)
	if err != nil {
		return fail(err)
	}
	t.log = to
	return nil
}

// logBase is where a log keeps what a successor needs.
func (s *Streams) logBase(k sink) string { return s.path("log-" + k.stream) }

// ring is the log of a process for which nobody named one.
func (s *Streams) ring() logsink.Target {
	path := s.path("ring")
	s.paths = append(s.paths, path, path+".1")
	return logsink.Target{Format: logsink.CRI, Path: path, MaxSize: s.cfg.Ring, MaxFile: 2, Drop: true, Newest: s.cfg.Ring}
}

// stream makes the copy of src into the target; it is not running yet. handle and client are the kinds of its two handles;
// handle is empty for a terminal, whose master is not the copy's to close.
func (t *target) stream(src *os.File, handle, client string, closed func(kinds ...string)) stream {
	switch {
	case t.log != nil:
		return newLogged(src, t.log, t.sink, handle, closed)
	case t.hands:
		return newHanded(src, t.sink, handle, closed)
	}
	return newOutput(src, t.file, t.named, t.sink, handle, client, closed)
}

func (t *target) discard() {
	switch {
	case t.log != nil:
		t.log.Close()
	case t.file != nil:
		_ = t.file.Close()
	}
}

// startLoggers starts the programs that streams were handed to, or goes on with those that run.
func (s *Streams) startLoggers(resume bool) error {
	for _, o := range s.outs {
		h, ok := o.(*handed)
		if !ok || h.logger != nil {
			continue
		}
		program, err := logger.Parse(h.sink.url)
		if err != nil {
			return err
		}
		cfg := logger.Config{Program: program, ID: s.cfg.ID, Base: s.path("logger-" + h.sink.stream)}
		var both []*handed
		for _, other := range s.outs {
			if h2, ok := other.(*handed); ok && h2.sink.uri == h.sink.uri {
				both = append(both, h2)
				if h2.sink.stream == "stdout" {
					cfg.Stdout = h2.src
				} else {
					cfg.Stderr = h2.src
				}
			}
		}
		var l *logger.Logger
		if resume {
			l, err = s.cfg.Loggers.Resume(cfg)
		} else {
			l, err = s.cfg.Loggers.Start(context.Background(), cfg)
		}
		if err != nil {
			return fmt.Errorf("cannot use %s %q: %w", h.sink.stream, h.sink.uri, err)
		}
		for _, h2 := range both {
			h2.logger = l
		}
		if s.loggers == nil {
			s.loggers = map[string]*logger.Logger{}
		}
		s.loggers[h.sink.uri] = l
	}
	return nil
}
