package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/managerd/managerd/manager/config"
)

// generation is a daemon without parts, but for the health of the API, that serves what comes through a door.
func generation(t *testing.T, cfg *config.Config, door *gate) (stop func()) {
	t.Helper()
	s := &Server{cfg: cfg, log: slog.New(slog.DiscardHandler), calls: newCalls(), health: health.NewServer()}
	s.grpc = newGRPC(cfg, s.calls, s.log)
	grpc_health_v1.RegisterHealthServer(s.grpc, s.health)
	var err error
	if s.ttrpc, err = ttrpc.NewServer(); err != nil {
		t.Fatal(err)
	}
	silent, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "t"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	drained := newDrain(silent)
	hatch := newGate(drained, greetingTTRPC)
	go func() { _ = s.ttrpc.Serve(context.Background(), hatch) }() // stop waits for its end
	served := make(chan error, 1)
	go func() { served <- s.grpc.Serve(door) }()
	return func() {
		s.stop(door, hatch, drained)
		if err := <-served; err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	}
}

// TestGate: of clients that call all the time, on a connection of their own for each call or on one that they keep, none
// sees that the daemon is replaced, again and again, behind a socket that stays.
func TestGate(t *testing.T) {
	cfg := settings(t)
	path := filepath.Join(filepath.Dir(cfg.Root), "s")
	held, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}) // as the service manager does
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = held.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	dial := func() *grpc.ClientConn {
		conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Error(err)
		}
		return conn
	}
	check := func(conn *grpc.ClientConn) error {
		_, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		return err
	}
	kept := dial()
	defer func() { _ = kept.Close() }()
	stop := make(chan struct{})
	var clients sync.WaitGroup
	var calls atomic.Int64
	for i := range 8 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				conn := kept
				if i > 0 {
					conn = dial()
				}
				if err := check(conn); err != nil {
					t.Errorf("call %d, kept connection %v: %v", calls.Load(), i == 0, err)
					return
				}
				calls.Add(1)
				if i > 0 {
					_ = conn.Close()
				}
			}
		})
	}
	const generations = 30
	for g := range int64(generations) {
		f, err := held.File()
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.FileListener(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		end := generation(t, cfg, newGate(l, greetingHTTP2))
		for calls.Load() < (g+1)*50 && ctx.Err() == nil && !t.Failed() {
			time.Sleep(time.Millisecond)
		}
		end()
	}
	close(stop)
	end := generation(t, cfg, newGate(held, greetingHTTP2)) // the last calls wait in the queue
	clients.Wait()
	end()
	t.Logf("%d calls, %d daemons", calls.Load(), generations)
}

// TestSilentClient: one that connects and says nothing, or stops in the middle of its greeting, keeps no daemon from ending.
func TestSilentClient(t *testing.T) {
	cfg := settings(t)
	r := run(t, cfg, nil)
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	var silent []net.Conn
	for _, said := range []string{"", "PRI", preface, preface + "\x00\x00", preface + "\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04"} {
		c, err := net.Dial("unix", cfg.GRPC.Address)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		if _, err := c.Write([]byte(said)); err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
	}
	if _, err := grpc_health_v1.NewHealthClient(r).Check(context.Background(), &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Error(err)
	}
	if err := r.stop(); err != nil { // fails after 30 s
		t.Error(err)
	}
	for i, c := range silent {
		err := c.SetReadDeadline(time.Now().Add(30 * time.Second))
		for err == nil { // what the daemon had to say, then the end
			_, err = c.Read(make([]byte, 100))
		}
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			t.Errorf("connection %d is left open", i)
		}
	}
}
