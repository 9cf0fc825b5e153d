package tasks

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/filters"
	shim "github.com/managerd/managerd/protos/shim/v1"
)

var describe = &shim.DescribeRequest{}

// Start starts the parked init, or an exec, and returns its pid.
func (s *Service) Start(ctx context.Context, id, execID string) (uint32, error) {
	c, err := s.living(ctx, id)
	if err != nil {
		return 0, err
	}
	resp, err := c.Start(ctx, &task.StartRequest{ID: id, ExecID: execID})
	return resp.GetPid(), err
}

// Get says how a process is.
func (s *Service) Get(ctx context.Context, id, execID string) (*task.StateResponse, error) {
	t, err := s.find(ctx, id)
	if err != nil {
		return nil, err
	}
	if d := t.remains(); d != nil {
		if execID != "" {
			return nil, fmt.Errorf("exec %s of task %s: the shim is dead: %w", execID, id, errdefs.ErrNotFound)
		}
		return d.state(id), nil
	}
	return t.connection().State(ctx, &task.StateRequest{ID: id, ExecID: execID})
}

// state is what can be said without a shim.
func (d *remains) state(id string) *task.StateResponse {
	r := &task.StateResponse{
		ID: id, Bundle: d.bundle.Path, Pid: d.pid, Status: tasktypes.Status_UNKNOWN, Terminal: d.terminal,
		Stdin: d.stdio[0], Stdout: d.stdio[1], Stderr: d.stdio[2],
	}
	if d.exited {
		r.Status, r.ExitStatus, r.ExitedAt = tasktypes.Status_STOPPED, d.status, timestamppb.New(d.exitedAt)
	}
	return r
}

