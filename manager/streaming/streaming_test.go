package streaming

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"

	"github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/manager/namespaces"
)

// end is one end of a stream in memory.
type end struct {
	out, in   chan *anypb.Any
	once      *sync.Once
	gone      chan struct{}
	mu        sync.Mutex
	unclaimed int // bytes of Data that were sent beyond what was granted, at most
	granted   int
}

func pair() (a, b *end) {
	x, y, gone, once := make(chan *anypb.Any, 100), make(chan *anypb.Any, 100), make(chan struct{}), &sync.Once{}
	return &end{out: x, in: y, gone: gone, once: once}, &end{out: y, in: x, gone: gone, once: once}
}

func (e *end) Send(a *anypb.Any) error {
	var d transfer.Data
	if a.UnmarshalTo(&d) == nil && a.MessageIs(&d) {
		e.mu.Lock()
		e.granted -= len(d.Data)
		e.unclaimed = max(e.unclaimed, -e.granted)
		e.mu.Unlock()
	}
	select {
	case e.out <- a:
		return nil
	case <-e.gone:
		return io.EOF
	}
}

func (e *end) Recv() (*anypb.Any, error) {
	take := func(a *anypb.Any) (*anypb.Any, error) {
		var u transfer.WindowUpdate
		if a.MessageIs(&u) && a.UnmarshalTo(&u) == nil {
			e.mu.Lock()
			e.granted += int(u.Update)
			e.mu.Unlock()
		}
		return a, nil
	}
	select {
	case a := <-e.in:
		return take(a)
	default:
	}
	select {
	case a := <-e.in:
		return take(a)
	case <-e.gone:
		select {
		case a := <-e.in:
			return take(a)
		default:
			return nil, io.EOF
		}
	}
}

func (e *end) Close() error { e.once.Do(func() { close(e.gone) }); return nil }

// TestBytes: what one end writes the other one reads, within the window, and Close waits until it has.
func TestBytes(t *testing.T) {
	for _, size := range []int{0, 1, window - 1, window, window + 1, 1 << 20} {
		a, b := pair()
		data := bytes.Repeat([]byte("0123456789abcdef"), size/16+1)[:size]
		var got []byte
		var rerr error
		var reading sync.WaitGroup
		reading.Go(func() { got, rerr = io.ReadAll(Reader(b)) })
		w := Writer(context.Background(), a)
		n, err := w.Write(data)
		if cerr := w.Close(); n != size || err != nil || cerr != nil {
			t.Errorf("%d bytes: %d, %v, %v", size, n, err, cerr)
		}
		reading.Wait()
		if !bytes.Equal(got, data) || rerr != nil {
			t.Errorf("%d bytes: %d came, %v", size, len(got), rerr)
		}
		if a.unclaimed > 0 {
			t.Errorf("%d bytes: %d were sent that nobody had granted", size, a.unclaimed)
		}
	}
}

// TestBytesErrors: an end that goes away, or does not speak the protocol, is an error and not a hang.
func TestBytesErrors(t *testing.T) {
	a, b := pair()
	w := Writer(context.Background(), a)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("%v", err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}

	a, b = pair()
	if err := send(a, &emptypb.Empty{}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(Reader(b)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	a, b = pair()
	if _, err := Writer(ctx, a).Write([]byte("x")); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	_ = b.Close()
}

func TestManager(t *testing.T) {
	m := NewManager()
	one, other := namespaces.With(context.Background(), "one"), namespaces.With(context.Background(), "other")
	a, _ := pair()
	done, err := m.Register(one, "s", a)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Register(one, "s", a); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	if s, err := m.Get(one, "s"); err != nil || s != Stream(a) {
		t.Error(err)
	}
	if _, err := m.Get(other, "s"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	done()
	if _, err := m.Get(one, "s"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if _, err := m.Register(one, "", a); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if _, err := m.Register(context.Background(), "s", a); err == nil {
		t.Error("a stream of no namespace")
	}
}
