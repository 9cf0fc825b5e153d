package tasks

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/shimapi/shimfake"
)

func execOf(id, execID, spec string) *task.ExecProcessRequest {
	return &task.ExecProcessRequest{ID: id, ExecID: execID, Spec: &anypb.Any{Value: []byte(spec)}}
}

// TestUnknown: every request for a task that is not there says so.
func TestUnknown(t *testing.T) {
	w := fakes(t)
	for name, call := range requests(w, "none") {
		if err := call(in("ns")); !errdefs.IsNotFound(err) || err.Error() != "task none: not found" {
			t.Errorf("%s: %v", name, err)
		}
		if err := call(context.Background()); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s without a namespace: %v", name, err)
		}
	}
}

func requests(w *world, id string) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"start":  func(ctx context.Context) error { _, err := w.Start(ctx, id, ""); return err },
		"get":    func(ctx context.Context) error { _, err := w.Service.Get(ctx, id, ""); return err },
		"kill":   func(ctx context.Context) error { return w.Kill(ctx, id, "", 15, false) },
		"exec":   func(ctx context.Context) error { return w.Exec(ctx, execOf(id, "e", `{}`)) },
		"resize": func(ctx context.Context) error { return w.ResizePty(ctx, id, "", 1, 1) },
		"close":  func(ctx context.Context) error { return w.CloseIO(ctx, id, "", true) },
		"pause":  func(ctx context.Context) error { return w.Pause(ctx, id) },
		"resume": func(ctx context.Context) error { return w.Resume(ctx, id) },
		"pids":   func(ctx context.Context) error { _, err := w.Pids(ctx, id); return err },
		"update": func(ctx context.Context) error { return w.Update(ctx, id, nil, nil) },
		"save":   func(ctx context.Context) error { return w.Checkpoint(ctx, id, "", nil) },
		"wait":   func(ctx context.Context) error { _, _, err := w.Wait(ctx, id, ""); return err },
		"delete": func(ctx context.Context) error { _, err := w.Delete(ctx, id); return err },
		"rmexec": func(ctx context.Context) error { _, err := w.DeleteProcess(ctx, id, "e"); return err },
	}
}

// TestLife goes through every request of a task's life, and its events.
func TestLife(t *testing.T) {
	w := fakes(t)
	ctx := in("ns")
	r := w.record()
	w.run("c1", args("run"))
	if _, err := w.Start(ctx, "c1", ""); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second start: %v", err)
	}
	if _, err := w.Create(ctx, CreateRequest{ID: "c1"}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second create: %v", err)
	}
	if _, err := w.Delete(ctx, "c1"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a running one: %v", err)
	}
	if err := w.Pause(ctx, "c1"); err != nil {
		t.Error(err)
	}
	if st, err := w.Service.Get(ctx, "c1", ""); err != nil || st.Status != tasktypes.Status_PAUSED {
		t.Errorf("paused: %v, %v", st, err)
	}
	if err := w.Resume(ctx, "c1"); err != nil {
		t.Error(err)
	}
	if ps, err := w.Pids(ctx, "c1"); err != nil || len(ps) != 1 {
		t.Errorf("pids: %v, %v", ps, err)
	}
	if err := w.Checkpoint(ctx, "c1", filepath.Join(t.TempDir(), "images"), nil); err != nil {
		t.Errorf("checkpoint: %v", err)
	}
	if m, err := w.Metrics(ctx, filters.Always); err != nil || len(m) != 1 || m[0].ID != "c1" || m[0].Data == nil {
		t.Errorf("metrics: %v, %v", m, err)
	}
	for f, want := range map[string]int{"id==c1": 1, "id==c2": 0, "namespace==ns": 1, "id==c1,namespace==no": 0} {
		parsed, err := filters.Parse(f)
		if err != nil {
			t.Fatal(err)
		}
		if m, err := w.Metrics(ctx, parsed); err != nil || len(m) != want {
			t.Errorf("metrics of %s: %v, %v", f, m, err)
		}
	}
	if err := w.Exec(ctx, execOf("c1", "e1", `{"args":["exit","3"]}`)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Start(ctx, "c1", "e1"); err != nil {
		t.Fatal(err)
	}
	if status, _, err := w.Wait(ctx, "c1", "e1"); err != nil || status != 3 {
		t.Errorf("exec: %d, %v", status, err)
	}
	if d, err := w.DeleteProcess(ctx, "c1", "e1"); err != nil || d.ExitStatus != 3 {
		t.Errorf("delete of exec: %v, %v", d, err)
	}
	if _, err := w.DeleteProcess(ctx, "c1", ""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("delete of no exec: %v", err)
	}
	if err := w.Kill(ctx, "c1", "", 15, false); err != nil {
		t.Error(err)
	}
	for range 2 {
		if status, at, err := w.Wait(ctx, "c1", ""); err != nil || status != 143 || at == nil {
			t.Errorf("wait: %d, %v, %v", status, at, err)
		}
	}
	if m, err := w.Metrics(ctx, filters.Always); err != nil || len(m) != 0 {
		t.Errorf("metrics of an ended one: %v, %v", m, err)
	}
	if all, err := w.List(in("other")); err != nil || len(all) != 0 {
		t.Errorf("another namespace: %v, %v", all, err)
	}
	if d, err := w.Delete(ctx, "c1"); err != nil || d.ExitStatus != 143 || d.ExitedAt == nil {
		t.Errorf("delete: %v, %v", d, err)
	}
	r.await(t, "c1", "create", "start", "paused", "resumed", "checkpointed", "exec-added", "exec-started", "exit e1=3", "exit c1=143", "delete")
}

