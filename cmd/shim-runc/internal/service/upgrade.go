package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/cmd/shim-runc/internal/handover"
	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/parking"
	"github.com/managerd/managerd/shimapi/version"
)

// shimService is the name of managerd.shim.v1 on the wire.
const shimService = "managerd.shim.v1.Shim"

// Parks says whether a call may be under way while the shim is replaced: the successor is asked the same again.
func Parks(service, method string) bool {
	switch service {
	case shimapi.TaskServiceV2, shimapi.TaskServiceV3:
		return method == "Wait"
	case shimService:
		return method == "Events" || method == "Upgrade" || method == "Logs"
	case shimapi.SandboxService:
		return method == "WaitSandbox"
	}
	return false
}

// Again makes the payload with which a parked call is asked of the successor: events and logs go on after the newest that
// the client has, and an upgrade is known to have been made.
func Again(service, method string, payload, sent []byte) ([]byte, error) {
	switch {
	case service != shimService:
		return payload, nil
	case method == "Upgrade":
		return proto.Marshal(&shim.UpgradeRequest{Handed: true})
	case method == "Events" && sent != nil:
		var last shim.EventRecord
		if err := proto.Unmarshal(sent, &last); err != nil {
			return nil, err
		}
		return proto.Marshal(&shim.EventsRequest{Since: last.Seq})
	case method == "Logs" && sent != nil:
		var last shim.LogsResponse
		var asked shim.LogsRequest
		if err := errors.Join(proto.Unmarshal(sent, &last), proto.Unmarshal(payload, &asked)); err != nil {
			return nil, err
		}
		asked.After = last.Position
		return proto.Marshal(&asked)
	}
	return payload, nil
}

// Count is the server's interceptor. A handler runs on when its client has gone, so connections do not tell.
func (s *Service) Count(ctx context.Context, in ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, next ttrpc.Method) (any, error) {
	if !parks(info.FullMethod) {
		s.handlers.enter()
		defer s.handlers.leave()
	}
	return next(ctx, in)
}

// parks is Parks for "/service/method".
func parks(full string) bool {
	for i := len(full) - 1; i > 0; i-- {
		if full[i] == '/' {
			return Parks(full[1:i], full[i+1:])
		}
	}
	return false
}

// Outcome is what has become of an upgrade, known to the program that runs after it.
type Outcome struct {
	Upgraded *shim.UpgradeResponse
	Err      error // why the new program did not take over
}

// Upgrade has the shim replaced. It does not return then: the successor answers, who is asked again with Handed set.
func (s *Service) Upgrade(ctx context.Context, r *shim.UpgradeRequest) (*shim.UpgradeResponse, error) {
	if r.Handed {
		o := s.cfg.Outcome
		if o.Upgraded == nil && o.Err == nil {
			o.Err = fmt.Errorf("no upgrade of the shim of container %s is known: %w", s.cfg.ID, errdefs.ErrFailedPrecondition)
		}
		if o.Err != nil {
			return nil, shimapi.ToWire(o.Err)
		}
		return o.Upgraded, nil
	}
	if s.cfg.Replace == nil {
		return nil, shimapi.ToWire(fmt.Errorf("cannot upgrade the shim of container %s: %w", s.cfg.ID, errdefs.ErrNotImplemented))
	}
	err := s.cfg.Replace(context.WithoutCancel(ctx), r.Binary)
	return nil, shimapi.ToWire(fmt.Errorf("cannot upgrade the shim of container %s: %w", s.cfg.ID, err))
}

// Quiet stops everything: no handler runs, no exit is taken from the kernel and not told, no byte is in this process
// alone. It is to be called when no new request comes, and lasts until Unquiet. When ctx ends before, everything goes on,
// and the error says what was in the way (Unavailable); FailedPrecondition when there is nothing that could go on.
func (s *Service) Quiet(ctx context.Context) (err error) {
	busy := func(what string, err error) error {
		return fmt.Errorf("%s: %v: %w", what, err, errdefs.ErrUnavailable) // a deadline of ours, not the client's
	}
	if err := s.handlers.close(ctx); err != nil {
		return busy("a request is under way", err)
	}
	defer func() {
		if err != nil {
			s.handlers.open()
		}
	}()
	if err := s.mayHand(); err != nil {
		return err
	}
	for {
		if err := s.exits.close(ctx); err != nil {
			return busy("a process has ended, and its exit is being told", err)
		}
		s.cfg.Reaper.Freeze()
		if !s.untold() {
			break
		}
		s.cfg.Reaper.Thaw()
		s.exits.open()
		select {
		case <-time.After(time.Millisecond): // whoever tells of it is about to enter
		case <-ctx.Done():
			return busy("a process has ended, and its exit is not told yet", ctx.Err())
		}
	}
	held := s.all()
	goOn := func(held []*process) {
		s.letAll(held)
		s.cfg.Reaper.Thaw()
		s.exits.open()
	}
	for i, p := range held {
		if open := s.streamsOf(p); open != nil {
			if err := open.Hold(ctx); err != nil {
				goOn(held[:i])
				return busy("process "+p.label(s.cfg.ID), err)
			}
		}
	}
	// Those of processes that there are no more.
	if err := logsink.AllRest(ctx); err != nil {
		goOn(held)
		return err
	}
	return nil
}

// Unquiet ends a Quiet that succeeded.
func (s *Service) Unquiet() {
	s.letAll(s.all())
	s.cfg.Reaper.Thaw()
	s.exits.open()
	s.handlers.open()
}

func (s *Service) letAll(held []*process) {
	for _, p := range held {
		if open := s.streamsOf(p); open != nil {
			open.Let()
		}
	}
}

func (s *Service) mayHand() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if (s.init == nil || s.deleted) && !s.keepsSandbox || s.ended || s.closed {
		return fmt.Errorf("it keeps nothing: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// all are the processes that there are.
func (s *Service) all() []*process {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.init == nil {
		return nil
	}
	return append([]*process{s.init}, s.execsLocked()...)
}

// untold says that there is an exit which the kernel does not have any more and the ledger not yet.
func (s *Service) untold() bool {
	for _, p := range s.all() {
		s.mu.Lock()
		proc, told := p.proc, p.state == shimapi.Stopped
		s.mu.Unlock()
		if proc != nil && !told && s.cfg.Reaper.Taken(proc) {
			return true
		}
	}
	return s.sandboxUntold != nil && s.sandboxUntold()
}

// Hand gives what a successor needs, while it is quiet. The files are copies, for the caller to close.
func (s *Service) Hand() (*shimstate.Handover, Held, error) {
	table, err := s.Export()
	if err != nil {
		return nil, nil, err
	}
	s.parker.mu.Lock()
	socket := s.parker.socket
	s.parker.mu.Unlock()
	h := &shimstate.Handover{
		Schema: handover.Schema, Table: table, Incarnation: s.incarnation, StartedUnixNano: s.started.UnixNano(), Parking: socket,
		Version: version.Version, Revision: version.Revision, Timings: s.phases.copy(), Upgrades: s.cfg.Upgrades,
	}
	held := Held{}
	for _, p := range s.all() {
		files := map[string]*os.File{}
		if open := s.streamsOf(p); open != nil {
			files = open.Handles()
		}
		s.mu.Lock()
		proc := p.proc
		s.mu.Unlock()
		if proc != nil {
			if f, err := proc.Pidfd(); err == nil { // else it has ended, and that is told
				files[parking.Pidfd] = f
			}
		}
		held[p.execID] = files
	}
	return h, held, nil
}
