package server

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ttrpcapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// counter counts how often each event is forwarded to it.
type counter struct {
	mu  sync.Mutex
	got map[string]int
}

func (c *counter) Forward(_ context.Context, r *ttrpcapi.ForwardRequest) (*emptypb.Empty, error) {
	time.Sleep(time.Millisecond) // the work of a call, so that some are always under way
	c.mu.Lock()
	defer c.mu.Unlock()
	c.got[r.Envelope.Topic]++
	return &emptypb.Empty{}, nil
}

// TestDrain: shims that forward events, on a connection for each or on one that they keep, see no call of theirs done and not
// answered when the daemon is replaced, again and again, behind a socket that stays: who makes a call again that could not be
// sent has every event told once.
func TestDrain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	held, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}) // as the service manager does
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = held.Close() }()
	count := &counter{got: map[string]int{}}
	serve := func() (stop func()) {
		f, err := held.File()
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.FileListener(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		server, err := ttrpc.NewServer()
		if err != nil {
			t.Fatal(err)
		}
		ttrpcapi.RegisterTTRPCEventsService(server, count)
		drained := newDrain(l)
		hatch := newGate(drained, greetingTTRPC)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = server.Serve(context.Background(), hatch)
		}()
		return func() {
			hatch.shut(speaking)
			drained.end(time.Minute)
			_ = server.Close()
			<-ended
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	dial := func() *ttrpc.Client {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Error(err)
			return nil
		}
		return ttrpc.NewClient(c)
	}
	var clients sync.WaitGroup
	var calls, again atomic.Int64
	stop := make(chan struct{})
	for i := range 8 {
		keeps := i%2 == 0
		clients.Go(func() {
			var c *ttrpc.Client
			defer func() {
				if c != nil {
					_ = c.Close()
				}
			}()
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				topic := string(rune('a'+i)) + "/" + time.Duration(n).String()
				for {
					if c == nil {
						if c = dial(); c == nil {
							return
						}
					}
					_, err := ttrpcapi.NewTTRPCEventsClient(c).Forward(ctx, &ttrpcapi.ForwardRequest{Envelope: &types.Envelope{Topic: topic}})
					if err == nil {
						break
					}
					_ = c.Close()
					c = nil
					if !keeps || !errors.Is(err, ttrpc.ErrClosed) {
						t.Errorf("event %s, connection kept %v: %v", topic, keeps, err)
						return
					}
					again.Add(1)
				}
				calls.Add(1)
				if !keeps {
					_ = c.Close()
					c = nil
				}
			}
		})
	}
	const generations = 30
	for g := range int64(generations) {
		end := serve()
		for calls.Load() < (g+1)*50 && ctx.Err() == nil && !t.Failed() {
			time.Sleep(time.Millisecond)
		}
		end()
	}
	close(stop)
	end := serve() // the last calls wait in the queue
	clients.Wait()
	end()
	count.mu.Lock()
	defer count.mu.Unlock()
	if int64(len(count.got)) != calls.Load() {
		t.Errorf("%d events were told, of %d", len(count.got), calls.Load())
	}
	for topic, n := range count.got {
		if n != 1 {
			t.Errorf("event %s was told %d times", topic, n)
		}
	}
	t.Logf("%d calls, %d made again, %d servers", calls.Load(), again.Load(), generations)
}

// TestFrames: frames are counted wherever the stream is cut.
func TestFrames(t *testing.T) {
	frame := func(n byte) []byte { return append([]byte{0, 0, 0, n, 0, 0, 0, 1, 1, 0}, make([]byte, n)...) }
	var stream []byte
	for _, n := range []byte{0, 1, 200, 0, 0, 33} {
		stream = append(stream, frame(n)...)
	}
	for size := 1; size <= len(stream); size++ {
		var f frames
		whole := 0
		for rest := stream; len(rest) > 0; rest = rest[min(size, len(rest)):] {
			whole += f.count(rest[:min(size, len(rest))])
		}
		if whole != 6 {
			t.Errorf("in pieces of %d: %d", size, whole)
		}
	}
}
