package shimtest

import (
	"context"
	"encoding/json"
	"fmt"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/shimapi"
)

// The types in which clients send a process and limits.
const (
	processType   = "types.containerd.io/opencontainers/runtime-spec/1/Process"
	resourcesType = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
)

func encode(typeURL string, v any) *anypb.Any {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // values of our own
	}
	return &anypb.Any{TypeUrl: typeURL, Value: data}
}

// create makes the container of spec, nil being one that sleeps; mod changes the request.
func (sh *shim) create(spec *specs.Spec, mod func(*task.CreateTaskRequest)) (*task.CreateTaskResponse, error) {
	sh.t.Helper()
	if spec != nil {
		sh.writeSpec(spec, "")
	}
	r := &task.CreateTaskRequest{ID: sh.id, Bundle: sh.bundle, Rootfs: sh.bind(), Options: sh.cfg.Options}
	if mod != nil {
		mod(r)
	}
	return request(sh.Create, r)
}

// created makes it, or ends the case.
func (sh *shim) created(spec *specs.Spec, mod func(*task.CreateTaskRequest)) uint32 {
	sh.t.Helper()
	resp, err := sh.create(spec, mod)
	sh.must("Create", err)
	return resp.Pid
}

// running makes and starts it, and gives the pid of its init.
func (sh *shim) running(spec *specs.Spec) int {
	sh.t.Helper()
	pid := sh.created(spec, nil)
	sh.start("")
	return int(pid)
}

func (sh *shim) start(execID string) uint32 {
	sh.t.Helper()
	resp, err := request(sh.Start, &task.StartRequest{ID: sh.id, ExecID: execID})
	sh.must("Start "+execID, err)
	return resp.Pid
}

func (sh *shim) state(execID string) *task.StateResponse {
	sh.t.Helper()
	resp, err := request(sh.State, &task.StateRequest{ID: sh.id, ExecID: execID})
	sh.must("State "+execID, err)
	return resp
}

func (sh *shim) wait(execID string) *task.WaitResponse {
	sh.t.Helper()
	resp, err := request(sh.Wait, &task.WaitRequest{ID: sh.id, ExecID: execID})
	sh.must("Wait "+execID, err)
	return resp
}

func (sh *shim) kill(execID string, signal uint32, all bool) {
	sh.t.Helper()
	_, err := request(sh.Kill, &task.KillRequest{ID: sh.id, ExecID: execID, Signal: signal, All: all})
	sh.must("Kill "+execID, err)
}

func (sh *shim) remove(execID string) *task.DeleteResponse {
	sh.t.Helper()
	resp, err := request(sh.Delete, &task.DeleteRequest{ID: sh.id, ExecID: execID})
	sh.must("Delete "+execID, err)
	return resp
}

// addExec adds one that is not started.
func (sh *shim) addExec(execID string, mod func(*task.ExecProcessRequest), args ...string) error {
	r := &task.ExecProcessRequest{ID: sh.id, ExecID: execID, Spec: encode(processType, &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}})}
	if mod != nil {
		mod(r)
	}
	_, err := request(sh.Exec, r)
	return err
}

// startExec adds and starts one.
func (sh *shim) startExec(execID string, args ...string) uint32 {
	sh.t.Helper()
	sh.must("Exec "+execID, sh.addExec(execID, nil, args...))
	return sh.start(execID)
}

// pids are the container's.
func (sh *shim) pids() []int {
	sh.t.Helper()
	resp, err := request(sh.Pids, &task.PidsRequest{ID: sh.id})
	sh.must("Pids", err)
	var out []int
	for _, p := range resp.Processes {
		out = append(out, int(p.Pid))
	}
	return out
}

// ask sends the request of a row of the lifecycle table.
func (sh *shim) ask(req shimapi.Request, execID string) error {
	ctx, cancel := within()
	defer cancel()
	var err error
	switch req {
	case shimapi.ReqCreate:
		if execID != "" {
			return sh.addExec(execID, nil, "true")
		}
		_, err = sh.Create(ctx, &task.CreateTaskRequest{ID: sh.id, Bundle: sh.bundle})
	case shimapi.ReqExec:
		return sh.addExec("probe", nil, "true")
	case shimapi.ReqStart:
		_, err = sh.Start(ctx, &task.StartRequest{ID: sh.id, ExecID: execID})
	case shimapi.ReqState:
		_, err = sh.State(ctx, &task.StateRequest{ID: sh.id, ExecID: execID})
	case shimapi.ReqKill:
		_, err = sh.Kill(ctx, &task.KillRequest{ID: sh.id, ExecID: execID, Signal: 9})
	case shimapi.ReqWait:
		_, err = sh.Wait(ctx, &task.WaitRequest{ID: sh.id, ExecID: execID})
	case shimapi.ReqResizePty:
		_, err = sh.ResizePty(ctx, &task.ResizePtyRequest{ID: sh.id, ExecID: execID, Width: 80, Height: 24})
	case shimapi.ReqCloseIO:
		_, err = sh.CloseIO(ctx, &task.CloseIORequest{ID: sh.id, ExecID: execID, Stdin: true})
	case shimapi.ReqDelete:
		_, err = sh.Delete(ctx, &task.DeleteRequest{ID: sh.id, ExecID: execID})
	default:
		err = sh.askContainer(ctx, req)
	}
	return err
}

// askContainer sends those that execs do not know.
func (sh *shim) askContainer(ctx context.Context, req shimapi.Request) error {
	var err error
	switch req {
	case shimapi.ReqPids:
		_, err = sh.Pids(ctx, &task.PidsRequest{ID: sh.id})
	case shimapi.ReqPause:
		_, err = sh.Pause(ctx, &task.PauseRequest{ID: sh.id})
	case shimapi.ReqResume:
		_, err = sh.Resume(ctx, &task.ResumeRequest{ID: sh.id})
	case shimapi.ReqStats:
		_, err = sh.Stats(ctx, &task.StatsRequest{ID: sh.id})
	case shimapi.ReqUpdate:
		_, err = sh.Update(ctx, &task.UpdateTaskRequest{ID: sh.id, Resources: encode(resourcesType, &specs.LinuxResources{})})
	case shimapi.ReqCheckpoint:
		_, err = sh.Checkpoint(ctx, &task.CheckpointTaskRequest{ID: sh.id, Path: sh.bundle + "/checkpoint"})
	default:
		panic(fmt.Sprintf("shimtest: nobody asks for %s", req))
	}
	return err
}
