package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/manager/config"
	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/namespaces"
)

// settings are those of a daemon below a new directory.
func settings(t *testing.T) *config.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "server-") // short: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	cfg := config.Default()
	cfg.Root, cfg.State, cfg.GRPC.Address = filepath.Join(dir, "root"), filepath.Join(dir, "state"), filepath.Join(dir, "run", "m.sock")
	if cfg.Task.Shim, err = os.Executable(); err != nil { // never started
		t.Fatal(err)
	}
	return cfg
}

// buffer is a log that can be read meanwhile.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) { b.mu.Lock(); defer b.mu.Unlock(); return b.b.Write(p) }
func (b *buffer) String() string              { b.mu.Lock(); defer b.mu.Unlock(); return b.b.String() }

func logger(b *buffer) *slog.Logger { return slog.New(slog.NewTextHandler(b, nil)) }

// running is a daemon that serves until it is stopped.
type running struct {
	*grpc.ClientConn
	stop func() error // as SIGTERM does
	log  *buffer
}

func run(t *testing.T, cfg *config.Config, before func(*Server)) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	log := &buffer{}
	s, err := New(ctx, cfg, logger(log))
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	if before != nil {
		before(s)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop := sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return errors.Join(err, s.Close())
		case <-time.After(30 * time.Second):
			return errors.New("it does not stop")
		}
	})
	conn, err := grpc.NewClient("unix://"+cfg.GRPC.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		if err := stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	hctx, hcancel := context.WithTimeout(ctx, 20*time.Second)
	defer hcancel()
	if _, err := grpc_health_v1.NewHealthClient(conn).Check(hctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	return &running{conn, stop, log}
}

// plugins gives what does not work, by full name.
func (r *running) plugins(t *testing.T) (failed map[string]string, all int) {
	t.Helper()
	resp, err := introspectionapi.NewIntrospectionClient(r).Plugins(context.Background(), &introspectionapi.PluginsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	failed = map[string]string{}
	for _, p := range resp.Plugins {
		if p.InitErr != nil && !strings.HasSuffix(p.InitErr.Message, "skip plugin") {
			failed[p.Type+"."+p.ID] = p.InitErr.Message
		}
	}
	return failed, len(resp.Plugins)
}

func TestServes(t *testing.T) {
	cfg := settings(t)
	cfg.GRPC.GID, cfg.TTRPC.UID = 12, 34
	r := run(t, cfg, nil)
	if failed, all := r.plugins(t); len(failed) != 0 || all < 15 {
		t.Errorf("%d plugins, of which do not work: %v", all, failed)
	}
	uuid := func(r *running) string {
		s, err := introspectionapi.NewIntrospectionClient(r).Server(context.Background(), &emptypb.Empty{})
		if err != nil {
			t.Fatal(err)
		}
		return s.UUID
	}
	first := uuid(r)
	for path, owner := range map[string]string{cfg.GRPC.Address: "0:12", cfg.GRPC.Address + ".ttrpc": "34:0"} {
		fi, err := os.Stat(path)
		if err != nil || fi.Mode().Type() != os.ModeSocket || fi.Mode().Perm() != 0o660 || ownerOf(fi) != owner {
			t.Errorf("%s: %v of %s, %v", path, fi.Mode(), ownerOf(fi), err)
		}
	}
	// A second one with this root, and one with this state: refused, by a sentence that says who is there.
	ended, cancel := context.WithCancel(context.Background())
	cancel() // it does not wait for the other to end
	for _, change := range []func(*config.Config){func(c *config.Config) { c.State += "2" }, func(c *config.Config) { c.Root += "2" }} {
		other := *cfg
		change(&other)
		_, err := New(ended, &other, logger(&buffer{}))
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), fmt.Sprintf("in use by another managerd (pid %d)", os.Getpid())) {
			t.Errorf("%v", err)
		}
	}
	// One that has only the address in common fails when it comes to listen, and takes nothing away.
	apart := settings(t)
	apart.GRPC.Address = cfg.GRPC.Address
	apart.TTRPC.Address = filepath.Join(apart.State, "t.sock")
	s, err := New(context.Background(), apart, logger(&buffer{}))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(context.Background()); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), cfg.GRPC.Address) {
		t.Errorf("%v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if uuid(r) != first {
		t.Error("another daemon answers")
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(cfg.GRPC.Address); err != nil { // clients that come now wait instead of failing
		t.Errorf("the socket is gone: %v", err)
	}
	if again := uuid(run(t, cfg, nil)); again != first {
		t.Errorf("%s was %s", again, first)
	}
}

func ownerOf(fi os.FileInfo) string {
	st := stat(fi)
	return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
}

// TestPartFails: the store of content cannot be opened. What needs it is left out and says why; the rest serves.
func TestPartFails(t *testing.T) {
	cfg := settings(t)
	if err := os.MkdirAll(cfg.Root, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cfg.Root, content.Dir), []byte("in the way"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.DisabledPlugins = []string{"io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.native"}
	r := run(t, cfg, nil)
	failed, _ := r.plugins(t)
	for name, says := range map[string]string{
		"io.containerd.content.v1.content": "not a directory", "io.containerd.differ.v1.walking": "requires io.containerd.content.v1",
		"io.containerd.grpc.v1.content": "requires io.containerd.content.v1", "io.containerd.grpc.v1.diff": "requires io.containerd.differ.v1",
		"io.containerd.transfer.v1.local": "requires io.containerd.content.v1", "io.containerd.grpc.v1.transfer": "requires io.containerd.transfer.v1",
	} {
		if !strings.Contains(failed[name], says) {
			t.Errorf("%s: %q", name, failed[name])
		}
	}
	if len(failed) != 6 {
		t.Errorf("%v", failed)
	}
	ctx := namespaces.With(context.Background(), "one")
	if _, err := imagesapi.NewImagesClient(r).List(ctx, &imagesapi.ListImagesRequest{}); err != nil {
		t.Error(err)
	}
	if log := r.log.String(); !strings.Contains(log, "io.containerd.content.v1.content") || !strings.Contains(log, "io.containerd.grpc.v1.cri") {
		t.Errorf("the log says nothing:\n%s", log)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	for says, change := range map[string]func(c *config.Config){
		"required plugin io.containerd.content.v1.content does not work":   func(c *config.Config) { c.RequiredPlugins = []string{"io.containerd.content.v1.content"} },
		"required plugin io.containerd.snapshotter.v1.native does not wor": func(c *config.Config) { c.RequiredPlugins = []string{"io.containerd.snapshotter.v1.native"} },
		"required plugin own does not exist":                               func(c *config.Config) { c.RequiredPlugins = []string{"own"} },
		"io.containerd.metadata.v1.bolt cannot be disabled":                func(c *config.Config) { c.DisabledPlugins = []string{"io.containerd.metadata.v1.bolt"} },
		"root and state are both":                                          func(c *config.Config) { c.State = c.Root + "/" },
		"must be an absolute path":                                         func(c *config.Config) { c.Root = "x" },
	} {
		c := *cfg
		change(&c)
		if s, err := New(context.Background(), &c, logger(&buffer{})); err == nil || s == nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", says, err)
		}
	}
	if err := guarded(func() error { panic("oh") }); !errdefs.IsInternal(err) || !strings.Contains(err.Error(), "oh") {
		t.Errorf("%v", err)
	}
}

// TestDamagedDatabase: the daemon starts, and says to everybody who asks that the database is another one.
func TestDamagedDatabase(t *testing.T) {
	cfg := settings(t)
	if err := os.MkdirAll(cfg.Root, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(cfg.Root, MetadataFile)
	broken := bytes.Repeat([]byte("x"), 100000)
	if err := os.WriteFile(path, broken, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // also after the next start
		r := run(t, cfg, nil)
		aside, err := filepath.Glob(path + ".damaged-*")
		if err != nil || len(aside) != 1 {
			t.Fatalf("%v, %v", aside, err)
		}
		if data, err := os.ReadFile(aside[0]); err != nil || !bytes.Equal(data, broken) {
			t.Errorf("%d bytes, %v", len(data), err)
		}
		resp, err := introspectionapi.NewIntrospectionClient(r).Plugins(context.Background(), &introspectionapi.PluginsRequest{Filters: []string{"id==bolt"}})
		if err != nil || len(resp.Plugins) != 1 {
			t.Fatalf("%v, %v", resp, err)
		}
		if p := resp.Plugins[0]; p.InitErr != nil || !strings.Contains(p.Exports["warning"], aside[0]) {
			t.Errorf("%v", p)
		}
		if log := r.log.String(); !strings.Contains(log, "damaged") || !strings.Contains(log, aside[0]) {
			t.Errorf("the log says nothing:\n%s", log)
		}
		for service, want := range map[string]grpc_health_v1.HealthCheckResponse_ServingStatus{
			"": grpc_health_v1.HealthCheckResponse_SERVING, "metadata": grpc_health_v1.HealthCheckResponse_NOT_SERVING,
		} {
			h, err := grpc_health_v1.NewHealthClient(r).Check(context.Background(), &grpc_health_v1.HealthCheckRequest{Service: service})
			if err != nil || h.Status != want {
				t.Errorf("health of %q: %v, %v", service, h, err)
			}
		}
		if err := r.stop(); err != nil {
			t.Fatal(err)
		}
	}
}

// slow is a service with one method that answers when it is told to, and one that panics.
func slow(s *Server, began chan<- struct{}, end <-chan struct{}) {
	method := func(name string, fn func() error) grpc.MethodDesc {
		return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, dec func(any) error, i grpc.UnaryServerInterceptor) (any, error) {
			if err := dec(&emptypb.Empty{}); err != nil {
				return nil, err
			}
			return i(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/test/" + name}, func(context.Context, any) (any, error) { return &emptypb.Empty{}, fn() })
		}}
	}
	s.grpc.RegisterService(&grpc.ServiceDesc{ServiceName: "test", HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{
		method("Slow", func() error { began <- struct{}{}; <-end; return nil }),
		method("Panic", func() error { panic("oh no") }),
	}}, struct{}{})
}

// TestStop: a call under way when the daemon is told to stop is answered; a stream, which would last for ever, is not
// waited for; the daemon has ended soon after.
func TestStop(t *testing.T) {
	began, end := make(chan struct{}, 1), make(chan struct{})
	r := run(t, settings(t), func(s *Server) { slow(s, began, end) })
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err := r.Invoke(ctx, "/test/Panic", &emptypb.Empty{}, &emptypb.Empty{})
	if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "oh no") || !strings.Contains(r.log.String(), "server_test.go") {
		t.Errorf("%v", err)
	}
	sub, err := eventsapi.NewEventsClient(r).Subscribe(ctx, &eventsapi.SubscribeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	answer := make(chan error, 1)
	go func() { answer <- r.Invoke(ctx, "/test/Slow", &emptypb.Empty{}, &emptypb.Empty{}) }()
	<-began
	stopped := make(chan error, 1)
	begin := time.Now()
	go func() { stopped <- r.stop() }()
	select {
	case err := <-stopped:
		t.Fatalf("it stopped under a call: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(end)
	if err := <-answer; err != nil {
		t.Errorf("the call under way: %v", err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > draining {
		t.Errorf("it took %s to stop", took)
	}
	if _, err := sub.Recv(); err == nil {
		t.Error("the stream goes on")
	}
}

func TestListen(t *testing.T) {
	dir := filepath.Dir(settings(t).Root)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, says := range map[string]string{file: "no socket", "relative": "not an absolute path", filepath.Join(file, "x"): "not a directory"} {
		if l, err := listen(path, 0, 0); err == nil || l != nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "precious" {
		t.Errorf("%q, %v", data, err)
	}
	// As long as an address may be, made anew over a stale one; nothing else is left beside it.
	long := filepath.Join(dir, strings.Repeat("s", 106-len(dir)))
	for range 2 {
		l, err := listen(long, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("unix", long)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := listen(long, 0, 0); !errdefs.IsUnavailable(err) {
			t.Errorf("somebody serves it: %v", err)
		}
		if err := errors.Join(c.Close(), l.Close()); err != nil {
			t.Error(err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("%v, %v", entries, err)
	}
}

func stat(fi os.FileInfo) *syscall.Stat_t { return fi.Sys().(*syscall.Stat_t) }
