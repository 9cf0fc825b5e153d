package service

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/cgroups/early"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// Exec adds a process to the container; Start starts it.
func (s *Service) Exec(_ context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	if r.ExecID == "" {
		return nil, fmt.Errorf("exec in container %s has no id: %w", r.ID, errdefs.ErrInvalidArgument)
	}
	if !fileName(r.ExecID) {
		return nil, fmt.Errorf("exec id %.80q in container %s is not a name: it is used as a file name: %w", r.ExecID, r.ID, errdefs.ErrInvalidArgument)
	}
	if r.Spec == nil {
		return nil, fmt.Errorf("exec %s in container %s has no spec: %w", r.ExecID, r.ID, errdefs.ErrInvalidArgument)
	}
	spec, timeout, err := decodeExec(r.Spec)
	if err != nil {
		return nil, fmt.Errorf("cannot exec %s in container %s: %w", r.ExecID, r.ID, err)
	}
	if len(spec.Args) == 0 {
		return nil, fmt.Errorf("exec %s in container %s has no args: %w", r.ExecID, r.ID, errdefs.ErrInvalidArgument)
	}
	early.Attach() // Start follows
	spec.Terminal = r.Terminal
	p := &process{
		kind: shimapi.Exec, execID: r.ExecID, spec: spec, timeout: timeout, exited: make(chan struct{}),
		state: shimapi.MustNext(shimapi.Exec, shimapi.Absent, shimapi.ReqCreate),
		io:    streams{stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr, terminal: r.Terminal},
	}
	s.mu.Lock()
	if _, err := s.findLocked(r.ID, "", shimapi.ReqExec); err != nil {
		s.mu.Unlock()
		return nil, err
	}
	if old := s.execs[r.ExecID]; old != nil {
		defer s.mu.Unlock()
		return nil, shimapi.Check(shimapi.Exec, old.label(r.ID), old.state, shimapi.ReqCreate)
	}
	s.execs[r.ExecID] = p
	s.mu.Unlock()
	if err := s.keep(p); err != nil {
		s.mu.Lock()
		delete(s.execs, r.ExecID)
		s.mu.Unlock()
		return nil, err
	}
	failpoint.Hit("shim.exec.kept")
	return empty, s.emit("/tasks/exec-added", &events.TaskExecAdded{ContainerID: r.ID, ExecID: r.ExecID})
}

// fileName says whether an exec's id can name its streams in the bundle (see shimapi.StdioName).
func fileName(id string) bool {
	const longest = 224 // leaves room in NAME_MAX for the stream, and for what a log keeps beside it
	return len(id) <= longest && !strings.HasPrefix(id, ".") && !strings.ContainsFunc(id, func(r rune) bool { return r == '/' || r < ' ' })
}

func (s *Service) startExec(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	p, err := s.find(r.ID, r.ExecID, shimapi.ReqStart)
	if err != nil {
		return nil, err
	}
	p.starting.Lock()
	defer p.starting.Unlock()
	if err := s.mayStartExec(r); err != nil {
		return nil, err
	}
	files, err := s.openStreams(p, KeptOptions(s.cfg.Bundle))
	if err != nil {
		return nil, fmt.Errorf("cannot exec %s: %w", p.label(r.ID), err)
	}
	if !p.io.terminal { // a terminal's process is there first, and with it the other side
		err = p.io.open.OpenInput()
	}
	var proc *reaper.Process
	if err == nil {
		s.launch(p, true)
		s.park(p) // what it writes must outlive us from its first byte on
		if err = s.keep(p); err == nil {
			failpoint.Hit("shim.startexec.launching")
			s.limit(p) // its time begins here
			files.Tree = p.timeout > 0
			proc, err = s.container.Exec(ctx, r.ExecID, p.spec, files)
		}
	}
	failpoint.Hit("shim.startexec.forked")
	p.io.open.Started()
	if err != nil {
		s.closeStreams(p)
		s.unpark(p, parkedKinds...)
		s.launch(p, false)
		s.unlimit(p)
		s.keepOrLog(p)
		return nil, err
	}
	if err := p.io.open.OpenInput(); err != nil {
		s.cfg.Log.Error("exec runs without its input", "exec", r.ExecID, "error", err)
	}
	s.setProcess(p, proc)
	s.park(p) // its pidfd, which tells how it ended when nobody else can any more
	s.mu.Lock()
	p.state = shimapi.MustNext(shimapi.Exec, p.state, shimapi.ReqStart)
	s.mu.Unlock()
	failpoint.Hit("shim.startexec.parked")
	s.keepOrLog(p)
	failpoint.Hit("shim.startexec.kept")
	s.watchDeadline(p)
	if err := s.recordProcess(p); err != nil {
		s.cfg.Log.Error("cannot record exec", "exec", r.ExecID, "error", err)
	}
	failpoint.Hit("shim.startexec.recorded")
	err = s.emit("/tasks/exec-started", &events.TaskExecStarted{ContainerID: r.ID, ExecID: r.ExecID, Pid: uint32(p.pid)})
	failpoint.Hit("shim.startexec.told")
	go s.awaitExit(p)
	return &task.StartResponse{Pid: uint32(p.pid)}, err
}

// launch notes that an exec is about to be forked, or that it could not be.
func (s *Service) launch(p *process, begins bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.launching = begins
}

// mayStartExec asks again under the exec's starting lock: another Start or a Delete may have been first, and the
// container's state may have changed since Exec.
func (s *Service) mayStartExec(r *task.StartRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.findLocked(r.ID, r.ExecID, shimapi.ReqStart); err != nil {
		return err
	}
	if _, err := s.findLocked(r.ID, "", shimapi.ReqExec); err != nil {
		return err
	}
	if s.dying {
		return fmt.Errorf("cannot start exec %s: the init of container %s has ended: %w", r.ExecID, r.ID, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (s *Service) deleteExec(r *task.DeleteRequest) (*task.DeleteResponse, error) {
	p, err := s.find(r.ID, r.ExecID, shimapi.ReqDelete)
	if err != nil {
		return nil, err
	}
	p.starting.Lock()
	defer p.starting.Unlock()
	if p, err = s.find(r.ID, r.ExecID, shimapi.ReqDelete); err != nil { // a Start or another Delete was first
		return nil, err
	}
	s.closeStreams(p)
	failpoint.Hit("shim.deleteexec.closed")
	resp := s.forget(p)
	failpoint.Hit("shim.deleteexec.forgotten")
	s.drop(p)
	s.trimmer.deleted()
	s.compact()
	return resp, nil
}
