package service

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/mount"
	"github.com/managerd/managerd/shimapi/parking"
)

// parkedKinds are all descriptors that may be parked of a process.
var parkedKinds = []string{
	parking.Pidfd, parking.Terminal, parking.Stdin, parking.Stdout, parking.Stderr, parking.ClientStdin, parking.ClientStdout,
	parking.ClientStderr,
}

var _ shimapi.TaskService = (*Service)(nil)

var empty = &emptypb.Empty{}

// statuses translates our states into containerd's.
var statuses = map[shimapi.State]tasktypes.Status{
	shimapi.Created: tasktypes.Status_CREATED, shimapi.Running: tasktypes.Status_RUNNING,
	shimapi.Pausing: tasktypes.Status_PAUSING, shimapi.Paused: tasktypes.Status_PAUSED,
	shimapi.Checkpointing: tasktypes.Status_RUNNING, shimapi.Stopped: tasktypes.Status_STOPPED,
}

// State says how a process is.
func (s *Service) State(_ context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.findLocked(r.ID, r.ExecID, shimapi.ReqState)
	if err != nil {
		return nil, err
	}
	status := statuses[p.state]
	if p.kind == shimapi.Exec && p.state == shimapi.Running && s.init.state == shimapi.Paused {
		status = tasktypes.Status_PAUSED // an exec stands still with its container
	}
	resp := &task.StateResponse{
		ID: r.ID, ExecID: p.execID, Bundle: s.cfg.Bundle, Pid: uint32(p.pid), Status: status,
		Stdin: p.io.stdin, Stdout: p.io.stdout, Stderr: p.io.stderr, Terminal: p.io.terminal,
	}
	if p.state == shimapi.Stopped {
		resp.ExitStatus, resp.ExitedAt = uint32(p.status), timestamppb.New(p.exitedAt)
	}
	return resp, nil
}

// Start releases the parked init, or starts an exec.
func (s *Service) Start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	ctx = context.WithoutCancel(ctx)
	if r.ExecID != "" {
		return s.startExec(ctx, r)
	}
	s.transition.Lock()
	defer s.transition.Unlock()
	p, err := s.find(r.ID, "", shimapi.ReqStart)
	if err != nil {
		return nil, err
	}
	p.starting.Lock()
	defer p.starting.Unlock()
	restored := s.pending(p)
	err = s.through(p, shimapi.ReqStart, func() error {
		if restored {
			return s.restoreInit(ctx, p)
		}
		if err := p.io.open.OpenInput(); err != nil {
			return fmt.Errorf("cannot start container %s: %w", r.ID, err)
		}
		failpoint.Hit("shim.start.input")
		return s.container.Start(ctx)
	})
	if err != nil {
		return nil, err
	}
	failpoint.Hit("shim.start.released")
	s.keepOrLog(p)
	failpoint.Hit("shim.start.kept")
	s.park(p) // its input was opened
	if restored {
		defer func() { go s.awaitExit(p) }()
	}
	return &task.StartResponse{Pid: uint32(p.pid)}, s.emit("/tasks/start", &events.TaskStart{ContainerID: r.ID, Pid: uint32(p.pid)})
}

// Wait answers when the process has ended.
func (s *Service) Wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	p, err := s.find(r.ID, r.ExecID, shimapi.ReqWait)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.exited:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return &task.WaitResponse{ExitStatus: uint32(p.status), ExitedAt: timestamppb.New(p.exitedAt)}, nil
}

// Kill signals a process, or with all every process of the container. SIGKILL to all of an exec ends what it has begotten too.
func (s *Service) Kill(_ context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	sig, err := signal(r.Signal)
	if err != nil {
		return nil, fmt.Errorf("cannot kill container %s: %w", r.ID, err)
	}
	s.mu.Lock()
	p, err := s.findLocked(r.ID, r.ExecID, shimapi.ReqKill)
	if err != nil && r.All && r.ExecID == "" && s.init != nil && s.init.state == shimapi.Stopped {
		p, err = s.init, nil // processes may be left after init
	}
	c := s.container
	var proc *reaper.Process
	if p != nil {
		proc = p.proc
	}
	s.mu.Unlock()
	switch {
	case err != nil:
		return nil, err
	case p.kind == shimapi.Init && proc == nil && s.pending(p):
		return empty, s.killPending(p, sig, r.All)
	case p.kind == shimapi.Init:
		return empty, c.Signal(sig, r.All)
	case proc == nil:
		return nil, fmt.Errorf("cannot kill exec %s: it has not been started: %w", p.label(r.ID), errdefs.ErrFailedPrecondition)
	}
	if r.All && sig == unix.SIGKILL {
		if err := c.KillExec(r.ExecID, proc); err != nil {
			return nil, fmt.Errorf("cannot kill exec %s: %w", p.label(r.ID), err)
		}
		return empty, nil
	}
	if sig != unix.SIGKILL {
		c.Settle(proc)
	}
	if err := proc.Signal(sig); err != nil {
		return nil, fmt.Errorf("cannot kill exec %s: %w: %w", p.label(r.ID), err, errdefs.ErrNotFound)
	}
	return empty, nil
}

