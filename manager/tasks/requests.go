package tasks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sort"
	"sync"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/shims"
)

// Start starts the parked init, or an exec, and returns its pid.
func (s *Service) Start(ctx context.Context, id, execID string) (uint32, error) {
	return repeat(ctx, s, id, func(ctx context.Context, c *shims.Shim, died bool) (uint32, error) {
		if died {
			if pid, started, err := startAgain(ctx, c, id, execID); err != nil || started {
				return pid, err
			}
		}
		resp, err := c.Start(ctx, &task.StartRequest{ID: id, ExecID: execID})
		if died && errdefs.IsFailedPrecondition(err) { // only the connection had broken, and the first one was still under way
			if pid, started, err := startAgain(ctx, c, id, execID); err != nil || started {
				return pid, err
			}
		}
		if err == nil && execID == "" {
			if derr := os.RemoveAll(c.Bundle.CheckpointDir()); derr != nil { // it goes with the bundle
				s.log.Warn("cannot remove a checkpoint that was restored", "id", id, "error", derr)
			}
		}
		return resp.GetPid(), err
	})
}

// Get says how a process is. When the shim does not answer in time (700 ms) its status is unknown.
func (s *Service) Get(ctx context.Context, id, execID string) (*task.StateResponse, error) {
	_, t, err := s.find(ctx, id)
	if err != nil {
		return nil, err
	}
	asking, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	shim, dead, changed := t.now()
	switch {
	case shim != nil:
		st, err := ask(asking, s, t, shim, func(ctx context.Context, c *shims.Shim) (*task.StateResponse, error) {
			return c.State(ctx, &task.StateRequest{ID: id, ExecID: execID})
		})
		if err != nil && lost(shim, err) {
			if err = s.successor(asking, t, changed); err == nil {
				return s.Get(ctx, id, execID)
			}
		}
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			if execID == "" {
				if st := s.written(t); st != nil {
					return st, nil
				}
			}
			return s.unanswered(id, execID, shim.Bundle), nil
		}
		return st, err
	case dead != nil && execID == "":
		return dead.state(id), nil
	case dead != nil:
		return nil, fmt.Errorf("exec %s of task %s: the shim is dead: %w", execID, id, errdefs.ErrNotFound)
	}
	return nil, fmt.Errorf("task %s: %w", id, errdefs.ErrNotFound)
}

// unanswered is what can be said of a process whose shim does not answer: of the init, what the ledger has. b may be nil.
func (s *Service) unanswered(id, execID string, b *bundle.Bundle) *task.StateResponse {
	r := &task.StateResponse{ID: id, ExecID: execID, Status: tasktypes.Status_UNKNOWN}
	if b == nil {
		return r
	}
	r.Bundle = b.Path
	if execID == "" {
		d := s.read(b).remains
		r.Pid, r.Terminal, r.Stdin, r.Stdout, r.Stderr = d.pid, d.terminal, d.stdio[0], d.stdio[1], d.stdio[2]
	}
	return r
}

// state is what can be said without a shim.
func (d *remains) state(id string) *task.StateResponse {
	r := &task.StateResponse{
		ID: id, Bundle: d.bundle.Path, Pid: d.pid, Status: tasktypes.Status_UNKNOWN, Terminal: d.terminal,
		Stdin: d.stdio[0], Stdout: d.stdio[1], Stderr: d.stdio[2],
	}
	if d.exited {
		r.Status, r.ExitStatus, r.ExitedAt = tasktypes.Status_STOPPED, d.status, timestamppb.New(d.exitedAt)
	} else if !d.alive() {
		r.ExitStatus = unknownExit // it has ended, and nobody saw how
	}
	return r
}