// List says how every task of the namespace is, ordered by id. All shims are asked at once; one that does not answer
// within a second holds nobody up and is shown as unknown.
func (s *Service) List(ctx context.Context) ([]*task.StateResponse, error) {
	all, err := s.list(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	states := make([]*task.StateResponse, len(all))
	var asked sync.WaitGroup
	for i, t := range all {
		asked.Add(1)
		go func() {
			defer asked.Done()
			st, err := s.Get(ctx, t.key.id, "")
			switch {
			case err == nil:
				states[i] = st
			case !errdefs.IsNotFound(err):
				states[i] = &task.StateResponse{ID: t.key.id, Status: tasktypes.Status_UNKNOWN}
			}
		}()
	}
	asked.Wait()
	out := states[:0]
	for _, st := range states {
		if st != nil {
			out = append(out, st)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out, nil
}

// DeleteProcess removes an ended exec.
func (s *Service) DeleteProcess(ctx context.Context, id, execID string) (*task.DeleteResponse, error) {
	if execID == "" {
		return nil, fmt.Errorf("cannot delete a process of task %s: no exec id: %w", id, errdefs.ErrInvalidArgument)
	}
	c, err := s.living(ctx, id)
	if err != nil {
		return nil, err
	}
	return c.Delete(ctx, &task.DeleteRequest{ID: id, ExecID: execID})
}

// Kill signals a process, or with all every process of the task.
func (s *Service) Kill(ctx context.Context, id, execID string, signal uint32, all bool) error {
	c, err := s.living(ctx, id)
	if err != nil {
		return err
	}
	_, err = c.Kill(ctx, &task.KillRequest{ID: id, ExecID: execID, Signal: signal, All: all})
	return err
}

// Exec adds a process to a task; Start starts it.
func (s *Service) Exec(ctx context.Context, r *task.ExecProcessRequest) error {
	c, err := s.living(ctx, r.ID)
	if err != nil {
		return err
	}
	_, err = c.Exec(ctx, r)
	return err
}

// ResizePty sets the size of a terminal in characters.
func (s *Service) ResizePty(ctx context.Context, id, execID string, width, height uint32) error {
	c, err := s.living(ctx, id)
	if err != nil {
		return err
	}
	_, err = c.ResizePty(ctx, &task.ResizePtyRequest{ID: id, ExecID: execID, Width: width, Height: height})
	return err
}

// CloseIO ends a process's input.
func (s *Service) CloseIO(ctx context.Context, id, execID string, stdin bool) error {
	c, err := s.living(ctx, id)
	if err != nil {
		return err
	}
	_, err = c.CloseIO(ctx, &task.CloseIORequest{ID: id, ExecID: execID, Stdin: stdin})
	return err
}

// Pause freezes a task.
func (s *Service) Pause(ctx context.Context, id string) error {
	c, err := s.living(ctx, id)
	if err != nil {
		return err
	}
	_, err = c.Pause(ctx, &task.PauseRequest{ID: id})
	return err
}

// Resume undoes Pause.
func (s *Service) Resume(ctx context.Context, id string) error {
	c, err := s.living(ctx, id)
	if err != nil {
		return err
	}
	_, err = c.Resume(ctx, &task.ResumeRequest{ID: id})
	return err
}

// Pids lists the processes of a task.
func (s *Service) Pids(ctx context.Context, id string) ([]*tasktypes.ProcessInfo, error) {
	c, err := s.living(ctx, id)
	if err != nil {
		return nil, err
	}
	resp, err := c.Pids(ctx, &task.PidsRequest{ID: id})
	return resp.GetProcesses(), err
}

// Update changes the limits of a running task.
func (s *Service) Update(ctx context.Context, id string, resources *anypb.Any, annotations map[string]string) error {
	c, err := s.living(ctx, id)
	if err != nil {
		return err
	}
	_, err = c.Update(ctx, &task.UpdateTaskRequest{ID: id, Resources: resources, Annotations: annotations})
	return err
}

// Checkpoint writes a task's state to the directory path.
func (s *Service) Checkpoint(ctx context.Context, id, path string, options *anypb.Any) error {
	c, err := s.living(ctx, id)
	if err != nil {
		return err
	}
	_, err = c.Checkpoint(ctx, &task.CheckpointTaskRequest{ID: id, Path: path, Options: options})
	return err
}

// Wait answers when the process has ended, also when it did long ago, or while no daemon lived.
func (s *Service) Wait(ctx context.Context, id, execID string) (status uint32, at *timestamppb.Timestamp, err error) {
	t, err := s.find(ctx, id)
	if err != nil {
		return 0, nil, err
	}
	if c := t.connection(); c != nil {
		resp, err := c.Wait(ctx, &task.WaitRequest{ID: id, ExecID: execID})
		if err == nil {
			return resp.ExitStatus, resp.ExitedAt, nil
		}
		if !errdefs.IsUnavailable(err) {
			return 0, nil, err
		}
		select { // the shim died: it may have written the exit down
		case <-t.followed:
		case <-ctx.Done():
			return 0, nil, ctx.Err()
		}
	}
	if d := t.remains(); d != nil && d.exited && execID == "" {
		return d.status, timestamppb.New(d.exitedAt), nil
	}
	return 0, nil, fmt.Errorf("cannot wait for task %s: its shim is dead: %w", id, errdefs.ErrUnavailable)
}

// Metrics reads the counters of the tasks that match f (id), all shims at once, each for at most a second. A task that
// does not answer, or runs no more, is left out.
func (s *Service) Metrics(ctx context.Context, f filters.Filter) ([]*types.Metric, error) {
	all, err := s.list(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	var mu sync.Mutex
	var out []*types.Metric
	var asked sync.WaitGroup
	for _, t := range all {
		id := t.key.id
		if !f.Match(filters.AdapterFunc(func(path []string) (string, bool) {
			return id, len(path) == 1 && path[0] == "id"
		})) {
			continue
		}
		asked.Add(1)
		go func() {
			defer asked.Done()
			c, err := s.living(ctx, id)
			if err != nil {
				return
			}
			resp, err := c.Stats(ctx, &task.StatsRequest{ID: id})
			if err != nil {
				if !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) && !errors.Is(err, context.DeadlineExceeded) {
					s.log.Warn("no metrics of task", "id", id, "error", err)
				}
				return
			}
			mu.Lock()
			defer mu.Unlock()
			out = append(out, &types.Metric{Timestamp: timestamppb.Now(), ID: id, Data: resp.Stats})
		}()
	}
	asked.Wait()
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out, nil
}

// tellDeleted is the event that a dead shim cannot send any more.
func (s *Service) tellDeleted(t *Task, resp *task.DeleteResponse) error {
	body, err := typeurl.MarshalAnyToProto(&events.TaskDelete{
		ContainerID: t.key.id, ID: t.key.id, Pid: resp.Pid, ExitStatus: resp.ExitStatus, ExitedAt: resp.ExitedAt,
	})
	if err != nil {
		return err
	}
	return s.events.Forward(&types.Envelope{
		Timestamp: timestamppb.New(time.Now()), Namespace: t.key.ns, Topic: "/tasks/delete", Event: body,
	})
}