// TestWaiters: many wait for one process with one request to the shim, through a broken connection; whoever gives up
// takes nobody with him.
func TestWaiters(t *testing.T) {
	w := fakes(t)
	w.run("c1", args("run"))
	impatient, cancel := context.WithTimeout(in("ns"), 20*time.Millisecond)
	defer cancel()
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if i == 0 {
				if _, _, err := w.Wait(impatient, "c1", ""); !isDeadline(err) {
					t.Errorf("impatient: %v", err)
				}
				return
			}
			if status, _, err := w.Wait(in("ns"), "c1", ""); err != nil || status != 137 {
				t.Errorf("wait: %d, %v", status, err)
			}
		}()
	}
	<-impatient.Done()
	w.fault("c1", shimfake.Faults{"Pids": {Drop: true}})
	if _, err := w.Pids(in("ns"), "c1"); !errdefs.IsUnavailable(err) {
		t.Errorf("pids: %v", err)
	}
	eventually(t, "a new connection", func() bool { return w.Kill(in("ns"), "c1", "", 9, false) == nil })
	wg.Wait()
}

// TestWaitDeletedExec: who waits for an exec that is deleted before it was started is told.
func TestWaitDeletedExec(t *testing.T) {
	w := fakes(t)
	w.run("c1", args("run"))
	for range 2 {
		if err := w.Exec(in("ns"), execOf("c1", "e", `{"args":["run"]}`)); err != nil {
			t.Fatal(err)
		}
		waited := make(chan error)
		go func() {
			_, _, err := w.Wait(in("ns"), "c1", "e")
			waited <- err
		}()
		w.Service.mu.Lock()
		tk := w.tasks[key{"ns", "c1"}]
		w.Service.mu.Unlock()
		eventually(t, "a wait", func() bool { tk.mu.Lock(); defer tk.mu.Unlock(); return tk.waits["e"] != nil })
		if _, err := w.DeleteProcess(in("ns"), "c1", "e"); err != nil {
			t.Fatal(err)
		}
		if err := <-waited; !errdefs.IsNotFound(err) {
			t.Errorf("wait: %v", err)
		}
	}
}