// List says how every task of the namespace is, ordered by id. All shims are asked at once; one that does not answer
// in time (700 ms) holds nobody up and is shown as unknown. Those that lived before this daemon and have not been heard yet
// are not asked: see written.
func (s *Service) List(ctx context.Context) ([]*task.StateResponse, error) {
	all, err := s.list(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	states := make([]*task.StateResponse, len(all))
	var asked sync.WaitGroup
	for i, t := range s.unwritten(all, states) {
		asked.Add(1)
		go func() {
			defer asked.Done()
			st, err := s.Get(ctx, t.key.id, "")
			switch {
			case err == nil:
				states[i] = st
			case !errdefs.IsNotFound(err):
				states[i] = s.unanswered(t.key.id, "", t.found)
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
	resp, err := repeat(ctx, s, id, func(ctx context.Context, c *shims.Shim, died bool) (*task.DeleteResponse, error) {
		if died {
			if _, err := state(ctx, c, id, execID); errdefs.IsNotFound(err) { // it was done
				return deletedExec(c, execID)
			}
		}
		return c.Delete(ctx, &task.DeleteRequest{ID: id, ExecID: execID})
	})
	if err == nil {
		s.endWait(ctx, id, execID)
	}
	return resp, err
}

// Kill signals a process, or with all every process of the task. The init can be reached even when its shim is dead.
func (s *Service) Kill(ctx context.Context, id, execID string, signal uint32, all bool) error {
	ctx, t, err := s.find(ctx, id)
	if err != nil {
		return err
	}
	_, dead, _ := t.now()
	if dead != nil && dead.alive() && execID == "" && signal > 0 && signal <= 64 {
		return bundle.SignalInit(dead.pid, dead.ticks, unix.Signal(signal))
	}
	_, err = repeat(ctx, s, id, func(ctx context.Context, c *shims.Shim, died bool) (any, error) {
		if died && unix.Signal(signal) != unix.SIGKILL {
			return nil, fmt.Errorf("signal %d to task %s: its shim died when it was to send it, and whether it did is not known: %w",
				signal, id, errdefs.ErrUnknown)
		}
		_, err := c.Kill(ctx, &task.KillRequest{ID: id, ExecID: execID, Signal: signal, All: all})
		if died && errdefs.IsNotFound(err) {
			if st, serr := state(ctx, c, id, execID); serr == nil && st.Status == tasktypes.Status_STOPPED { // it was done
				return nil, nil
			}
		}
		return nil, err
	})
	return err
}

// Exec adds a process to a task; Start starts it.
func (s *Service) Exec(ctx context.Context, r *task.ExecProcessRequest) error {
	_, err := repeat(ctx, s, r.ID, func(ctx context.Context, c *shims.Shim, died bool) (any, error) {
		if died {
			if _, err := state(ctx, c, r.ID, r.ExecID); err == nil { // it was done
				return nil, nil
			}
		}
		return c.Exec(ctx, r)
	})
	return err
}

// ResizePty sets the size of a terminal in characters.
func (s *Service) ResizePty(ctx context.Context, id, execID string, width, height uint32) error {
	_, err := repeat(ctx, s, id, func(ctx context.Context, c *shims.Shim, _ bool) (any, error) {
		return c.ResizePty(ctx, &task.ResizePtyRequest{ID: id, ExecID: execID, Width: width, Height: height})
	})
	return err
}

// CloseIO ends a process's input.
func (s *Service) CloseIO(ctx context.Context, id, execID string, stdin bool) error {
	_, err := repeat(ctx, s, id, func(ctx context.Context, c *shims.Shim, _ bool) (any, error) {
		return c.CloseIO(ctx, &task.CloseIORequest{ID: id, ExecID: execID, Stdin: stdin})
	})
	return err
}

// Pause freezes a task.
func (s *Service) Pause(ctx context.Context, id string) error {
	_, err := repeat(ctx, s, id, func(ctx context.Context, c *shims.Shim, died bool) (any, error) {
		if died {
			if st, err := state(ctx, c, id, ""); err == nil && st.Status == tasktypes.Status_PAUSED { // it was done
				return nil, nil
			}
		}
		return c.Pause(ctx, &task.PauseRequest{ID: id})
	})
	return err
}

// Resume undoes Pause.
func (s *Service) Resume(ctx context.Context, id string) error {
	_, err := repeat(ctx, s, id, func(ctx context.Context, c *shims.Shim, died bool) (any, error) {
		if died {
			if st, err := state(ctx, c, id, ""); err == nil && st.Status == tasktypes.Status_RUNNING { // it was done
				return nil, nil
			}
		}
		return c.Resume(ctx, &task.ResumeRequest{ID: id})
	})
	return err
}

// Pids lists the processes of a task.
func (s *Service) Pids(ctx context.Context, id string) ([]*tasktypes.ProcessInfo, error) {
	resp, err := repeat(ctx, s, id, func(ctx context.Context, c *shims.Shim, _ bool) (*task.PidsResponse, error) {
		return c.Pids(ctx, &task.PidsRequest{ID: id})
	})
	return resp.GetProcesses(), err
}

// Update changes the limits of a running task.
func (s *Service) Update(ctx context.Context, id string, resources *anypb.Any, annotations map[string]string) error {
	_, err := repeat(ctx, s, id, func(ctx context.Context, c *shims.Shim, _ bool) (any, error) {
		return c.Update(ctx, &task.UpdateTaskRequest{ID: id, Resources: resources, Annotations: annotations})
	})
	return err
}

// Checkpoint writes criu's images of a task to the directory path, which the shim makes if it is not there.
func (s *Service) Checkpoint(ctx context.Context, id, path string, options *anypb.Any) error {
	ctx, c, err := s.living(ctx, id)
	if err != nil {
		return err
	}
	_, err = c.Checkpoint(ctx, &task.CheckpointTaskRequest{ID: id, Path: path, Options: options})
	return err
}

// Metrics reads the counters of the tasks that match f (id, namespace), many at once, each for at most a second. A task that does
// not answer, or runs no more, is left out; one that has not answered before is not waited for.
func (s *Service) Metrics(ctx context.Context, f filters.Filter) ([]*types.Metric, error) {
	all, err := s.list(ctx)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(t *Task) bool { return !f.Match(t) })
	metrics := make([]*types.Metric, len(all))
	room := make(chan struct{}, meters)
	var asked sync.WaitGroup
	for i, t := range all {
		room <- struct{}{}
		asked.Add(1)
		go func() {
			defer asked.Done()
			leave := sync.OnceFunc(func() { <-room })
			defer leave()
			defer time.AfterFunc(metering, leave).Stop()
			m, err := s.metric(ctx, t)
			if metrics[i] = m; err != nil {
				s.log.Warn("no metrics of task", "namespace", t.key.ns, "id", t.key.id, "error", err)
			}
		}()
	}
	asked.Wait()
	out := slices.DeleteFunc(metrics, func(m *types.Metric) bool { return m == nil })
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out, nil
}

// Field lets filters look at a task: id, namespace.
func (t *Task) Field(path []string) (string, bool) {
	if len(path) == 1 {
		switch path[0] {
		case "id":
			return t.key.id, true
		case "namespace":
			return t.key.ns, true
		}
	}
	return "", false
}

// metric reads one task's counters; none when it does not run.
func (s *Service) metric(ctx context.Context, t *Task) (*types.Metric, error) {
	if s.silent(t) {
		return nil, fmt.Errorf("shim of task %s does not answer: %w", t.key.id, errdefs.ErrUnavailable)
	}
	ctx, cancel := context.WithTimeout(ctx, counting)
	defer cancel()
	resp, err := repeat(ctx, s, t.key.id, func(ctx context.Context, c *shims.Shim, _ bool) (*task.StatsResponse, error) {
		return ask(ctx, s, t, c, func(ctx context.Context, c *shims.Shim) (*task.StatsResponse, error) {
			return c.Stats(ctx, &task.StatsRequest{ID: t.key.id})
		})
	})
	if err != nil {
		return nil, unlessEnded(err)
	}
	return &types.Metric{Timestamp: timestamppb.Now(), ID: t.key.id, Data: resp.Stats}, nil
}

func unlessEnded(err error) error {
	if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
		return nil
	}
	return err
}