// Pids lists the container's processes; those that an exec started carry its id.
func (s *Service) Pids(_ context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	s.mu.Lock()
	_, err := s.findLocked(r.ID, "", shimapi.ReqPids)
	c := s.container
	execs := s.execPIDsLocked()
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	pids, err := c.Pids()
	if err != nil {
		return nil, err
	}
	resp := &task.PidsResponse{}
	for _, pid := range pids {
		info := &tasktypes.ProcessInfo{Pid: uint32(pid)}
		if id, ok := execs[pid]; ok {
			if info.Info, err = typeurl.MarshalAnyToProto(&options.ProcessDetails{ExecID: id}); err != nil {
				return nil, err
			}
		}
		resp.Processes = append(resp.Processes, info)
	}
	return resp, nil
}

// execPIDsLocked gives the execs that run, by pid: the number of one that has ended may be another's.
func (s *Service) execPIDsLocked() map[int]string {
	execs := map[int]string{}
	for id, e := range s.execs {
		if e.proc != nil && e.state == shimapi.Running {
			execs[e.pid] = id
		}
	}
	return execs
}

// Pause freezes the container.
func (s *Service) Pause(_ context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	s.transition.Lock()
	defer s.transition.Unlock()
	p, err := s.find(r.ID, "", shimapi.ReqPause)
	if err != nil {
		return nil, err
	}
	if err := s.through(p, shimapi.ReqPause, s.container.Pause); err != nil {
		return nil, err
	}
	return empty, s.emit("/tasks/paused", &events.TaskPaused{ContainerID: r.ID})
}

// Resume undoes Pause.
func (s *Service) Resume(_ context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	s.transition.Lock()
	defer s.transition.Unlock()
	p, err := s.find(r.ID, "", shimapi.ReqResume)
	if err != nil {
		return nil, err
	}
	if err := s.through(p, shimapi.ReqResume, s.container.Resume); err != nil {
		return nil, err
	}
	defer s.compact()
	return empty, s.emit("/tasks/resumed", &events.TaskResumed{ContainerID: r.ID})
}

// Update changes limits of the running container.
func (s *Service) Update(_ context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	s.transition.Lock()
	defer s.transition.Unlock()
	if _, err := s.find(r.ID, "", shimapi.ReqUpdate); err != nil {
		return nil, err
	}
	if r.Resources == nil {
		return nil, fmt.Errorf("cannot update container %s: no resources given: %w", r.ID, errdefs.ErrInvalidArgument)
	}
	var res specs.LinuxResources
	if err := json.Unmarshal(r.Resources.Value, &res); err != nil {
		return nil, fmt.Errorf("cannot update container %s: malformed resources: %w: %w", r.ID, err, errdefs.ErrInvalidArgument)
	}
	return empty, s.container.Update(&res)
}

// Stats reads the cgroup's counters.
func (s *Service) Stats(_ context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	s.mu.Lock()
	_, err := s.findLocked(r.ID, "", shimapi.ReqStats)
	cg, pid := s.cgroup, 0
	if err == nil && s.init.state != shimapi.Stopped {
		pid = s.init.pid
	}
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if cg == nil {
		return nil, fmt.Errorf("container %s has no cgroup to read: %w", r.ID, errdefs.ErrUnavailable)
	}
	m, err := cg.Stats()
	if err != nil {
		return nil, err
	}
	if pid != 0 {
		if err := cgroups.AddNetwork(m, pid); err != nil {
			s.cfg.Log.Debug("no network counters", "error", err) // it may just have ended
		}
	}
	any, err := typeurl.MarshalAny(m)
	if err != nil {
		return nil, err
	}
	return &task.StatsResponse{Stats: &anypb.Any{TypeUrl: any.GetTypeUrl(), Value: any.GetValue()}}, nil
}

