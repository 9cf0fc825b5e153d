package api

import (
	"context"
	"fmt"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	api "github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/checkpoints"
	"github.com/managerd/managerd/manager/containers"
	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/tasks"
	managerapi "github.com/managerd/managerd/protos/manager/v1"
)

// Tasks serves containerd.services.tasks.v1.Tasks.
type Tasks struct {
	api.UnimplementedTasksServer
	tasks      *tasks.Service
	containers *containers.Store
	content    checkpoints.Content
	scratch    string
}

// NewTasks serves s. Checkpoints go to content, by way of files below the directory scratch.
func NewTasks(s *tasks.Service, c *containers.Store, content checkpoints.Content, scratch string) *Tasks {
	return &Tasks{tasks: s, containers: c, content: content, scratch: scratch}
}

// Register adds the service to a server.
func (a *Tasks) Register(s *grpc.Server) {
	api.RegisterTasksServer(s, a)
	managerapi.RegisterTasksServer(s, &ownTasks{tasks: a.tasks})
}

// ownTasks serves managerd.v1.Tasks.
type ownTasks struct {
	managerapi.UnimplementedTasksServer
	tasks *tasks.Service
}

// Unresponsive says which shims do not answer.
func (a *ownTasks) Unresponsive(ctx context.Context, _ *managerapi.UnresponsiveRequest) (*managerapi.UnresponsiveResponse, error) {
	found, err := a.tasks.Unresponsive(ctx)
	if err != nil {
		return nil, toGRPC(err)
	}
	resp := &managerapi.UnresponsiveResponse{Since: map[string]*timestamppb.Timestamp{}}
	for id, since := range found {
		resp.Since[id] = timestamppb.New(since)
	}
	return resp, nil
}

// Remove ends a task and takes it away.
func (a *ownTasks) Remove(ctx context.Context, r *managerapi.RemoveRequest) (*managerapi.RemoveResponse, error) {
	return &managerapi.RemoveResponse{}, toGRPC(a.tasks.Remove(ctx, r.Id))
}

var done = &emptypb.Empty{}

// Create makes a task, its init parked, or one without a process, to be restored by Start.
func (a *Tasks) Create(ctx context.Context, r *api.CreateTaskRequest) (*api.CreateTaskResponse, error) {
	from, unpack, err := a.checkpointOf(r)
	if err != nil {
		return nil, toGRPC(err)
	}
	pid, err := a.tasks.Create(ctx, tasks.CreateRequest{
		ID: r.ContainerID, Rootfs: r.Rootfs, Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal,
		Options: r.Options, RuntimePath: r.RuntimePath, Checkpoint: from, Unpack: unpack,
		TaskAPI: r.TaskApiAddress, TaskAPIVersion: r.TaskApiVersion,
	})
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.CreateTaskResponse{ContainerID: r.ContainerID, Pid: pid}, nil
}

