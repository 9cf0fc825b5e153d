package tasks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/shims"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/shimfake"
)

// direct calls the shim of a task without a daemon.
func (w *world) direct(id string, call func(context.Context, *shimapi.Client) error) {
	w.t.Helper()
	p := shimapi.BootstrapParams{Version: 3, Protocol: "ttrpc", Address: "unix://" + shimapi.SocketPath(w.state, "ns", id)}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := shimapi.Dial(ctx, p)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if err := call(ctx, c); err != nil {
		w.t.Fatalf("%s: %v", id, err)
	}
}

// endAway ends a task while no daemon lives, and waits for it.
func (w *world) endAway(id string, signal uint32) {
	w.t.Helper()
	w.direct(id, func(ctx context.Context, c *shimapi.Client) error {
		if _, err := c.Kill(ctx, &task.KillRequest{ID: id, Signal: signal}); err != nil {
			return err
		}
		_, err := c.Wait(ctx, &task.WaitRequest{ID: id})
		return err
	})
}

// toldAll says whether every event that is in a task's ledger was handed on.
func (w *world) toldAll(id string) bool {
	w.t.Helper()
	b, err := w.bundles.Load("ns", id)
	if err != nil {
		w.t.Fatal(err)
	}
	records, err := b.Ledger()
	if err != nil {
		w.t.Fatal(err)
	}
	var last uint64
	for _, r := range records {
		if r.Event != nil {
			last = r.Seq
		}
	}
	return b.Cursor() == last
}

