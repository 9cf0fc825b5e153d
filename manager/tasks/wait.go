package tasks

import (
	"context"
	"fmt"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/shims"
)

// Wait answers when the process has ended, also when it did long ago, or while no daemon lived. It outlasts a broken
// connection to the shim. Unavailable when the shim is dead and the end of the process was not written down.
func (s *Service) Wait(ctx context.Context, id, execID string) (status uint32, at *timestamppb.Timestamp, err error) {
	ctx, t, err := s.find(ctx, id)
	if err != nil {
		return 0, nil, err
	}
	for {
		shim, dead, changed := t.now()
		switch {
		case dead != nil && dead.exited && execID == "":
			return dead.status, timestamppb.New(dead.exitedAt), nil
		case dead != nil:
			return 0, nil, fmt.Errorf("cannot wait for task %s: its shim is dead: %w", id, errdefs.ErrUnavailable)
		case shim == nil:
			return 0, nil, fmt.Errorf("task %s: %w", id, errdefs.ErrNotFound)
		}
		w := s.beginWait(t, shim, execID)
		select {
		case <-w.done:
		case <-ctx.Done():
			return 0, nil, ctx.Err()
		}
		if w.err == nil {
			return w.resp.ExitStatus, w.resp.ExitedAt, nil
		}
		if !lost(shim, w.err) {
			return 0, nil, w.err
		}
		select {
		case <-changed:
		case <-s.ctx.Done():
			return 0, nil, w.err
		case <-ctx.Done():
			return 0, nil, ctx.Err()
		}
	}
}

// beginWait joins those who wait for the same process, or is the first of them: clients that come and go leave no request
// behind in the shim.
func (s *Service) beginWait(t *Task, shim *shims.Shim, execID string) *wait {
	t.mu.Lock()
	if w := t.waits[execID]; w != nil {
		t.mu.Unlock()
		return w
	}
	w := &wait{done: make(chan struct{})}
	t.waits[execID] = w
	t.mu.Unlock()
	err := s.background(func() {
		resp, err := shim.Wait(s.in(t.key.ns), &task.WaitRequest{ID: t.key.id, ExecID: execID})
		t.forgetWait(execID, w)
		w.answer(resp, err)
	})
	if err != nil {
		t.forgetWait(execID, w)
		w.answer(nil, err)
	}
	return w
}

func (t *Task) forgetWait(execID string, w *wait) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.waits[execID] == w {
		delete(t.waits, execID)
	}
}

// endWait answers those who wait for an exec that was deleted before it was ever started: it will not end.
func (s *Service) endWait(ctx context.Context, id, execID string) {
	_, t, err := s.find(ctx, id)
	if err != nil {
		return
	}
	t.mu.Lock()
	w := t.waits[execID]
	delete(t.waits, execID)
	t.mu.Unlock()
	if w != nil {
		w.answer(nil, fmt.Errorf("exec %s of task %s was deleted: %w", execID, id, errdefs.ErrNotFound))
	}
}