// Start starts a task or an exec.
func (a *Tasks) Start(ctx context.Context, r *api.StartRequest) (*api.StartResponse, error) {
	pid, err := a.tasks.Start(ctx, r.ContainerID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.StartResponse{Pid: pid}, nil
}

// Delete removes an ended task.
func (a *Tasks) Delete(ctx context.Context, r *api.DeleteTaskRequest) (*api.DeleteResponse, error) {
	d, err := a.tasks.Delete(ctx, r.ContainerID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.DeleteResponse{ID: r.ContainerID, Pid: d.Pid, ExitStatus: d.ExitStatus, ExitedAt: d.ExitedAt}, nil
}

// DeleteProcess removes an ended exec.
func (a *Tasks) DeleteProcess(ctx context.Context, r *api.DeleteProcessRequest) (*api.DeleteResponse, error) {
	d, err := a.tasks.DeleteProcess(ctx, r.ContainerID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.DeleteResponse{ID: r.ExecID, Pid: d.Pid, ExitStatus: d.ExitStatus, ExitedAt: d.ExitedAt}, nil
}

func process(st *task.StateResponse) *tasktypes.Process {
	p := &tasktypes.Process{
		ContainerID: st.ID, ID: st.ID, Pid: st.Pid, Status: st.Status, Stdin: st.Stdin, Stdout: st.Stdout, Stderr: st.Stderr,
		Terminal: st.Terminal, ExitStatus: st.ExitStatus, ExitedAt: st.ExitedAt,
	}
	if st.ExecID != "" {
		p.ID = st.ExecID
	}
	return p
}

// Get says how a process is.
func (a *Tasks) Get(ctx context.Context, r *api.GetRequest) (*api.GetResponse, error) {
	st, err := a.tasks.Get(ctx, r.ContainerID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.GetResponse{Process: process(st)}, nil
}

// List says how all tasks are.
func (a *Tasks) List(ctx context.Context, r *api.ListTasksRequest) (*api.ListTasksResponse, error) {
	f, err := filters.Parse(r.Filter)
	if err != nil {
		return nil, toGRPC(err)
	}
	all, err := a.tasks.List(ctx)
	if err != nil {
		return nil, toGRPC(err)
	}
	resp := &api.ListTasksResponse{}
	for _, st := range all {
		if f.Match(taskFields{st}) {
			resp.Tasks = append(resp.Tasks, process(st))
		}
	}
	return resp, nil
}

// taskFields lets filters look at a task: id, status.
type taskFields struct{ st *task.StateResponse }

func (t taskFields) Field(path []string) (string, bool) {
	if len(path) != 1 {
		return "", false
	}
	switch path[0] {
	case "id":
		return t.st.ID, true
	case "status":
		return t.st.Status.String(), true
	}
	return "", false
}

// Kill signals.
func (a *Tasks) Kill(ctx context.Context, r *api.KillRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.tasks.Kill(ctx, r.ContainerID, r.ExecID, r.Signal, r.All))
}

// Exec adds a process.
func (a *Tasks) Exec(ctx context.Context, r *api.ExecProcessRequest) (*emptypb.Empty, error) {
	if err := identifiers.Validate(r.ExecID); err != nil {
		return nil, toGRPC(fmt.Errorf("exec id: %w", err))
	}
	return done, toGRPC(a.tasks.Exec(ctx, &task.ExecProcessRequest{
		ID: r.ContainerID, ExecID: r.ExecID, Terminal: r.Terminal, Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Spec: r.Spec,
	}))
}

// ResizePty sets the size of a terminal.
func (a *Tasks) ResizePty(ctx context.Context, r *api.ResizePtyRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.tasks.ResizePty(ctx, r.ContainerID, r.ExecID, r.Width, r.Height))
}

// CloseIO ends a process's input.
func (a *Tasks) CloseIO(ctx context.Context, r *api.CloseIORequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.tasks.CloseIO(ctx, r.ContainerID, r.ExecID, r.Stdin))
}

// Pause freezes a task.
func (a *Tasks) Pause(ctx context.Context, r *api.PauseTaskRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.tasks.Pause(ctx, r.ContainerID))
}

// Resume undoes Pause.
func (a *Tasks) Resume(ctx context.Context, r *api.ResumeTaskRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.tasks.Resume(ctx, r.ContainerID))
}

// ListPids lists processes.
func (a *Tasks) ListPids(ctx context.Context, r *api.ListPidsRequest) (*api.ListPidsResponse, error) {
	ps, err := a.tasks.Pids(ctx, r.ContainerID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.ListPidsResponse{Processes: ps}, nil
}

// Update changes limits.
func (a *Tasks) Update(ctx context.Context, r *api.UpdateTaskRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.tasks.Update(ctx, r.ContainerID, r.Resources, r.Annotations))
}

// Metrics reads counters.
func (a *Tasks) Metrics(ctx context.Context, r *api.MetricsRequest) (*api.MetricsResponse, error) {
	f, err := filters.ParseAll(r.Filters...)
	if err != nil {
		return nil, toGRPC(err)
	}
	m, err := a.tasks.Metrics(ctx, f)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.MetricsResponse{Metrics: m}, nil
}

// Wait answers when a process has ended.
func (a *Tasks) Wait(ctx context.Context, r *api.WaitRequest) (*api.WaitResponse, error) {
	status, at, err := a.tasks.Wait(ctx, r.ContainerID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.WaitResponse{ExitStatus: status, ExitedAt: at}, nil
}
