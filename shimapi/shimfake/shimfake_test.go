package shimfake

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"

	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

func fake(t *testing.T, args string) (*Shim, func() *shimapi.Client) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, shimapi.ConfigFile), []byte(`{"process":{"args":`+args+`}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := shimapi.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Namespace: "ns", ID: "c1", Bundle: dir}, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	return s, func() *shimapi.Client {
		c, err := shimapi.Dial(context.Background(), shimapi.BootstrapParams{Version: 3, Address: "unix://" + path})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
}

func TestLife(t *testing.T) {
	ctx := context.Background()
	s, dial := fake(t, `["exit","7"]`)
	c := dial()
	if _, err := c.State(ctx, &task.StateRequest{ID: "c1"}); !errdefs.IsNotFound(err) {
		t.Errorf("state before create: %v", err)
	}
	if _, err := c.Create(ctx, &task.CreateTaskRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Create(ctx, &task.CreateTaskRequest{ID: "c1"}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second create: %v", err)
	}
	if _, err := c.Start(ctx, &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	if w, err := c.Wait(ctx, &task.WaitRequest{ID: "c1"}); err != nil || w.ExitStatus != 7 {
		t.Errorf("wait: %v, %v", w, err)
	}
	if st, err := c.State(ctx, &task.StateRequest{ID: "c1"}); err != nil || st.Status != tasktypes.Status_STOPPED || st.ExitStatus != 7 {
		t.Errorf("state: %v, %v", st, err)
	}
	if _, err := c.Delete(ctx, &task.DeleteRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	stream, err := c.Shim().Events(ctx, &shim.EventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Shutdown(ctx, &task.ShutdownRequest{}); err != nil {
		t.Fatal(err)
	}
	var topics []string
	for {
		e, err := stream.Recv()
		if err != nil {
			break
		}
		topics = append(topics, e.Topic)
	}
	if want := []string{"/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"}; len(topics) != len(want) || topics[3] != want[3] {
		t.Errorf("events: %v", topics)
	}
	if s.Calls("Create") != 2 || s.Calls("Pause") != 0 {
		t.Errorf("calls: %v", s.calls)
	}
}

func TestFaults(t *testing.T) {
	ctx := context.Background()
	s, dial := fake(t, `["run"]`)
	c := dial()
	create := &task.CreateTaskRequest{ID: "c1"}

	s.SetFaults(Faults{"Create": {Times: 1, Code: codes.ResourceExhausted, Message: "no more"}})
	if _, err := c.Create(ctx, create); !errdefs.IsResourceExhausted(err) {
		t.Errorf("error: %v", err)
	}
	s.SetFaults(Faults{"Create": {Hang: true}})
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := c.Create(short, create); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hang: %v", err)
	}
	s.SetFaults(Faults{"Create": {Times: 1, After: true, Drop: true}})
	if _, err := c.Create(ctx, create); !errdefs.IsUnavailable(err) {
		t.Errorf("drop: %v", err)
	}
	<-c.Gone()
	c = dial()
	if _, err := c.Start(ctx, &task.StartRequest{ID: "c1"}); err != nil {
		t.Errorf("the dropped create has done its work: %v", err)
	}
	s.SetFaults(Faults{"State": {Delay: 30 * time.Millisecond}})
	begin := time.Now()
	if _, err := c.State(ctx, &task.StateRequest{ID: "c1"}); err != nil || time.Since(begin) < 30*time.Millisecond {
		t.Errorf("delay: %v after %v", err, time.Since(begin))
	}
	s.SetFaults(Faults{"Kill": {Crash: true}})
	if _, err := c.Kill(ctx, &task.KillRequest{ID: "c1", Signal: 9}); !errdefs.IsUnavailable(err) {
		t.Errorf("crash: %v", err)
	}
	<-c.Gone()
}