// TestRecover: whatever happened while no daemon lived, the next one finds it, and tells of each event once.
func TestRecover(t *testing.T) {
	w := fakes(t)
	w.run("runs", args("run"))
	w.run("ends", args("run"))
	w.run("deleted", args("run"))
	w.run("orphan", args("run"))
	w.run("orphan-ended", args("exit", "3"))
	w.add("created", args("run"), shims.DefaultRuntime)
	if _, err := w.Create(in("ns"), CreateRequest{ID: "created"}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := w.Wait(in("ns"), "orphan-ended", ""); err != nil {
		t.Fatal(err)
	}
	before := w.record()
	before.await(t, "ends") // nothing: it is told of what happens from now on
	for _, id := range []string{"ends", "deleted", "orphan", "orphan-ended"} {
		eventually(t, "what happened to "+id+" so far is told", func() bool { return w.toldAll(id) })
	}
	w.Close()

	w.endAway("ends", 9)
	w.endAway("deleted", 15)
	w.direct("deleted", func(ctx context.Context, c *shimapi.Client) error {
		_, err := c.Delete(ctx, &task.DeleteRequest{ID: "deleted"})
		return err
	})
	for _, id := range []string{"orphan", "orphan-ended"} {
		// A fake is its own container: it ends with it. Nobody saw how.
		if err := unix.Kill(w.shimPid(id), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, id+"'s shim is gone", func() bool { return unix.Kill(w.shimPid(id), 0) != nil })
	}

	<-w.begin()
	r := w.record()
	ctx := in("ns")
	for id, want := range map[string]struct {
		status tasktypes.Status
		exit   uint32
	}{
		"runs":         {tasktypes.Status_RUNNING, 0},
		"created":      {tasktypes.Status_CREATED, 0},
		"ends":         {tasktypes.Status_STOPPED, 137},
		"orphan":       {tasktypes.Status_UNKNOWN, unknownExit},
		"orphan-ended": {tasktypes.Status_STOPPED, 3},
	} {
		if st, err := w.Service.Get(ctx, id, ""); err != nil || st.Status != want.status || st.ExitStatus != want.exit {
			t.Errorf("%s: %v, %v", id, st, err)
		}
	}
	eventually(t, "the deleted task is gone", func() bool {
		_, err := w.Service.Get(ctx, "deleted", "")
		return errdefs.IsNotFound(err)
	})
	r.await(t, "ends", "exit ends=137")
	r.await(t, "deleted", "exit deleted=143", "delete")
	if status, _, err := w.Wait(ctx, "ends", ""); err != nil || status != 137 {
		t.Errorf("wait for what has ended: %d, %v", status, err)
	}
	if status, _, err := w.Wait(ctx, "orphan-ended", ""); err != nil || status != 3 {
		t.Errorf("wait for what has ended, without a shim: %d, %v", status, err)
	}
	if _, _, err := w.Wait(ctx, "orphan", ""); !errdefs.IsUnavailable(err) {
		t.Errorf("wait for what nobody saw: %v", err)
	}
	for id, status := range map[string]uint32{"orphan": unknownExit, "orphan-ended": 3, "ends": 137} {
		if d, err := w.Delete(ctx, id); err != nil || d.ExitStatus != status {
			t.Errorf("delete %s: %v, %v", id, d, err)
		}
	}
	r.await(t, "orphan", "exit orphan=255", "delete")
	r.await(t, "orphan-ended", "delete")

	// A second daemon tells nothing again.
	w.restart()
	if again := w.record(); len(again.topics("ends")) != 0 || len(again.topics("runs")) != 0 {
		t.Errorf("told again: %v, %v", again.topics("ends"), again.topics("runs"))
	}
}

// TestRecoverDamaged: a bundle that makes no sense keeps no other task away.
func TestRecoverDamaged(t *testing.T) {
	w := fakes(t)
	w.run("c1", args("run"))
	w.run("c2", args("run"))
	w.Close()
	b, err := w.bundles.Load("ns", "c2")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"bootstrap.json", shimapi.LedgerFile} {
		if err := os.WriteFile(filepath.Join(b.Path, name), []byte("{nonsense"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// And one that was killed while it was being made.
	if _, err := w.bundles.Create("ns", "half", []byte("{}")); err != nil {
		t.Fatal(err)
	}
	<-w.begin()
	for _, id := range []string{"c1", "c2"} { // the shim of c2 says what its files do not
		if st, err := w.Service.Get(in("ns"), id, ""); err != nil || st.Status != tasktypes.Status_RUNNING {
			t.Errorf("%s: %v, %v", id, st, err)
		}
	}
	eventually(t, "the half bundle is gone", func() bool {
		_, err := w.bundles.Load("ns", "half")
		return errdefs.IsNotFound(err)
	})
}

// TestRecoverWedged: shims that do not answer keep the others from nothing.
func TestRecoverWedged(t *testing.T) {
	w := fakes(t)
	for i := range 20 {
		w.run(fmt.Sprint("stopped", i), args("run"))
	}
	w.run("well", args("run"))
	var pids []int
	for i := range 20 {
		pids = append(pids, w.shimPid(fmt.Sprint("stopped", i)))
	}
	w.Close()
	for _, pid := range pids {
		freeze(t, pid)
	}
	begin := time.Now()
	w.begin()
	if st, err := w.Service.Get(in("ns"), "well", ""); err != nil || st.Status != tasktypes.Status_RUNNING {
		t.Errorf("%v, %v", st, err)
	}
	all, err := w.List(in("ns"))
	if err != nil || len(all) != 21 {
		t.Errorf("%d tasks, %v", len(all), err)
	}
	if _, err := w.Metrics(in("ns"), filters.Always); err != nil {
		t.Error(err)
	}
	since, err := w.Unresponsive(in("ns"))
	if err != nil || len(since) != 20 {
		t.Errorf("unresponsive: %v, %v", since, err)
	}
	for id, at := range since {
		if !strings.HasPrefix(id, "stopped") || at.Before(begin) || at.After(time.Now()) {
			t.Errorf("%s is unresponsive since %v, after %v", id, at, begin)
		}
	}
	for _, st := range all {
		if st.Pid == 0 {
			t.Errorf("nobody says which process %s is", st.ID)
		}
	}
	if took := time.Since(begin); took > 6*time.Second { // a second each for list and metrics
		t.Errorf("took %v", took)
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all answer again", func() bool {
		all, err := w.List(in("ns"))
		for _, st := range all {
			if st.Status != tasktypes.Status_RUNNING {
				return false
			}
		}
		return err == nil
	})
	if since, err := w.Unresponsive(in("ns")); err != nil || len(since) != 0 {
		t.Errorf("unresponsive again: %v, %v", since, err)
	}
}

// TestRecoverUnheard: shims that have not answered since the daemon began are believed what they have written down, at once;
// those that are late are not any more.
func TestRecoverUnheard(t *testing.T) {
	w := fakes(t)
	want := map[string]tasktypes.Status{
		"created": tasktypes.Status_CREATED, "running": tasktypes.Status_RUNNING, "paused": tasktypes.Status_PAUSED,
		"resumed": tasktypes.Status_RUNNING, "stopped": tasktypes.Status_STOPPED,
	}
	ctx := in("ns")
	w.add("created", args("run"), shims.DefaultRuntime)
	_, err := w.Create(ctx, CreateRequest{ID: "created"})
	w.run("running", args("run"))
	w.run("paused", args("run"))
	w.run("resumed", args("run"))
	w.run("stopped", args("exit", "3"))
	_, _, werr := w.Wait(ctx, "stopped", "")
	if err := errors.Join(err, w.Pause(ctx, "paused"), w.Pause(ctx, "resumed"), w.Resume(ctx, "resumed"), werr); err != nil {
		t.Fatal(err)
	}
	for id := range want {
		w.fault(id, shimfake.Faults{"State": {Hang: true}})
	}
	w.Close()
	w.begin()
	check := func(how string, all []*task.StateResponse, err error) {
		t.Helper()
		if err != nil || len(all) != len(want) {
			t.Errorf("%s: %d tasks, %v", how, len(all), err)
		}
		for _, st := range all {
			if st.Status != want[st.ID] || st.Pid == 0 || (st.ID == "stopped") != (st.ExitStatus == 3) {
				t.Errorf("%s: %v", how, st)
			}
		}
	}
	all, err := w.List(ctx)
	check("list", all, err)
	if since, err := w.Unresponsive(ctx); err != nil || len(since) != 0 {
		t.Errorf("unresponsive: %v, %v", since, err)
	}
	eventually(t, "all are late", func() bool {
		since, err := w.Unresponsive(ctx)
		return err == nil && len(since) == len(want)
	})
	all, err = w.List(ctx)
	for id := range want {
		want[id] = tasktypes.Status_UNKNOWN
	}
	if err != nil || len(all) != len(want) {
		t.Errorf("%d tasks, %v", len(all), err)
	}
	for _, st := range all {
		if st.Status != tasktypes.Status_UNKNOWN {
			t.Errorf("it is late: %v", st)
		}
	}
	for id := range want {
		w.fault(id, nil)
	}
}

// TestRecoverHalfCreated: a daemon that is killed during Create leaves a task, or nothing; never half of one.
func TestRecoverHalfCreated(t *testing.T) {
	w := fakes(t)
	w.add("c1", args("run"), shims.DefaultRuntime)
	w.fault("c1", shimfake.Faults{"Create": {Delay: 300 * time.Millisecond}})
	b, err := w.bundles.Create("ns", "c1", []byte(`{"process":{"args":["run"]}}`))
	if err != nil {
		t.Fatal(err)
	}
	shim, err := w.shims.Spawn(in("ns"), b, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(in("ns"), 100*time.Millisecond)
	defer cancel()
	if _, err := shim.Create(short, &task.CreateTaskRequest{ID: "c1", Bundle: b.Path}); err == nil {
		t.Fatal("create was not to be done yet")
	}
	shim.Close() // the daemon is killed: nobody hears the answer
	<-w.begin()
	eventually(t, "it is a task or nothing", func() bool {
		st, err := w.Service.Get(in("ns"), "c1", "")
		return errdefs.IsNotFound(err) || err == nil && st.Status == tasktypes.Status_CREATED
	})
}

// TestRecoverUndecided: a daemon was killed during Create, and the shim hangs: whoever asks again is not told that there is
// a task, which nobody knows, but waits for what becomes of it.
func TestRecoverUndecided(t *testing.T) {
	w := fakes(t)
	w.add("c1", args("run"), shims.DefaultRuntime)
	b, err := w.bundles.Create("ns", "c1", []byte(`{"process":{"args":["run"]}}`))
	if err != nil {
		t.Fatal(err)
	}
	shim, err := w.shims.Spawn(in("ns"), b, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := shim.Connect(in("ns"), &task.ConnectRequest{ID: "c1"}); err != nil { // it serves
		t.Fatal(err)
	}
	shim.Close()
	pid := w.shimPid("c1")
	freeze(t, pid)
	<-w.begin()
	type made struct {
		pid uint32
		err error
	}
	answered := make(chan made, 1)
	go func() {
		pid, err := w.Create(in("ns"), CreateRequest{ID: "c1"})
		answered <- made{pid, err}
	}()
	select {
	case m := <-answered:
		t.Errorf("told while nobody can know: %v", m.err)
	case <-time.After(100 * time.Millisecond): // nothing tells that something does not happen
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case m := <-answered:
		if m.err != nil || m.pid == 0 {
			t.Errorf("process %d, %v", m.pid, m.err)
		}
	case <-time.After(30 * time.Second):
		t.Error("no answer")
	}
}

// TestRetireDies: a shim that had nothing when it was asked, and dies before it ends, may have made a container meanwhile;
// nothing is left of that.
func TestRetireDies(t *testing.T) {
	w := realWorld(t)
	pid := w.run(CreateRequest{ID: "c1"}, "/busybox sleep 1000")
	_, tk, err := w.find(in("ns"), "c1")
	if err != nil {
		t.Fatal(err)
	}
	shim, _, _ := tk.now()
	tk.expectEnd(true)
	if err := unix.Kill(w.shimPid("c1"), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-shim.Gone()
	w.retire(tk, shim)
	if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && len(line) > 0 { // a zombie has none
		t.Errorf("process %d is left: %q", pid, line)
		_ = unix.Kill(int(pid), unix.SIGKILL)
	}
	if _, err := w.Service.Get(in("ns"), "c1", ""); !errdefs.IsNotFound(err) {
		t.Errorf("the task: %v", err)
	}
	w.clean()
}

// TestRecoverContainers is TestRecover in short, with real shims and containers.
func TestRecoverContainers(t *testing.T) {
	w := realWorld(t)
	start := func(id, script string) uint32 {
		t.Helper()
		return w.run(CreateRequest{ID: id}, script)
	}
	pid := start("runs", "while :; do /busybox sleep 1; done")
	start("ends", "trap 'exit 42' TERM; while :; do /busybox sleep 0.01; done")
	orphan := start("orphan", "trap 'exit 43' TERM; while :; do /busybox sleep 0.01; done")
	w.Close()
	w.endAway("ends", 15)
	shimPid := w.shimPid("orphan")
	if err := unix.Kill(shimPid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the shim is gone", func() bool { return unix.Kill(shimPid, 0) != nil })

	<-w.begin()
	r := w.record()
	ctx := in("ns")
	if st, err := w.Service.Get(ctx, "runs", ""); err != nil || st.Pid != pid || st.Status != tasktypes.Status_RUNNING {
		t.Errorf("runs: %v, %v", st, err)
	}
	if st, err := w.Service.Get(ctx, "ends", ""); err != nil || st.ExitStatus != 42 || st.Status != tasktypes.Status_STOPPED {
		t.Errorf("ends: %v, %v", st, err)
	}
	r.await(t, "ends", "exit ends=42")
	if st, err := w.Service.Get(ctx, "orphan", ""); err != nil || st.Pid != orphan || st.Status != tasktypes.Status_RUNNING {
		t.Errorf("orphan: %v, %v", st, err)
	}
	// The death of a shim is not that of its container.
	if err := unix.Kill(int(orphan), 0); err != nil {
		t.Errorf("the container of a killed shim: %v", err)
	}
	if _, err := w.Delete(ctx, "orphan"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a running container: %v", err)
	}
	for _, id := range []string{"runs", "ends", "orphan"} {
		if err := w.Kill(ctx, id, "", 9, true); err != nil && !errdefs.IsNotFound(err) {
			t.Errorf("kill %s: %v", id, err)
		}
	}
	eventually(t, "all have ended", func() bool {
		for _, id := range []string{"runs", "ends", "orphan"} {
			if st, err := w.Service.Get(ctx, id, ""); err != nil || st.Status == tasktypes.Status_RUNNING || st.Pid != 0 && id == "orphan" && unix.Kill(int(orphan), 0) == nil {
				return false
			}
		}
		return true
	})
	for _, id := range []string{"runs", "ends", "orphan"} {
		if _, err := w.Delete(ctx, id); err != nil {
			t.Errorf("delete %s: %v", id, err)
		}
	}
}
