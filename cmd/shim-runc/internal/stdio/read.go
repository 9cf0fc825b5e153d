package stdio

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
)

// ReadOptions say what of the logs is read.
type ReadOptions struct {
	Follow bool      // wait for more, until the streams have ended
	Tail   int       // only the last so many entries of each log; negative: all
	Since  time.Time // only entries that are not older
	After  Positions // only what is behind
}

// Positions are how far the logs of a process were read, by their URIs.
type Positions map[string]logsink.Position

// Reader is called with entries, at least one, and with how far all logs were read then.
type Reader func(entries []logsink.Entry, at Positions) error

// logSource is a log that can be read.
type logSource struct {
	uri  string
	read func(ctx context.Context, o logsink.ReadOptions, fn logsink.Reader) error
}

// ReadLogs reads what the process has written: the logs that its streams go into, each from its oldest entry on. It ends with
// them, with ctx, or with fn's error. FailedPrecondition: nothing of it is kept here.
func (s *Streams) ReadLogs(ctx context.Context, o ReadOptions, fn Reader) error {
	sources, err := s.sources()
	if err != nil {
		return err
	}
	var mu sync.Mutex // fn is called by one at a time
	at := Positions{}
	for uri, p := range o.After {
		at[uri] = p
	}
	read := func(ctx context.Context, l logSource, follow bool) error {
		mu.Lock()
		opts := logsink.ReadOptions{Follow: follow, Tail: o.Tail, Since: o.Since}
		if p, ok := at[l.uri]; ok {
			opts.After = &p
		}
		mu.Unlock()
		return l.read(ctx, opts, func(entries []logsink.Entry, end logsink.Position) error {
			mu.Lock()
			defer mu.Unlock()
			at[l.uri] = end
			return fn(entries, at)
		})
	}
	if len(sources) == 1 {
		return read(ctx, sources[0], o.Follow)
	}
	// What there is comes in the order of the logs, and what is written from now on in the order of time.
	for _, l := range sources {
		if err := read(ctx, l, false); err != nil {
			return err
		}
	}
	if !o.Follow {
		return nil
	}
	o.Tail = -1
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var reading sync.WaitGroup
	for _, l := range sources {
		reading.Go(func() {
			if err := read(ctx, l, true); err != nil {
				cancel(err)
			}
		})
	}
	reading.Wait()
	return context.Cause(ctx)
}

// sources are the logs that the streams go into.
func (s *Streams) sources() ([]logSource, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []logSource
	var elsewhere []error
	for _, o := range s.outs {
		var l logSource
		switch o := o.(type) {
		case *logged:
			l = logSource{o.sink.uri, o.to.Log().Read}
		case *output:
			elsewhere = append(elsewhere, kept(o.sink))
			continue
		case *handed:
			elsewhere = append(elsewhere, kept(o.sink))
			continue
		}
		if !slices.ContainsFunc(all, func(other logSource) bool { return other.uri == l.uri }) {
			all = append(all, l)
		}
	}
	if len(all) == 0 {
		if len(elsewhere) == 0 {
			elsewhere = []error{errors.New("it goes to /dev/null")}
		}
		return nil, fmt.Errorf("no output is kept here: %w: %w", elsewhere[0], errdefs.ErrFailedPrecondition)
	}
	return all, nil
}

// kept says where output is to be found that is not with us.
func kept(k sink) error {
	switch k.kind {
	case sinkBinary:
		return fmt.Errorf("%s goes to the logger %s, which may show it", k.stream, k.url.Path)
	case sinkNull:
		return fmt.Errorf("%s is thrown away", k.stream)
	}
	return fmt.Errorf("%s goes to the client, at %s", k.stream, k.uri)
}

// ReopenLogs begins new files at the paths of the logs whose files somebody has moved away or removed, and says which logs
// there are. What does not answer before ctx ends is reported, and keeps nobody else from his.
func (s *Streams) ReopenLogs(ctx context.Context) (paths []string, err error) {
	s.mu.Lock()
	outs := s.outs
	s.mu.Unlock()
	var mu sync.Mutex
	var asking sync.WaitGroup
	for _, o := range outs {
		asking.Go(func() {
			path, oerr := o.reopen(ctx)
			mu.Lock()
			defer mu.Unlock()
			if path != "" && !slices.Contains(paths, path) {
				paths = append(paths, path)
			}
			err = errors.Join(err, oerr)
		})
	}
	asking.Wait()
	slices.Sort(paths)
	return paths, err
}
