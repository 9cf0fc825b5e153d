package shimapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	shim "github.com/managerd/managerd/protos/shim/v1"
)

// stub is a shim that answers State with an error, and never answers Wait.
type stub struct {
	TaskService
	err error
}

func (s *stub) State(_ context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	if s.err != nil {
		return nil, s.err
	}
	return &task.StateResponse{ID: r.ID, Pid: 7}, nil
}

func (s *stub) Wait(ctx context.Context, _ *task.WaitRequest) (*task.WaitResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (s *stub) Shutdown(context.Context, *task.ShutdownRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// serveStub gives the address of a running stub, and ends it with the test.
func serveStub(t *testing.T, s *stub) (string, *breaker) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	u, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	l := &breaker{Listener: u}
	srv, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	RegisterTask(srv, s)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = srv.Serve(context.Background(), l) // ends with Close
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		l.crash()
		<-served
	})
	return "unix://" + path, l
}

// breaker ends connections as the death of a process does: ttrpc's server lets those go on that have a call under way.
type breaker struct {
	net.Listener
	mu    sync.Mutex
	conns []net.Conn
}

func (b *breaker) Accept() (net.Conn, error) {
	c, err := b.Listener.Accept()
	if err == nil {
		b.mu.Lock()
		b.conns = append(b.conns, c)
		b.mu.Unlock()
	}
	return c, err
}

func (b *breaker) crash() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.conns {
		_ = c.Close()
	}
}

func dialStub(t *testing.T, address string, version int) *Client {
	t.Helper()
	c, err := Dial(context.Background(), BootstrapParams{Version: version, Address: address})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestClientVersions(t *testing.T) {
	address, _ := serveStub(t, &stub{})
	for _, version := range []int{2, 3} {
		resp, err := dialStub(t, address, version).State(context.Background(), &task.StateRequest{ID: "c"})
		if err != nil || resp.ID != "c" || resp.Pid != 7 {
			t.Errorf("version %d: %v, %v", version, resp, err)
		}
	}
	_, err := dialStub(t, address, 3).Shim().Describe(context.Background(), &shim.DescribeRequest{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("describe of a foreign shim: %v", err)
	}
}

// TestDialFails: nobody there is told apart from nobody listening, and neither takes time.
func TestDialFails(t *testing.T) {
	dir := t.TempDir()
	_, err := Dial(context.Background(), BootstrapParams{Version: 3, Address: "unix://" + filepath.Join(dir, "none")})
	if !errors.Is(err, unix.ENOENT) {
		t.Errorf("no socket: %v", err)
	}
	l, err := Listen(filepath.Join(dir, "stale"))
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	_, err = Dial(context.Background(), BootstrapParams{Version: 3, Address: "unix://" + filepath.Join(dir, "stale")})
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("no process: %v", err)
	}
}

// TestGone: both ends of a connection end the calls under way, as unavailable.
func TestGone(t *testing.T) {
	for name, end := range map[string]func(*Client, *breaker){
		"client": func(c *Client, _ *breaker) { _ = c.Close() },
		"shim":   func(_ *Client, b *breaker) { b.crash() },
	} {
		address, shim := serveStub(t, &stub{})
		c := dialStub(t, address, 3)
		waited := make(chan error, 1)
		go func() {
			_, err := c.Wait(context.Background(), &task.WaitRequest{ID: "c"})
			waited <- err
		}()
		if _, err := c.State(context.Background(), &task.StateRequest{ID: "c"}); err != nil {
			t.Fatal(err)
		}
		end(c, shim)
		select {
		case err := <-waited:
			if !errdefs.IsUnavailable(err) {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: the call hangs", name)
		}
		<-c.Gone()
		if _, err := c.State(context.Background(), &task.StateRequest{ID: "c"}); !errdefs.IsUnavailable(err) {
			t.Errorf("%s: a call afterwards: %v", name, err)
		}
	}
}

// TestErrors sends every sentinel over a real connection: it arrives as itself, with its sentence.
func TestErrors(t *testing.T) {
	s := &stub{}
	address, _ := serveStub(t, s)
	c := dialStub(t, address, 3)
	for _, e := range []struct {
		sentinel error
		code     codes.Code
	}{
		{errdefs.ErrUnknown, codes.Unknown},
		{errdefs.ErrInvalidArgument, codes.InvalidArgument},
		{errdefs.ErrNotFound, codes.NotFound},
		{errdefs.ErrAlreadyExists, codes.AlreadyExists},
		{errdefs.ErrPermissionDenied, codes.PermissionDenied},
		{errdefs.ErrResourceExhausted, codes.ResourceExhausted},
		{errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
		{errdefs.ErrConflict, codes.FailedPrecondition},
		{errdefs.ErrNotModified, codes.FailedPrecondition},
		{errdefs.ErrAborted, codes.Aborted},
		{errdefs.ErrOutOfRange, codes.OutOfRange},
		{errdefs.ErrNotImplemented, codes.Unimplemented},
		{errdefs.ErrInternal, codes.Internal},
		{errdefs.ErrUnavailable, codes.Unavailable},
		{errdefs.ErrDataLoss, codes.DataLoss},
		{errdefs.ErrUnauthenticated, codes.Unauthenticated},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{context.Canceled, codes.Canceled},
	} {
		s.err = fmt.Errorf("cannot do it to c: %w", e.sentinel)
		if got := status.Code(ToWire(s.err)); got != e.code {
			t.Errorf("%v goes out as %s, want %s", e.sentinel, got, e.code)
		}
		_, err := c.State(context.Background(), &task.StateRequest{ID: "c"})
		if !errors.Is(err, e.sentinel) {
			t.Errorf("%v arrives as %v", e.sentinel, err)
		}
		if want := "cannot do it to c: " + e.sentinel.Error(); err == nil || err.Error() != want {
			t.Errorf("%v arrives saying %q, want %q", e.sentinel, err, want)
		}
	}
	// A cause in front of the sentinel stays readable; an error without one is unknown, not lost.
	s.err = fmt.Errorf("cannot open it: %w: %w", os.ErrPermission, errdefs.ErrInvalidArgument)
	if _, err := c.State(context.Background(), &task.StateRequest{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	s.err = errors.New("something")
	if _, err := c.State(context.Background(), &task.StateRequest{}); !errdefs.IsUnknown(err) || err.Error() != "something" {
		t.Errorf("%v", err)
	}
	if ToWire(nil) != nil || FromWire(nil) != nil {
		t.Error("nil is an error")
	}
}

// TestDeadline: the caller's own deadline is not taken for an answer of the shim.
func TestDeadline(t *testing.T) {
	address, _ := serveStub(t, &stub{})
	c := dialStub(t, address, 3)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Wait(ctx, &task.WaitRequest{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}
