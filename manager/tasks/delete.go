package tasks

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/shims"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// Delete removes an ended task and says how it ended. It goes on when ctx ends before it is done: whoever asks again
// waits for the same deletion.
func (s *Service) Delete(ctx context.Context, id string) (*task.DeleteResponse, error) {
	for {
		_, t, err := s.find(ctx, id)
		if err != nil {
			return nil, err
		}
		d, mine := t.beginDeletion()
		if mine {
			run := func() {
				d.resp, d.err = s.delete(t)
				t.endDeletion(d)
			}
			if err := s.background(run); err != nil {
				d.err = err
				t.endDeletion(d)
			}
		}
		select {
		case <-d.done:
		case <-ctx.Done():
			return nil, fmt.Errorf("task %s is being deleted: %w", id, ctx.Err())
		}
		if mine {
			return d.resp, d.err
		}
		// Somebody else was first: the task is gone now, or it is our turn.
	}
}

func (t *Task) beginDeletion() (d *deletion, mine bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.deletion != nil {
		return t.deletion, false
	}
	t.deletion = &deletion{done: make(chan struct{})}
	return t.deletion, true
}

func (t *Task) endDeletion(d *deletion) {
	t.mu.Lock()
	t.deletion = nil
	t.mu.Unlock()
	close(d.done)
}

