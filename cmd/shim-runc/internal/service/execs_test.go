package service_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	apievents "github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	shim "github.com/managerd/managerd/protos/shim/v1"
)

func TestExecs(t *testing.T) {
	f := running(t, "execs", nil)
	if err := f.exec("a", nil, "sh", "-c", "exit 3"); err != nil {
		t.Fatal(err)
	}
	if err := f.exec("a", nil, "true"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("same id twice: %v", err)
	}
	if s := f.state("a"); s.Status != tasktypes.Status_CREATED || s.Pid != 0 {
		t.Errorf("added: %v", s)
	}
	f.start("a")
	if s := f.wait("a").ExitStatus; s != 3 {
		t.Errorf("status %d", s)
	}
	if d := f.remove("a"); d.ExitStatus != 3 {
		t.Errorf("delete: %v", d)
	}
	if _, err := f.State(ctx, &task.StateRequest{ID: "execs", ExecID: "a"}); !errdefs.IsNotFound(err) {
		t.Errorf("state after delete: %v", err)
	}
	if err := f.exec("no", nil, "/no/such"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Start(ctx, &task.StartRequest{ID: "execs", ExecID: "no"}); err == nil || !strings.Contains(err.Error(), "/no/such") {
		t.Errorf("exec of nothing: %v", err)
	}
	f.remove("no")
	if err := f.exec("nothing", nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no args: %v", err)
	}
	if _, err := f.Exec(ctx, &task.ExecProcessRequest{ID: "execs", ExecID: "x", Spec: &anypb.Any{Value: []byte("{")}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("malformed spec: %v", err)
	}
	if got := topics(f.events(0, 1, "/tasks/exit")); !slices.Equal(got, []string{"create", "start", "exec-added", "exec-started", "exit"}) {
		t.Errorf("events %v", got)
	}
	if err := f.exec("p", nil, "sleep", "1000"); err != nil {
		t.Fatal(err)
	}
	pid := f.start("p")
	pids, err := f.Pids(ctx, &task.PidsRequest{ID: "execs"})
	if err != nil || len(pids.Processes) != 2 {
		t.Fatalf("pids: %v, %v", pids, err)
	}
	for _, p := range pids.Processes {
		if (p.Info != nil) != (p.Pid == pid) {
			t.Errorf("pid %d of %d has info %v", p.Pid, pid, p.Info)
			continue
		}
		if p.Info != nil {
			v, err := typeurl.UnmarshalAny(p.Info)
			if d, ok := v.(*options.ProcessDetails); err != nil || !ok || d.ExecID != "p" {
				t.Errorf("details: %v, %v", v, err)
			}
		}
	}
	// The end of init ends execs, and is told last.
	f.kill("", syscall.SIGKILL)
	f.wait("")
	exits, err := f.Shim().Exits(ctx, &shim.ExitsRequest{})
	if n := len(exits.GetExits()); err != nil || n != 3 || exits.Exits[1].ExecId != "p" || exits.Exits[2].ExecId != "" {
		t.Errorf("exits: %v, %v", exits, err)
	}
}

// TestExecStartDeleteRace: a client that deletes what another one starts gets an error, or wins; the shim lives.
func TestExecStartDeleteRace(t *testing.T) {
	f := running(t, "race", nil)
	for i := range 20 {
		id := fmt.Sprint("e", i)
		if err := f.exec(id, nil, "true"); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 2 {
			wg.Add(3)
			go func() {
				defer wg.Done()
				_, _ = f.Start(ctx, &task.StartRequest{ID: "race", ExecID: id})
			}()
			go func() {
				defer wg.Done()
				_, _ = f.Delete(ctx, &task.DeleteRequest{ID: "race", ExecID: id})
			}()
			go func() {
				defer wg.Done()
				_, _ = f.CloseIO(ctx, &task.CloseIORequest{ID: "race", ExecID: id, Stdin: true})
			}()
		}
		wg.Wait()
	}
	if s := f.state(""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("state %v", s)
	}
}

// TestExecsWhileInitEnds: every exec that was started has an exit, before that of init.
func TestExecsWhileInitEnds(t *testing.T) {
	for _, host := range []bool{false, true} {
		id := fmt.Sprint("ending-", host)
		f := running(t, id, func(s *specs.Spec) {
			if host {
				shimbin.HostPID(s)
			}
		})
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				if f.exec(fmt.Sprint(i), nil, "sleep", "1000") == nil {
					_, _ = f.Start(ctx, &task.StartRequest{ID: id, ExecID: fmt.Sprint(i)})
				}
			}()
			if i == 4 {
				f.kill("", syscall.SIGKILL)
			}
		}
		f.wait("")
		wg.Wait()
		var started, ended int
		records := f.events(0, 1, "/tasks/exit")
		for last := false; !last; {
			for _, r := range records {
				v, err := typeurl.UnmarshalAny(r.Event)
				if err != nil {
					t.Fatal(err)
				}
				switch e := v.(type) {
				case *apievents.TaskExecStarted:
					started++
				case *apievents.TaskExit:
					if e.ID == id {
						last = true
					} else {
						ended++
					}
				}
			}
			if !last {
				records = f.events(records[len(records)-1].Seq, 1, "/tasks/exit")
			}
		}
		if started != ended {
			t.Errorf("%d execs started, %d ended before init", started, ended)
		}
		f.remove("")
	}
}
