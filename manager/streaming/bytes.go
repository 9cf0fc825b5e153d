package streaming

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	// window is what a sender is granted at a time, in bytes.
	window = 64 << 10
	// message is what is sent at a time, at most, in bytes.
	message = 32 << 10
	// flushing is how long Close waits for the client to have taken everything.
	flushing = 10 * time.Second
)

func send(s Stream, m proto.Message) error {
	a, err := typeurl.MarshalAnyToProto(m)
	if err != nil {
		return err
	}
	return s.Send(a)
}

// Message sends m over a stream.
func Message(s Stream, m proto.Message) error { return send(s, m) }

// Receive takes the next message of a stream, which must be of the kind of m.
func Receive(s Stream, m proto.Message) error {
	a, err := s.Recv()
	if err != nil {
		return err
	}
	return decode(a, m)
}

func decode(a *anypb.Any, m proto.Message) error {
	if err := typeurl.UnmarshalTo(a, m); err != nil {
		return fmt.Errorf("a message of type %q came over the stream, not a %s: %w: %w", a.GetTypeUrl(), m.ProtoReflect().Descriptor().FullName(), err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Reader gives the bytes that a client sends. It is for one goroutine; the caller closes it, and so the stream.
func Reader(s Stream) io.ReadCloser { return &reader{s: s} }

type reader struct {
	s       Stream
	granted int // and not yet used
	rest    []byte
	err     error
}

func (r *reader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.err != nil {
			return 0, r.err
		}
		r.err = r.next()
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *reader) next() error {
	if r.granted < window {
		if err := send(r.s, &transfer.WindowUpdate{Update: window}); err != nil {
			return err
		}
		r.granted += window
	}
	var data transfer.Data
	if err := Receive(r.s, &data); err != nil {
		return err
	}
	r.rest = data.Data
	r.granted -= len(data.Data)
	return nil
}

func (r *reader) Close() error { return r.s.Close() }

// Writer sends bytes to a client. It is for one goroutine. Its Close has the client take what was sent, as far as can be
// known, and closes the stream; the caller calls it. When ctx ends, nothing is waited for any more.
func Writer(ctx context.Context, s Stream) io.WriteCloser {
	w := &writer{ctx: ctx, s: s, changed: make(chan struct{})}
	go w.listen()
	return w
}

type writer struct {
	ctx context.Context
	s   Stream

	mu      sync.Mutex
	room    int64 // bytes that may be sent now
	first   int64 // the first grant: what there is room for when all was taken
	err     error // of listening
	changed chan struct{}
}

// listen takes the client's grants until the stream ends.
func (w *writer) listen() {
	for {
		var u transfer.WindowUpdate
		err := Receive(w.s, &u)
		w.mu.Lock()
		w.room += int64(u.Update)
		if w.first == 0 {
			w.first = int64(u.Update)
		}
		w.err = err
		close(w.changed)
		w.changed = make(chan struct{})
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// until waits for that much room.
func (w *writer) until(ctx context.Context, enough func() bool) error {
	for {
		w.mu.Lock()
		ok, err, changed := enough(), w.err, w.changed
		w.mu.Unlock()
		switch {
		case ok:
			return nil
		case errors.Is(err, io.EOF):
			return fmt.Errorf("the client takes no more: %w", io.ErrClosedPipe)
		case err != nil:
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (w *writer) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		var some int64
		if err := w.until(w.ctx, func() bool { some = min(w.room, message, int64(len(p))); return some > 0 }); err != nil {
			return n, err
		}
		if err := send(w.s, &transfer.Data{Data: p[:some]}); err != nil {
			return n, err
		}
		w.mu.Lock()
		w.room -= some
		w.mu.Unlock()
		n, p = n+int(some), p[some:]
	}
	return n, nil
}

func (w *writer) Close() error {
	ctx, cancel := context.WithTimeout(w.ctx, flushing)
	defer cancel()
	// A client grants room again when it has taken what came.
	_ = w.until(ctx, func() bool { return w.room >= w.first })
	return w.s.Close()
}