// ResizePty sets the size of a process's terminal.
func (s *Service) ResizePty(_ context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ID, r.ExecID, shimapi.ReqResizePty)
	if err != nil {
		return nil, err
	}
	open := s.streamsOf(p)
	if open == nil {
		return nil, fmt.Errorf("cannot resize the terminal of %s: it has not been started: %w", p.label(r.ID), errdefs.ErrFailedPrecondition)
	}
	return empty, open.Resize(r.Width, r.Height)
}

// CloseIO ends a process's input, after what the client has written so far.
func (s *Service) CloseIO(_ context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ID, r.ExecID, shimapi.ReqCloseIO)
	if err != nil {
		return nil, err
	}
	if !r.Stdin {
		return empty, nil
	}
	s.mu.Lock()
	open := p.io.open
	p.inputEnd = true // should it not have been started yet
	s.mu.Unlock()
	if open != nil {
		open.CloseStdin()
	}
	return empty, s.keep(p)
}

// Delete removes an ended or never started exec, or the ended or never started container.
func (s *Service) Delete(_ context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	if r.ExecID != "" {
		return s.deleteExec(r)
	}
	if _, err := s.find(r.ID, "", shimapi.ReqDelete); err != nil { // nothing there, or not yet: no reason to wait for a Create
		return nil, err
	}
	s.transition.Lock()
	defer s.transition.Unlock()
	p, err := s.find(r.ID, "", shimapi.ReqDelete)
	if err != nil {
		return nil, err
	}
	if err := s.removeContainer(p); err != nil {
		return nil, err
	}
	failpoint.Hit("shim.delete.removed")
	resp := s.forget(p)
	return resp, s.emit("/tasks/delete", &events.TaskDelete{
		ContainerID: r.ID, ID: r.ID, Pid: resp.Pid, ExitStatus: resp.ExitStatus, ExitedAt: resp.ExitedAt,
	})
}

// forget takes a process's last step, and says how it ended.
func (s *Service) forget(p *process) *task.DeleteResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	resp := &task.DeleteResponse{Pid: uint32(p.pid), ExitStatus: uint32(p.status)}
	if !p.exitedAt.IsZero() {
		resp.ExitedAt = timestamppb.New(p.exitedAt)
	}
	p.state = shimapi.MustNext(p.kind, p.state, shimapi.ReqDelete)
	defer s.unpark(p, parkedKinds...)
	if p.kind == shimapi.Exec {
		delete(s.execs, p.execID)
	} else {
		s.deleted = true
	}
	return resp
}

// removeContainer takes everything of the container away but its record.
func (s *Service) removeContainer(p *process) error {
	s.mu.Lock()
	parked := p.state == shimapi.Created
	s.mu.Unlock()
	if s.pending(p) {
		p.starting.Lock()
		err := s.endPendingLocked(p, killed)
		p.starting.Unlock()
		if err != nil {
			return err
		}
	} else if parked {
		if err := s.container.Signal(9, false); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		<-p.exited
	}
	begin := time.Now()
	if err := s.container.Destroy(); err != nil {
		return err
	}
	failpoint.Hit("shim.delete.destroyed")
	s.stopOOM()
	s.closeStreams(s.all()...)
	if err := mount.Unmount(filepath.Join(s.cfg.Bundle, shimapi.RootfsDir)); err != nil {
		return err
	}
	failpoint.Hit("shim.delete.unmounted")
	s.phases.note("delete", time.Since(begin))
	return os.RemoveAll(filepath.Join(s.cfg.Bundle, shimapi.StdioDir))
}

// Connect says which processes are behind this connection.
func (s *Service) Connect(_ context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	resp := &task.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: "v3"}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.init != nil {
		resp.TaskPid = uint32(s.init.pid)
	}
	return resp, nil
}

// Shutdown ends the shim, if it keeps nothing any more; else it is not an error, and does nothing.
func (s *Service) Shutdown(context.Context, *task.ShutdownRequest) (*emptypb.Empty, error) {
	s.transition.Lock() // a Create under way decides first
	defer s.transition.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if idle := s.init == nil || s.deleted; idle && !s.ended {
		s.ended = true
		close(s.ending)
	}
	return empty, nil
}
