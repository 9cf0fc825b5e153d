package stdio

import (
	"context"
	"os"
	"time"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logger"
)

// handed is a stream that a logger takes out of the container's FIFO itself. We hold the FIFO, and move nothing.
type handed struct {
	src    *os.File // not in Go's poller
	sink   sink
	handle string // kind of the handle that src is; empty: nobody else needs it
	closed func(kinds ...string)
	logger *logger.Logger // nil before it was started
	alone  holding
}

func newHanded(src *os.File, k sink, handle string, closed func(...string)) *handed {
	return &handed{src: src, sink: k, handle: handle, closed: closed, alone: newHolding()}
}

func (h *handed) run()                                   {}
func (h *handed) halt()                                  {}
func (h *handed) holds() holding                         { return h.alone }
func (h *handed) reopen(context.Context) (string, error) { return "", nil }

func (h *handed) handles(add func(string, *os.File)) {
	if h.handle != "" {
		add(h.handle, h.src)
	}
}

func (h *handed) release() {
	_ = h.src.Close()
	if h.handle != "" {
		h.closed(h.handle)
	}
}

func (h *handed) state() Output {
	o := Output{Stream: h.sink.stream, Sink: h.sink.kind}
	if h.logger != nil {
		o.Logger = h.logger.State()
	}
	return o
}

// drain waits until the logger has taken everything, or takes no more.
func (h *handed) drain(patience time.Duration, deadline time.Time) {
	last, since := -1, time.Now()
	for wait := 100 * time.Microsecond; ; wait = min(2*wait, 10*time.Millisecond) {
		unread, now := logger.Unread(h.src), time.Now()
		switch {
		case unread == 0, now.After(deadline):
			return
		case unread != last:
			since = now
		case now.Sub(since) > patience:
			return
		}
		last = unread
		time.Sleep(wait)
	}
}
