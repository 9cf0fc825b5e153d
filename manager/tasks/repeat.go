package tasks

import (
	"context"
	"fmt"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/shims"
)

// succession is how long a request waits for the successor of a shim that has died.
const succession = 30 * time.Second

// maxTries is how often a request is made that breaks the connection, or kills the shim, each time.
const maxTries = 3

// successor waits until there is something else in the place of a shim that is gone.
func (s *Service) successor(ctx context.Context, t *Task, changed <-chan struct{}) error {
	late := time.NewTimer(succession)
	defer late.Stop()
	select {
	case <-changed:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("task %s: its shim has died, and there is no successor yet: %w", t.key.id, ctx.Err())
	case <-s.ctx.Done():
		return fmt.Errorf("task %s: the daemon is ending: %w", t.key.id, errdefs.ErrUnavailable)
	case <-late.C:
		return fmt.Errorf("task %s: its shim has died, and there is no successor after %v: %w", t.key.id, succession, errdefs.ErrUnavailable)
	}
}

// repeat makes a request that may be made twice: it goes to the successor when the shim dies under it. died tells call
// whether that has happened, so that it can look whether there is anything left to do.
func repeat[T any](ctx context.Context, s *Service, id string, call func(ctx context.Context, c *shims.Shim, died bool) (T, error)) (T, error) {
	var none T
	for try := 1; ; try++ {
		ctx, c, err := s.living(ctx, id)
		if err != nil {
			return none, err
		}
		v, err := call(ctx, c, try > 1)
		if err == nil || !lost(c, err) || try == maxTries {
			return v, err
		}
	}
}

// state asks how a process is.
func state(ctx context.Context, c *shims.Shim, id, execID string) (*task.StateResponse, error) {
	return c.State(ctx, &task.StateRequest{ID: id, ExecID: execID})
}

// deletedExec is how an exec had ended that was deleted, when the answer was lost.
func deletedExec(c *shims.Shim, execID string) (*task.DeleteResponse, error) {
	records, err := c.Bundle.Ledger()
	if err != nil {
		return nil, err
	}
	var resp *task.DeleteResponse
	for _, r := range records { // the newest of that name
		if e := r.Exit; e != nil && e.ExecId == execID {
			resp = &task.DeleteResponse{Pid: e.Pid, ExitStatus: e.Status, ExitedAt: timestamppb.New(time.Unix(0, e.ExitedUnixNano))}
		}
	}
	if resp == nil {
		return nil, fmt.Errorf("exec %s of task %s: %w", execID, c.Bundle.ID, errdefs.ErrNotFound)
	}
	return resp, nil
}

// startAgain is Start after the shim has died under one. What is still created was not started: of an exec the shim keeps,
// before it forks, that it is about to. Its successor ends one that it finds so, and which has no pid: it may have run.
func startAgain(ctx context.Context, c *shims.Shim, id, execID string) (pid uint32, started bool, err error) {
	st, err := state(ctx, c, id, execID)
	switch {
	case err != nil:
		return 0, false, err
	case st.Status == tasktypes.Status_CREATED:
		return 0, false, nil
	case execID != "" && st.Pid == 0:
		return 0, false, fmt.Errorf("exec %s of task %s: its shim died while it started it, and whether it ran is not known; delete it: %w",
			execID, id, errdefs.ErrUnknown)
	}
	return st.Pid, true, nil
}
