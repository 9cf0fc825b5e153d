package stdio

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
)

// closing is how long Close waits for a call into a sink that does not return.
const closing = 3 * time.Second

// Close stops copying and releases everything, the container-side FIFOs included. It may be called more than once. It
// returns after some seconds whatever sinks do; an error says what of the output was lost, or which sink holds up a call of
// ours: that is left behind then, and released when the call returns.
func (s *Streams) Close() error {
	s.Started()
	s.mu.Lock()
	s.closed = true
	if s.in != nil {
		s.in.halt()
	}
	outs := s.outs
	for _, o := range outs {
		o.halt()
	}
	held := []*os.File{s.inputDst, s.inputSrc, s.master}
	client, logs, loggers := s.client, s.logs, s.loggers
	s.client, s.inputDst, s.inputSrc, s.master, s.logs, s.loggers = nil, nil, nil, nil, nil, nil
	paths := s.paths
	s.paths = nil
	s.mu.Unlock()

	lost := make([]error, 0, len(loggers)+1)
	var mu sync.Mutex
	var leaving sync.WaitGroup
	for _, l := range loggers {
		leaving.Go(func() {
			err := l.Close()
			mu.Lock()
			defer mu.Unlock()
			lost = append(lost, err)
		})
	}
	released := make(chan struct{})
	go func() {
		defer close(released)
		if client != nil {
			client.discard()
		}
		s.copies.Wait()
		for _, l := range logs {
			l.Close()
		}
	}()
	leaving.Wait()
	for _, o := range outs {
		o.release()
	}
	select {
	case <-released:
	case <-time.After(closing):
		lost = append(lost, hung(outs))
	}
	for _, f := range held {
		if f != nil {
			_ = f.Close()
		}
	}
	for _, l := range logs {
		l.Remove()
	}
	for _, p := range paths {
		_ = os.Remove(p)
	}
	return errors.Join(lost...)
}

// hung names the sinks that hold up a call.
func hung(outs []stream) error {
	var all []string
	for _, o := range outs {
		if st := o.state(); st.Waiting != "" {
			all = append(all, fmt.Sprintf("%s (%s) since %s", st.Sink, st.Waiting, st.Since.Format(time.TimeOnly)))
		}
	}
	return fmt.Errorf("output was left behind, its sink does not answer: %s", strings.Join(all, ", "))
}
