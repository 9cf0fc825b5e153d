package service

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/blackbox"
)

// decodeExec reads what is to be executed: an OCI process as JSON, or our ExecSpec, which has a time limit beside it.
func decodeExec(any *anypb.Any) (spec *specs.Process, timeout time.Duration, err error) {
	if name := any.TypeUrl[strings.LastIndexByte(any.TypeUrl, '/')+1:]; name == string((&shim.ExecSpec{}).ProtoReflect().Descriptor().FullName()) {
		var own shim.ExecSpec
		if err := proto.Unmarshal(any.Value, &own); err != nil {
			return nil, 0, fmt.Errorf("malformed %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		if timeout = time.Duration(own.TimeoutNano); timeout < 0 {
			return nil, 0, fmt.Errorf("its timeout, %v, is negative: %w", timeout, errdefs.ErrInvalidArgument)
		}
		if any = own.Process; any == nil {
			return nil, 0, fmt.Errorf("%s without a process: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	spec = &specs.Process{}
	if err := json.Unmarshal(any.Value, spec); err != nil {
		return nil, 0, fmt.Errorf("malformed spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return spec, timeout, nil
}

// limit sets when an exec that has been started must have ended, if it has a limit.
func (s *Service) limit(p *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.timeout > 0 && p.deadline.IsZero() {
		p.deadline = time.Now().Add(p.timeout)
	}
}

// unlimit takes limit back: the exec could not be started, and may be tried again.
func (s *Service) unlimit(p *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.deadline = time.Time{}
}

// watchDeadline has an exec that runs ended when its time is over.
func (s *Service) watchDeadline(p *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !p.deadline.IsZero() {
		p.timer = time.AfterFunc(time.Until(p.deadline), func() { s.expire(p) })
	}
}

// expire kills an exec whose time is over, and all that it has begotten.
func (s *Service) expire(p *process) {
	s.mu.Lock()
	over := p.state != shimapi.Running
	c, proc := s.container, p.proc
	if !over {
		p.timedOut = true
	}
	s.mu.Unlock()
	if over {
		return
	}
	s.box.Add(blackbox.Note, p.timeout, "time limit of exec "+p.execID)
	s.cfg.Log.Info("killing an exec whose time is over", "exec", p.execID, "timeout", p.timeout)
	s.keepOrLog(p) // a successor goes on
	if err := c.KillExec(p.execID, proc); err != nil {
		s.cfg.Log.Error("an exec whose time is over has left processes", "exec", p.execID, "error", err)
		_ = proc.Signal(unix.SIGKILL)
	}
}

// endDeadline is called when an exec has ended; it says whether that was because its time was over.
func (s *Service) endDeadline(p *process, status int) (timedOut bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
	p.timedOut = p.timedOut && status == killed
	return p.timedOut
}
