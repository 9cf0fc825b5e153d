package proxy_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/api"
	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/content/proxy"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
)

type silent struct{}

func (silent) Publish(context.Context, string, proto.Message) error { return nil }

// there is the other program: a store behind a socket, which can be stopped and started.
type there struct {
	dir    string
	socket string

	mu    sync.Mutex // of what follows, while it is started and stopped
	db    *metadata.DB
	srv   *grpc.Server
	ended chan error
	*content.Store

	hung     atomic.Pointer[chan struct{}] // closed when it answers again
	forget   bool                          // it keeps no labels
	breakOff atomic.Int64                  // after how many writes it is ended, once
	calls    atomic.Int64
}

func newThere(t *testing.T) *there {
	t.Helper()
	dir := t.TempDir()
	p := &there{dir: dir, socket: filepath.Join(dir, "s")}
	if err := p.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.stop)
	return p
}

func (p *there) start() (err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.db, err = metadata.Open(filepath.Join(p.dir, "db")); err != nil {
		return err
	}
	if p.Store, err = content.New(p.dir, content.Shared, p.db, silent{}); err != nil {
		return err
	}
	l, err := net.Listen("unix", p.socket)
	if err != nil {
		return err
	}
	p.srv = grpc.NewServer(grpc.WaitForHandlers(true),
		grpc.UnaryInterceptor(func(ctx context.Context, r any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			p.wait(ctx)
			return next(ctx, r)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			p.wait(ss.Context())
			return next(srv, faulty{ss, p})
		}))
	api.NewContent(p.Store).Register(p.srv)
	p.ended = make(chan error, 1)
	go func(srv *grpc.Server) { p.ended <- srv.Serve(l) }(p.srv)
	return nil
}

func (p *there) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.srv == nil {
		return
	}
	p.srv.Stop()
	<-p.ended
	_ = p.db.Close()
	p.srv = nil
}

func (p *there) wait(ctx context.Context) {
	p.calls.Add(1)
	if h := p.hung.Load(); h != nil {
		select {
		case <-*h:
		case <-ctx.Done():
		}
	}
}

// faulty ends the program when a write is answered, before its client has the answer.
type faulty struct {
	grpc.ServerStream
	p *there
}

func (f faulty) RecvMsg(m any) error {
	err := f.ServerStream.RecvMsg(m)
	if w, ok := m.(*contentapi.WriteContentRequest); ok && f.p.forget {
		w.Labels = nil
	}
	return err
}

func (f faulty) SendMsg(m any) error {
	if w, ok := m.(*contentapi.WriteContentResponse); ok && w.Action != contentapi.WriteAction_STAT && f.p.breakOff.Load() > 0 && f.p.breakOff.Add(-1) == 0 {
		go func() {
			f.p.stop()
			if err := f.p.start(); err != nil {
				panic(err)
			}
		}()
		<-f.Context().Done()
		return f.Context().Err()
	}
	return f.ServerStream.SendMsg(m)
}

// here is a store of the daemon, whose bytes are there.
type here struct {
	ctx context.Context
	*content.Store
	b *proxy.Backend
}

func newHere(t *testing.T, p *there, policy string, o proxy.Options) *here {
	t.Helper()
	o.Name, o.Address, o.Owner = "outside", p.socket, "me"
	b, err := proxy.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	db, err := metadata.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	s, err := content.NewRemote(b, policy, db, silent{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(namespaces.With(context.Background(), "one"), 2*time.Minute)
	t.Cleanup(cancel)
	return &here{ctx, s, b}
}

// add writes a blob in pieces.
func (h *here) add(ctx context.Context, data []byte) (digest.Digest, error) {
	d := digest.FromBytes(data)
	w, err := h.Writer(ctx, "ref-"+d.Encoded(), d, int64(len(data)))
	if err != nil {
		return d, err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{bytes.NewReader(data)}, make([]byte, 100<<10))
	if err == nil {
		err = w.Commit(ctx, int64(len(data)), d, map[string]string{"k": "v"})
	}
	return d, errors.Join(err, w.Close())
}

func (h *here) read(ctx context.Context, d digest.Digest) ([]byte, error) {
	r, err := h.ReaderAt(ctx, d)
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.Close() }()
	return io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
}

func noise(n int) []byte {
	out := make([]byte, n)
	for i := range out {
		out[i] = byte(i*7 ^ i>>8 ^ i>>16)
	}
	return out
}

// stored says what the program stores of a blob: its labels; nil for none.
func (p *there) stored(d digest.Digest) map[string]string {
	i, err := p.Info(namespaces.With(context.Background(), "default"), d)
	if err != nil {
		return nil
	}
	if i.Labels == nil {
		i.Labels = map[string]string{}
	}
	return i.Labels
}
