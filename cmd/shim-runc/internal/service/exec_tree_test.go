package service_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	shim "github.com/managerd/managerd/protos/shim/v1"
)

// limited makes the spec of an exec that may run for a time.
func limited(t testing.TB, timeout time.Duration, args ...string) *anypb.Any {
	t.Helper()
	process, err := json.Marshal(&specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}})
	if err != nil {
		t.Fatal(err)
	}
	own := &shim.ExecSpec{Process: &anypb.Any{TypeUrl: processType, Value: process}, TimeoutNano: int64(timeout)}
	value, err := proto.Marshal(own)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: string(own.ProtoReflect().Descriptor().FullName()), Value: value}
}

// startLimited starts one.
func (f *fixture) startLimited(execID string, timeout time.Duration, args ...string) {
	f.t.Helper()
	if _, err := f.Exec(ctx, &task.ExecProcessRequest{ID: f.id, ExecID: execID, Spec: limited(f.t, timeout, args...)}); err != nil {
		f.t.Fatal(err)
	}
	f.start(execID)
}

// forks has a child, a grandchild whose parent has ended, and one in a session of its own.
const forks = "sleep 1000 & (sleep 1000 &) ; setsid sleep 1000 & exec sleep 1000"

// processes counts those of the container.
func (f *fixture) processes() int {
	f.t.Helper()
	r, err := f.Pids(ctx, &task.PidsRequest{ID: f.id})
	if err != nil {
		f.t.Fatal(err)
	}
	return len(r.Processes)
}

func (f *fixture) await(what string, is func() bool) {
	f.t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			f.t.Fatalf("%s: it does not come to that", what)
		}
	}
}

// execCgroups lists the cgroups that execs have below the container's.
func (f *fixture) execCgroups() (found []string) {
	f.t.Helper()
	for _, dir := range []string{"", "freezer"} {
		more, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", dir, shimbin.CgroupParent, f.id, "exec*"))
		if err != nil {
			f.t.Fatal(err)
		}
		found = append(found, more...)
	}
	return found
}

