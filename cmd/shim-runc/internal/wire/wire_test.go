package wire

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const service = "test.Counter"

// world is what outlives the servers of a test, as a container outlives its shim's code.
type world struct {
	ended chan struct{} // a Wait answers when it is closed
	slow  chan struct{} // a Slow call does

	mu    sync.Mutex
	last  uint64 // events are the numbers up to this one
	more  chan struct{}
	asked int
}

func newWorld() *world {
	return &world{ended: make(chan struct{}), slow: make(chan struct{}), more: make(chan struct{})}
}

func (w *world) grow() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last++
	close(w.more)
	w.more = make(chan struct{})
}

// generation is one server over the world; its number is what it answers a Wait with.
type generation struct {
	l      *Listener
	server *ttrpc.Server
	served chan error
}

func (w *world) serve(t *testing.T, number uint64, socket *os.File, conns []Conn) *generation {
	t.Helper()
	l, err := Listen(socket, Options{
		Parks: func(_, method string) bool { return method == "Wait" || method == "Events" },
		Resume: func(_, method string, payload, sent []byte) ([]byte, error) {
			if method == "Events" && sent != nil {
				return sent, nil // the request and the message are both one number: since, and the newest
			}
			return payload, nil
		},
	}, conns)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	wait := func(until chan struct{}) ttrpc.Method {
		return func(ctx context.Context, _ func(any) error) (any, error) {
			w.mu.Lock()
			w.asked++
			w.mu.Unlock()
			select {
			case <-until:
				return wrapperspb.UInt64(number), nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
	server.RegisterService(service, &ttrpc.ServiceDesc{
		Methods: map[string]ttrpc.Method{
			"Wait": wait(w.ended), "Slow": wait(w.slow),
			"Echo": func(_ context.Context, decode func(any) error) (any, error) {
				var v wrapperspb.BytesValue
				return &v, decode(&v)
			},
		},
		Streams: map[string]ttrpc.Stream{"Events": {StreamingServer: true, Handler: func(ctx context.Context, s ttrpc.StreamServer) (any, error) {
			var since wrapperspb.UInt64Value
			if err := s.RecvMsg(&since); err != nil {
				return nil, err
			}
			for n := since.Value; ; {
				w.mu.Lock()
				last, more := w.last, w.more
				w.mu.Unlock()
				for ; n < last; n++ {
					if err := s.SendMsg(wrapperspb.UInt64(n + 1)); err != nil {
						return nil, err
					}
				}
				select {
				case <-more:
				case <-ctx.Done():
					return nil, ctx.Err()
				}
			}
		}}},
	})
	g := &generation{l: l, server: server, served: make(chan error, 1)}
	go func() { g.served <- server.Serve(context.Background(), l) }()
	return g
}

func (g *generation) close(t *testing.T) {
	t.Helper()
	if err := g.server.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := <-g.served; !errors.Is(err, ttrpc.ErrServerClosed) {
		t.Errorf("Serve: %v", err)
	}
}

// listening gives a socket file and its path.
func listening(t *testing.T) (*os.File, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	return f, path
}

func dial(t *testing.T, path string) *ttrpc.Client {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(c)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// TestGenerations hands four clients on through a hundred servers: each has a Wait that was sent to the first, a stream
// of events, and calls under way all the time.
func TestGenerations(t *testing.T) {
	const clients, generations = 4, 100
	ctx := within(t)
	w := newWorld()
	socket, path := listening(t)
	g := w.serve(t, 0, socket, nil)

	waits := make(chan string, clients)
	stop := make(chan struct{})
	var calls sync.WaitGroup
	var mu sync.Mutex
	echoes := 0
	streams := make(chan string, clients)
	for i := range clients {
		c := dial(t, path)
		go func() {
			var n wrapperspb.UInt64Value
			err := c.Call(ctx, service, "Wait", &wrapperspb.BoolValue{}, &n)
			waits <- fmt.Sprint(n.Value, err)
		}()
		go func() {
			s, err := c.NewStream(ctx, &ttrpc.StreamDesc{StreamingServer: true}, service, "Events", wrapperspb.UInt64(0))
			for want := uint64(1); err == nil && want <= generations; want++ {
				var n wrapperspb.UInt64Value
				if err = s.RecvMsg(&n); err == nil && n.Value != want {
					err = fmt.Errorf("event %d, want %d", n.Value, want)
				}
			}
			streams <- fmt.Sprint(err)
		}()
		calls.Add(1)
		go func() {
			defer calls.Done()
			// Sizes around ttrpc's buffer of 4 KiB: a frame is written in several pieces.
			for n := 1; ; n = n*3%20011 + 1 {
				select {
				case <-stop:
					return
				default:
				}
				v, got := wrapperspb.Bytes(bytes.Repeat([]byte{byte(i)}, n)), wrapperspb.BytesValue{}
				if err := c.Call(ctx, service, "Echo", v, &got); err != nil || !bytes.Equal(v.Value, got.Value) {
					t.Errorf("echo of %d bytes: %d, %v", n, len(got.Value), err)
					return
				}
				mu.Lock()
				echoes++
				mu.Unlock()
			}
		}()
	}
	until(t, ctx, func() bool { w.mu.Lock(); defer w.mu.Unlock(); return w.asked == clients })
	for n := range generations {
		w.grow()
		if err := g.l.Freeze(ctx); err != nil {
			t.Fatal(err)
		}
		if n%10 == 9 { // a change of mind
			g.l.Thaw()
			if err := g.l.Freeze(ctx); err != nil {
				t.Fatal(err)
			}
		}
		s, conns, err := g.l.HandOver()
		if err != nil || len(conns) != clients {
			t.Fatalf("%d connections, %v", len(conns), err)
		}
		old := g
		g = w.serve(t, uint64(n)+1, s, conns)
		old.close(t)
		mu.Lock()
		before := echoes
		mu.Unlock()
		until(t, ctx, func() bool { mu.Lock(); defer mu.Unlock(); return echoes > before })
	}
	for range clients {
		if err := <-streams; err != "<nil>" {
			t.Errorf("events: %s", err)
		}
	}
	close(w.ended)
	for range clients {
		if got, want := <-waits, fmt.Sprint(generations, nil); got != want {
			t.Errorf("Wait: %s, want %s", got, want)
		}
	}
	close(stop)
	calls.Wait()
	t.Logf("%d calls during %d generations", echoes, generations)
	g.close(t)
}

// TestFreezeGivesUp is a call that does not park and does not end: it is named, and everything goes on.
func TestFreezeGivesUp(t *testing.T) {
	ctx := within(t)
	w := newWorld()
	socket, path := listening(t)
	g := w.serve(t, 7, socket, nil)
	defer g.close(t)
	c := dial(t, path)
	slow := make(chan error, 1)
	go func() { slow <- c.Call(ctx, service, "Slow", &wrapperspb.BoolValue{}, &wrapperspb.UInt64Value{}) }()
	until(t, ctx, func() bool { w.mu.Lock(); defer w.mu.Unlock(); return w.asked == 1 })

	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	err := g.l.Freeze(short)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), service+"/Slow") {
		t.Errorf("Freeze: %v", err)
	}
	if err := c.Call(ctx, service, "Echo", wrapperspb.Bytes([]byte("x")), &wrapperspb.BytesValue{}); err != nil {
		t.Errorf("after a freeze that gave up: %v", err)
	}
	close(w.slow)
	if err := <-slow; err != nil {
		t.Errorf("the call that was in the way: %v", err)
	}
}

// TestPieces is a request that arrives a byte at a time, its server changed after each.
func TestPieces(t *testing.T) {
	ctx := within(t)
	w := newWorld()
	socket, path := listening(t)
	g := w.serve(t, 0, socket, nil)
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	until(t, ctx, func() bool { g.l.mu.Lock(); defer g.l.mu.Unlock(); return len(g.l.conns) == 1 })

	body, err := proto.Marshal(wrapperspb.Bytes([]byte("hello")))
	if err != nil {
		t.Fatal(err)
	}
	payload, err := proto.Marshal(&ttrpc.Request{Service: service, Method: "Echo", Payload: body})
	if err != nil {
		t.Fatal(err)
	}
	request := append([]byte{0, 0, 0, byte(len(payload)), 0, 0, 0, 1, typeRequest, 0}, payload...)
	for n, b := range request {
		if _, err := conn.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
		if err := g.l.Freeze(ctx); err != nil {
			t.Fatal(err)
		}
		s, conns, err := g.l.HandOver()
		if err != nil || len(conns) != 1 {
			t.Fatalf("%d connections, %v", len(conns), err)
		}
		old := g
		g = w.serve(t, uint64(n), s, conns)
		old.close(t)
	}
	defer g.close(t)
	header := make([]byte, headerLen)
	if _, err := io.ReadFull(conn, header); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, binary.BigEndian.Uint32(header))
	if _, err := io.ReadFull(conn, answer); err != nil {
		t.Fatal(err)
	}
	var r ttrpc.Response
	if err := proto.Unmarshal(answer, &r); err != nil || !bytes.Equal(r.Payload, body) {
		t.Errorf("answer %v, %v", &r, err)
	}
}

// TestTimeout asks a successor with what is left of a call's time.
func TestTimeout(t *testing.T) {
	payload, err := proto.Marshal(&ttrpc.Request{Service: service, Method: "Wait", TimeoutNano: int64(time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	k := newCall(append(frame{0, 0, 0, byte(len(payload)), 0, 0, 0, 5, typeRequest, flagRemoteClosed}, payload...))
	for passed, want := range map[time.Duration]int64{20 * time.Second: int64(40 * time.Second), time.Hour: 1} {
		f, err := k.again(k.at.Add(passed), nil)
		if err != nil {
			t.Fatal(err)
		}
		var r ttrpc.Request
		if err := proto.Unmarshal(f.payload(), &r); err != nil || r.TimeoutNano != want {
			t.Errorf("after %s: %d, %v", passed, r.TimeoutNano, err)
		}
		if whole, rest := cut(f); len(whole) != len(f) || len(rest) != 0 || f.stream() != 5 || f.flags() != flagRemoteClosed {
			t.Errorf("frame %x", f)
		}
	}
}

// TestTooLong ends a connection rather than gather a frame without end.
func TestTooLong(t *testing.T) {
	w := newWorld()
	socket, path := listening(t)
	g := w.serve(t, 0, socket, nil)
	defer g.close(t)
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, typeRequest, 0}); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(time.Minute))
	if n, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// until polls for a state inside the server, which tells nobody.
func until(t *testing.T, ctx context.Context, ok func() bool) {
	t.Helper()
	for !ok() {
		if ctx.Err() != nil {
			t.Fatal("it does not come about")
		}
		time.Sleep(time.Millisecond)
	}
}