// TestWedged: a shim that does not answer is shown as unknown within the second that is promised, takes nobody with it,
// and is not flooded.
func TestWedged(t *testing.T) {
	w := fakes(t)
	ctx := in("ns")
	for i := range 4 {
		w.run(fmt.Sprint("c", i), args("run"))
	}
	hang := shimfake.Fault{Hang: true}
	w.fault("c0", shimfake.Faults{"State": hang, "Stats": hang})
	w.fault("c1", shimfake.Faults{"State": {Code: codes.Internal}, "Stats": {Code: codes.Internal}})
	for round := range 2 {
		begin := time.Now()
		all, err := w.List(ctx)
		if err != nil || len(all) != 4 {
			t.Fatalf("list: %v, %v", all, err)
		}
		for i, want := range []tasktypes.Status{tasktypes.Status_UNKNOWN, tasktypes.Status_UNKNOWN, tasktypes.Status_RUNNING, tasktypes.Status_RUNNING} {
			if all[i].Status != want || all[i].ID != fmt.Sprint("c", i) {
				t.Errorf("round %d: %v", round, all[i])
			}
		}
		if m, err := w.Metrics(ctx, filters.Always); err != nil || len(m) != 2 {
			t.Errorf("metrics: %v, %v", m, err)
		}
		if took := time.Since(begin); took > 3*time.Second {
			t.Errorf("list and metrics took %v", took)
		}
	}
	if st, err := w.Service.Get(ctx, "c0", ""); err != nil || st.Status != tasktypes.Status_UNKNOWN || st.Bundle == "" {
		t.Errorf("get: %v, %v", st, err)
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := w.Service.Get(short, "c0", ""); !isDeadline(err) {
		t.Errorf("the client's own deadline: %v", err)
	}
	// What does not need an answer of State goes through.
	if err := w.Kill(ctx, "c0", "", 9, false); err != nil {
		t.Error(err)
	}
	if status, _, err := w.Wait(ctx, "c0", ""); err != nil || status != 137 {
		t.Errorf("wait: %d, %v", status, err)
	}
}

// TestLateAnswer: a shim that was slow once is asked again.
func TestLateAnswer(t *testing.T) {
	w := fakes(t)
	w.run("c1", args("run"))
	w.fault("c1", shimfake.Faults{"State": {Delay: answer + 200*time.Millisecond, Times: 1}})
	for _, want := range []tasktypes.Status{tasktypes.Status_UNKNOWN, tasktypes.Status_RUNNING} {
		if st, err := w.Service.Get(in("ns"), "c1", ""); err != nil || st.Status != want {
			t.Errorf("want %s: %v, %v", want, st, err)
		}
	}
}

// TestDelete: it converges, whatever goes wrong with it.
func TestDelete(t *testing.T) {
	for name, c := range map[string]struct {
		faults shimfake.Faults
		err    func(error) bool // of the first Delete; nil: it succeeds
	}{
		"well":                   {},
		"shim refuses once":      {faults: shimfake.Faults{"Delete": {Times: 1, Code: codes.Internal}}, err: errdefs.IsInternal},
		"shim crashes":           {faults: shimfake.Faults{"Delete": {Crash: true}}},
		"shim crashes late":      {faults: shimfake.Faults{"Delete": {Crash: true, After: true}}},
		"connection breaks":      {faults: shimfake.Faults{"Delete": {Drop: true, Times: 1}}},
		"connection breaks late": {faults: shimfake.Faults{"Delete": {Drop: true, After: true, Times: 1}}},
		"crash at shutdown":      {faults: shimfake.Faults{"Shutdown": {Crash: true}}},
		"crash after shutdown":   {faults: shimfake.Faults{"Shutdown": {Crash: true, After: true}}},
		"refuses to end":         {faults: shimfake.Faults{"Shutdown": {Code: codes.Internal}}},
		"hangs at the end":       {faults: shimfake.Faults{"Shutdown": {Hang: true}}},
	} {
		t.Run(name, func(t *testing.T) {
			w := fakes(t)
			r := w.record("topic==/tasks/exit", "topic==/tasks/delete")
			w.run("c1", args("exit", "5"))
			w.fault("c1", c.faults)
			d, err := w.Delete(in("ns"), "c1")
			if c.err != nil {
				if !c.err(err) {
					t.Errorf("first delete: %v", err)
				}
				d, err = w.Delete(in("ns"), "c1")
			}
			if err != nil || d.ExitStatus != 5 {
				t.Errorf("delete: %v, %v", d, err)
			}
			if _, err := w.Delete(in("ns"), "c1"); !errdefs.IsNotFound(err) {
				t.Errorf("second delete: %v", err)
			}
			w.clean()
			r.await(t, "c1", "exit c1=5", "delete")
			w.fault("c1", nil)
			w.run("c1", args("run")) // the name is free
		})
	}
}

// TestDeleteGivenUp: a client that does not wait leaves a deletion that goes on; whoever asks meanwhile waits for it.
func TestDeleteGivenUp(t *testing.T) {
	w := fakes(t)
	w.run("c1", args("exit", "5"))
	w.fault("c1", shimfake.Faults{"Delete": {Delay: 300 * time.Millisecond}})
	short, cancel := context.WithTimeout(in("ns"), 50*time.Millisecond)
	defer cancel()
	if _, err := w.Delete(short, "c1"); !isDeadline(err) {
		t.Errorf("given up: %v", err)
	}
	if _, err := w.Delete(in("ns"), "c1"); !errdefs.IsNotFound(err) {
		t.Errorf("second: %v", err)
	}
	w.clean()
}

// TestClosed: after Close requests fail, they do not hang, and shims live on.
func TestClosed(t *testing.T) {
	w := fakes(t)
	w.run("c1", args("run"))
	waited := make(chan error)
	go func() {
		_, _, err := w.Wait(in("ns"), "c1", "")
		waited <- err
	}()
	w.Close()
	if err := <-waited; err == nil {
		t.Error("the wait of a client succeeded")
	}
	for name, call := range requests(w, "c1") {
		if err := call(in("ns")); !errdefs.IsUnavailable(err) && !errors.Is(err, context.Canceled) && name != "exec" {
			t.Errorf("%s: %v", name, err)
		}
	}
	<-w.begin()
	if st, err := w.Service.Get(in("ns"), "c1", ""); err != nil || st.Status != tasktypes.Status_RUNNING {
		t.Errorf("%v, %v", st, err)
	}
}
