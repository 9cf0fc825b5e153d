package boot

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	events "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// taken are the events that a foreign daemon was sent.
type taken struct {
	mu     sync.Mutex
	topics []string
}

func (t *taken) Forward(_ context.Context, r *events.ForwardRequest) (*emptypb.Empty, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.topics = append(t.topics, strings.TrimPrefix(r.Envelope.Topic, "/tasks/"))
	return &emptypb.Empty{}, nil
}

func (t *taken) list() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.topics)
}

// TestUpgradeForwards: a foreign daemon is sent every event once, across upgrades.
func TestUpgradeForwards(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	b := newBundle(t, "forwards", "sleep", "1000")
	l, err := shimapi.Listen(filepath.Join(filepath.Dir(b.dir), "events"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	got := &taken{}
	events.RegisterTTRPCEventsService(server, got)
	go func() { _ = server.Serve(ctx, l) }()
	defer func() { _ = server.Close() }()

	client, p := b.started(shimapi.EnvTTRPCAddress + "=" + filepath.Join(filepath.Dir(b.dir), "events"))
	if _, err := client.Create(ctx, &task.CreateTaskRequest{ID: b.id, Bundle: b.dir}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Start(ctx, &task.StartRequest{ID: b.id}); err != nil {
		t.Fatal(err)
	}
	want := []string{"create", "start"}
	for i := range 5 {
		if _, err := client.Shim().Upgrade(ctx, &shim.UpgradeRequest{}); err != nil {
			t.Fatal(shimapi.FromWire(err))
		}
		id := fmt.Sprint("e", i)
		spec := &anypb.Any{Value: []byte(`{"args":["sh","-c","exit 3"],"cwd":"/","env":["PATH=/bin"]}`)}
		if _, err := client.Exec(ctx, &task.ExecProcessRequest{ID: b.id, ExecID: id, Spec: spec}); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Start(ctx, &task.StartRequest{ID: b.id, ExecID: id}); err != nil {
			t.Fatal(err)
		}
		if w, err := client.Wait(ctx, &task.WaitRequest{ID: b.id, ExecID: id}); err != nil || w.ExitStatus != 3 {
			t.Errorf("wait: %v, %v", w, err)
		}
		want = append(want, "exec-added", "exec-started", "exit")
	}
	b.cleanup()
	gone(t, client, p)
	want = append(want, "exit", "delete")
	if topics := got.list(); !slices.Equal(topics, want) {
		t.Errorf("events %v, want %v", topics, want)
	}
}
