package remote_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/manager/archive/remote"
)

// store is a content service that keeps one write.
type store struct {
	api.UnimplementedContentServer
	data    bytes.Buffer
	fail    int           // the write that fails; 0: none
	forgets int           // that of which it says that it has not got it; 0: none
	hold    chan struct{} // no write is answered before it is closed
	kept    digest.Digest
}

func (s *store) Write(stream api.Content_WriteServer) error {
	for n := 0; ; n++ {
		r, err := stream.Recv()
		if err != nil {
			return nil
		}
		if n == s.fail && n > 0 {
			return status.Error(codes.ResourceExhausted, "no room")
		}
		s.data.Write(r.Data)
		if r.Action == api.WriteAction_WRITE {
			<-s.hold
		}
		answer := &api.WriteContentResponse{Action: r.Action, Offset: int64(s.data.Len())}
		if n == s.forgets && n > 0 {
			answer.Offset--
		}
		if r.Action == api.WriteAction_COMMIT {
			if int(r.Offset) != s.data.Len() {
				return status.Error(codes.OutOfRange, "not at its end")
			}
			s.kept = digest.FromBytes(s.data.Bytes())
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
	}
}

func (s *store) Abort(context.Context, *api.AbortRequest) (*emptypb.Empty, error) {
	return nil, status.Error(codes.NotFound, "no such write")
}

func serve(t *testing.T, s *store) remote.Content {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	api.RegisterContentServer(server, s)
	go func() { _ = server.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
	})
	return remote.NewContent(conn)
}

// TestWriteAhead: writes do not wait for their answers, and what is wrong is told before the commit is.
func TestWriteAhead(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	open := make(chan struct{})
	close(open)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<14) // a quarter of a message
	for _, c := range []struct {
		name string
		s    *store
		err  func(error) bool
	}{
		{"all is well", &store{}, func(err error) bool { return err == nil }},
		{"the last of them fails", &store{fail: 8}, errdefs.IsResourceExhausted},
		{"one in the middle fails", &store{fail: 3}, errdefs.IsResourceExhausted},
		{"one is not kept", &store{forgets: 2}, func(err error) bool { return errors.Is(err, io.ErrShortWrite) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.s.hold = open
			w, err := serve(t, c.s).Create(ctx, "r")
			if err != nil {
				t.Fatal(err)
			}
			for i := 0; i < 8 && err == nil; i++ {
				_, err = w.Write(data)
			}
			whole := digest.FromBytes(bytes.Repeat(data, 8))
			if err == nil && w.Digest() != whole {
				t.Errorf("its digest is %s", w.Digest())
			}
			if err == nil {
				err = w.Commit(ctx, int64(8*len(data)), w.Digest(), nil)
			}
			if cerr := w.Close(); !c.err(err) || cerr != nil || err == nil && c.s.kept != whole {
				t.Errorf("%v, %v, kept is %q", err, cerr, c.s.kept)
			}
		})
	}
	s := &store{hold: make(chan struct{})}
	w, err := serve(t, s).Create(ctx, "r")
	if err != nil {
		t.Fatal(err)
	}
	for range 3 { // none of them is answered
		if _, err := io.WriteString(w, "a little"); err != nil {
			t.Fatal(err)
		}
	}
	close(s.hold)
	if err := errors.Join(w.Commit(ctx, 0, "", nil), w.Close()); err != nil || s.kept == "" {
		t.Error(err)
	}
}