// TestExecDeadline: an exec whose time is over ends, and with it all that it has begotten; its exit says so.
func TestExecDeadline(t *testing.T) {
	f := running(t, "deadline", nil)
	f.startLimited("late", 300*time.Millisecond, "sh", "-c", forks)
	f.startLimited("early", time.Hour, "sh", "-c", "exit 3")
	f.startLimited("killed", time.Hour, "sh", "-c", "kill -9 $$")
	f.startLimited("free", 0, "sleep", "1000")
	for id, want := range map[string]uint32{"late": 137, "early": 3, "killed": 137} {
		if s := f.wait(id).ExitStatus; s != want {
			t.Errorf("%s: exit status %d, not %d", id, s, want)
		}
	}
	f.await("what the exec has begotten is gone", func() bool { return f.processes() == 2 }) // the init and "free"
	_, exits := f.past()
	for id, want := range map[string]bool{"late": true, "early": false, "killed": false} {
		if exits[id].TimedOut != want {
			t.Errorf("%s: exit %v", id, exits[id])
		}
	}
	for _, p := range f.describe().Processes {
		if p.TimedOut != (p.ExecId == "late") || (p.ExecId == "early") != (p.TimeoutNano == int64(time.Hour)) && p.ExecId != "killed" {
			t.Errorf("description: %v", p)
		}
	}
	told, err := f.Shim().Exits(ctx, &shim.ExitsRequest{})
	if err != nil || len(told.Exits) != 3 {
		t.Fatalf("%v, %v", told, err)
	}
	for _, e := range told.Exits {
		if e.TimedOut != (e.ExecId == "late") {
			t.Errorf("exit %v", e)
		}
	}
	f.kill("free", syscall.SIGKILL)
	f.wait("free")
	f.await("the cgroups of execs are removed", func() bool { return len(f.execCgroups()) == 0 })
	for _, bad := range []*anypb.Any{limited(t, -1, "true"), {TypeUrl: "managerd.shim.v1.ExecSpec"}, {TypeUrl: "managerd.shim.v1.ExecSpec", Value: []byte{0xff}}} {
		if _, err := f.Exec(ctx, &task.ExecProcessRequest{ID: f.id, ExecID: "bad", Spec: bad}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "bad") {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

// TestExecDeadlineUpgrade: a shim that replaces its code, and one that was killed and has a successor, end it on time.
func TestExecDeadlineUpgrade(t *testing.T) {
	f := running(t, "replaced", nil)
	f.startLimited("e", 2*time.Second, "sh", "-c", forks)
	if _, err := f.Shim().Upgrade(ctx, &shim.UpgradeRequest{}); err != nil {
		t.Fatal(err)
	}
	if s := f.wait("e").ExitStatus; s != 137 {
		t.Errorf("exit status %d", s)
	}
	f.await("what the exec has begotten is gone", func() bool { return f.processes() == 1 })
	if _, exits := f.past(); !exits["e"].TimedOut {
		t.Errorf("exit %v", exits["e"])
	}
	f.await("the cgroups of execs are removed", func() bool { return len(f.execCgroups()) == 0 })
}

// TestExecKillAll: SIGKILL to all of an exec ends what it has begotten and nothing else.
func TestExecKillAll(t *testing.T) {
	f := running(t, "tree", nil)
	f.startLimited("tree", time.Hour, "sh", "-c", forks)
	if err := f.exec("other", nil, "sleep", "1000"); err != nil {
		t.Fatal(err)
	}
	f.start("other")
	f.await("all run", func() bool { return f.processes() == 6 })
	if _, err := f.Kill(ctx, &task.KillRequest{ID: f.id, ExecID: "tree", Signal: 9, All: true}); err != nil {
		t.Fatal(err)
	}
	if s := f.wait("tree").ExitStatus; s != 137 {
		t.Errorf("exit status %d", s)
	}
	f.await("what the exec has begotten is gone", func() bool { return f.processes() == 2 })
	if _, exits := f.past(); exits["tree"].TimedOut {
		t.Errorf("exit %v", exits["tree"])
	}
}

// TestExecKillTree: without a cgroup of its own, an exec is killed with its descendants.
func TestExecKillTree(t *testing.T) {
	if cgroups.Mode() == cgroups.Unified {
		t.Skip("on cgroup v2 every exec has a cgroup of its own")
	}
	f := running(t, "parents", nil)
	if err := f.exec("e", nil, "sh", "-c", "(sleep 1000 & sleep 1000) & exec sleep 1000"); err != nil {
		t.Fatal(err)
	}
	f.start("e")
	f.await("all run", func() bool { return f.processes() >= 4 })
	if left := f.execCgroups(); len(left) > 0 {
		t.Errorf("it has %v", left)
	}
	if _, err := f.Kill(ctx, &task.KillRequest{ID: f.id, ExecID: "e", Signal: 9, All: true}); err != nil {
		t.Fatal(err)
	}
	f.wait("e")
	f.await("what the exec has begotten is gone", func() bool { return f.processes() == 1 })
}

// TestExecCgroups: on cgroup v2 each exec is in a cgroup of its own, which goes when the last process in it has; the container
// is paused, signalled and counted with it.
func TestExecCgroups(t *testing.T) {
	if cgroups.Mode() != cgroups.Unified {
		t.Skip("on cgroup v1 only an exec with a time limit has a cgroup of its own, in one hierarchy")
	}
	f := running(t, "own", nil)
	for _, id := range []string{"a", "b"} {
		if err := f.exec(id, nil, "sleep", "1000"); err != nil {
			t.Fatal(err)
		}
		pid := f.start(id)
		where, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if want := "/own/exec-" + id; err != nil || !strings.HasSuffix(strings.TrimSpace(string(where)), want) {
			t.Errorf("exec %s is in %s, not in %s: %v", id, where, want, err)
		}
	}
	if n := f.processes(); n != 3 {
		t.Errorf("%d processes", n)
	}
	f.kill("a", syscall.SIGKILL)
	f.wait("a")
	f.remove("a")
	if left := f.execCgroups(); len(left) != 1 {
		t.Errorf("there are %v", left)
	}
	// One that leaves something running, and one of the same name.
	if s := f.runExec("a", nil, "sh", "-c", "setsid sleep 1000 & exit 4"); s != 4 {
		t.Errorf("status %d", s)
	}
	if s := f.runExec("a", nil, "true"); s != 0 {
		t.Errorf("status %d", s)
	}
	if left := f.execCgroups(); len(left) != 2 || filepath.Base(left[0]) != "exec-a" {
		t.Errorf("there are %v", left)
	}
	f.kill("", syscall.SIGKILL)
	f.wait("")
	f.remove("") // what is left of it the end of the tests looks for
}