func (s *Service) delete(t *Task) (*task.DeleteResponse, error) {
	ctx := s.in(t.key.ns)
	for {
		shim, dead, changed := t.now()
		switch {
		case dead != nil:
			return s.deleteDead(ctx, t, dead)
		case shim == nil:
			return nil, fmt.Errorf("task %s: %w", t.key.id, errdefs.ErrNotFound)
		}
		resp, err := shim.Delete(ctx, &task.DeleteRequest{ID: t.key.id})
		switch {
		case err == nil:
			failpoint.Hit("tasks.delete.answered")
			return resp, s.release(ctx, t, shim)
		case errdefs.IsNotFound(err):
			// It was deleted before, and the answer was lost.
			return s.recorded(shim), s.release(ctx, t, shim)
		case !lost(shim, err):
			return nil, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// recorded is how a task that was deleted had ended.
func (s *Service) recorded(shim *shims.Shim) *task.DeleteResponse {
	resp := &task.DeleteResponse{ExitStatus: unknownExit, ExitedAt: timestamppb.Now()}
	if d := s.read(shim.Bundle); d.remains.exited {
		resp.Pid, resp.ExitStatus, resp.ExitedAt = d.remains.pid, d.remains.status, timestamppb.New(d.remains.exitedAt)
	}
	return resp
}

// release ends the shim of a task that is gone, once it has told its last event, and removes the bundle.
func (s *Service) release(ctx context.Context, t *Task, shim *shims.Shim) error {
	err := s.dismiss(ctx, t, shim)
	if err == nil {
		s.forget(t, shim)
	}
	return err
}

// dismiss ends a shim and what follows it.
func (s *Service) dismiss(ctx context.Context, t *Task, shim *shims.Shim) error {
	log := s.log.With("namespace", t.key.ns, "id", t.key.id)
	t.expectEnd(true)
	ectx, cancel := context.WithTimeout(ctx, ending)
	defer cancel()
	if err := shim.End(ectx); err != nil {
		log.Warn("shim does not shut down", "error", err)
	}
	if s.shared(shim) {
		shim.Close() // it goes on for others; what follows it ends
	} else {
		select {
		case <-t.followed:
		case <-ectx.Done():
			if s.ctx.Err() != nil {
				return fmt.Errorf("the daemon is ending; the next one removes what is left of task %s: %w", t.key.id, errdefs.ErrUnavailable)
			}
			log.Warn("shim does not end; killing it")
			if err := shim.KillProcess(); err != nil && !errdefs.IsNotFound(err) {
				log.Error("cannot kill shim", "error", err)
			}
			select {
			case <-t.followed: // the connection breaks, and the ledger has the rest
			case <-time.After(ending):
			}
		}
	}
	if now, _, _ := t.now(); now != nil {
		now.Close()
	}
	failpoint.Hit("tasks.delete.ended")
	return nil
}

// forget removes the bundle of a task whose shim has ended.
func (s *Service) forget(t *Task, shim *shims.Shim) {
	shim.Forget()
	failpoint.Hit("tasks.delete.forgotten")
	if err := shim.Bundle.Remove(); err != nil { // the task is gone all the same; the next one of its name clears it away
		s.log.Error("cannot remove bundle", "namespace", t.key.ns, "id", t.key.id, "error", err)
	}
	failpoint.Hit("tasks.delete.removed")
	s.drop(t)
}

// deleteDead removes a task whose shim is dead, and whose container has ended.
func (s *Service) deleteDead(ctx context.Context, t *Task, d *remains) (*task.DeleteResponse, error) {
	if d.alive() {
		return nil, fmt.Errorf("cannot delete task %s: its shim is dead but process %d runs: %w", t.key.id, d.pid, errdefs.ErrFailedPrecondition)
	}
	resp, err := s.shims.Cleanup(ctx, d.bundle)
	if err != nil {
		return nil, fmt.Errorf("cannot delete task %s: %w", t.key.id, err)
	}
	if d.own || d.joined { // the ledger is the truth; what it does not say nobody knows
		resp.Pid, resp.ExitStatus = d.pid, unknownExit
		if d.exited {
			resp.ExitStatus, resp.ExitedAt = d.status, timestamppb.New(d.exitedAt)
		}
	}
	failpoint.Hit("tasks.dead.cleaned")
	if !d.told {
		s.tellEnd(t, d, resp)
	}
	failpoint.Hit("tasks.dead.told")
	if err := d.bundle.Remove(); err != nil {
		return nil, err
	}
	s.drop(t)
	return resp, nil
}

// tellEnd tells what a dead shim could not tell any more: that its container has ended, and is gone. It stands in the ledger
// first, as if the shim had told it: whoever deletes the task again, should this daemon be killed, tells what is missing.
func (s *Service) tellEnd(t *Task, d *remains, resp *task.DeleteResponse) {
	id := t.key.id
	ended := []lastWord{{"/tasks/delete", &events.TaskDelete{ContainerID: id, ID: id, Pid: resp.Pid, ExitStatus: resp.ExitStatus, ExitedAt: resp.ExitedAt}, nil}}
	if !d.exited {
		ended = append([]lastWord{{
			"/tasks/exit", &events.TaskExit{ContainerID: id, ID: id, Pid: resp.Pid, ExitStatus: resp.ExitStatus, ExitedAt: resp.ExitedAt},
			&ledgerpb.Exit{
				ContainerId: id, Pid: resp.Pid, Status: resp.ExitStatus, ExitedUnixNano: resp.ExitedAt.AsTime().UnixNano(),
				Unknown: "it ended while no shim lived",
			},
		}}, ended...)
	}
	err := s.writeEnd(d, ended)
	if err == nil {
		s.catchUp(d.bundle, d.bundle.Source(), s.read(d.bundle).events)
		return
	}
	if d.own {
		s.log.Error("cannot write down how a task ended", "namespace", t.key.ns, "id", id, "error", err)
	}
	for _, e := range ended {
		body, err := typeurl.MarshalAnyToProto(e.event)
		if err == nil {
			err = s.events.Forward(&types.Envelope{Timestamp: timestamppb.New(time.Now()), Namespace: t.key.ns, Topic: e.topic, Event: body})
		}
		if err != nil {
			s.log.Error("cannot tell of a task", "namespace", t.key.ns, "id", id, "topic", e.topic, "error", err)
		}
	}
}

// lastWord is an event of a task's end, and how it ended if that is not written down yet.
type lastWord struct {
	topic string
	event proto.Message
	exit  *ledgerpb.Exit
}

func (s *Service) writeEnd(d *remains, ended []lastWord) error {
	if !d.own {
		return fmt.Errorf("the shim is another's: %w", errdefs.ErrNotImplemented)
	}
	var records []*ledgerpb.Record
	for _, e := range ended {
		body, err := typeurl.MarshalAnyToProto(e.event)
		if err != nil {
			return err
		}
		records = append(records, &ledgerpb.Record{Exit: e.exit, Event: &ledgerpb.Event{Topic: e.topic, TypeUrl: body.TypeUrl, Value: body.Value}})
	}
	return d.bundle.Append(records...)
}
