package shimapi

import (
	"context"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// The task service in its two versions. Their messages are the same on the wire (the two .proto files differ in
// their package name only), so one implementation and one client, in the types of version 3, serve both.
const (
	TaskServiceV3 = "containerd.task.v3.Task"
	TaskServiceV2 = "containerd.task.v2.Task"
)

// TaskService is the task API, as a shim implements it and as a client sees it.
type TaskService = task.TTRPCTaskService

// RegisterTask serves svc under both versions. Errors of svc go through ToWire.
func RegisterTask(srv *ttrpc.Server, svc TaskService) {
	methods := map[string]ttrpc.Method{
		"State":      method(svc.State),
		"Create":     method(svc.Create),
		"Start":      method(svc.Start),
		"Delete":     method(svc.Delete),
		"Pids":       method(svc.Pids),
		"Pause":      method(svc.Pause),
		"Resume":     method(svc.Resume),
		"Checkpoint": method(svc.Checkpoint),
		"Kill":       method(svc.Kill),
		"Exec":       method(svc.Exec),
		"ResizePty":  method(svc.ResizePty),
		"CloseIO":    method(svc.CloseIO),
		"Update":     method(svc.Update),
		"Wait":       method(svc.Wait),
		"Stats":      method(svc.Stats),
		"Connect":    method(svc.Connect),
		"Shutdown":   method(svc.Shutdown),
	}
	for _, name := range []string{TaskServiceV3, TaskServiceV2} {
		srv.RegisterService(name, &ttrpc.ServiceDesc{Methods: methods})
	}
}

// method adapts one typed handler to ttrpc.
func method[Req, Resp any](f func(context.Context, *Req) (*Resp, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		var req Req
		if err := unmarshal(&req); err != nil {
			return nil, err
		}
		resp, err := f(ctx, &req)
		if err != nil {
			return nil, ToWire(err)
		}
		return resp, nil
	}
}

// taskClient calls a shim of either version; its errors have been through FromWire.
type taskClient struct {
	c       *ttrpc.Client
	service string
}

var _ TaskService = (*taskClient)(nil)

// NewTaskClient gives the task service behind a connection; version is that of BootstrapParams.
func NewTaskClient(c *ttrpc.Client, version int) TaskService {
	name := TaskServiceV3
	if version == 2 {
		name = TaskServiceV2
	}
	return &taskClient{c: c, service: name}
}

func call[Resp any](ctx context.Context, t *taskClient, name string, req any) (*Resp, error) {
	resp := new(Resp)
	if err := t.c.Call(ctx, t.service, name, req, resp); err != nil {
		return nil, FromWire(err)
	}
	return resp, nil
}

func (t *taskClient) State(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	return call[task.StateResponse](ctx, t, "State", r)
}

func (t *taskClient) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	return call[task.CreateTaskResponse](ctx, t, "Create", r)
}

func (t *taskClient) Start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	return call[task.StartResponse](ctx, t, "Start", r)
}

func (t *taskClient) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	return call[task.DeleteResponse](ctx, t, "Delete", r)
}

func (t *taskClient) Pids(ctx context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	return call[task.PidsResponse](ctx, t, "Pids", r)
}

func (t *taskClient) Pause(ctx context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, "Pause", r)
}

func (t *taskClient) Resume(ctx context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, "Resume", r)
}

func (t *taskClient) Checkpoint(ctx context.Context, r *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, "Checkpoint", r)
}

func (t *taskClient) Kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, "Kill", r)
}

func (t *taskClient) Exec(ctx context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, "Exec", r)
}

func (t *taskClient) ResizePty(ctx context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, "ResizePty", r)
}

func (t *taskClient) CloseIO(ctx context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, "CloseIO", r)
}

func (t *taskClient) Update(ctx context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, "Update", r)
}

func (t *taskClient) Wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	return call[task.WaitResponse](ctx, t, "Wait", r)
}

func (t *taskClient) Stats(ctx context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	return call[task.StatsResponse](ctx, t, "Stats", r)
}

func (t *taskClient) Connect(ctx context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	return call[task.ConnectResponse](ctx, t, "Connect", r)
}

// Shutdown asks the shim to end. One that does may close the connection before its answer is sent: ttrpc's server takes a
// connection on which nothing but that is under way for idle. So that is an answer, too.
func (t *taskClient) Shutdown(ctx context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	resp, err := call[emptypb.Empty](ctx, t, "Shutdown", r)
	if errdefs.IsUnavailable(err) {
		return &emptypb.Empty{}, nil
	}
	return resp, err
}
