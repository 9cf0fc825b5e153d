package shimfake

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	"github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	ledgerpb "github.com/managerd/managerd/protos/ledger"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

var empty = &emptypb.Empty{}

// service is the task API, each method with its fault.
type service struct{ s *Shim }

var _ shimapi.TaskService = service{}

func (v service) State(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	return through(v.s, "State", v.s.state)(ctx, r)
}

func (v service) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	v.s.making.Lock()
	defer v.s.making.Unlock()
	return through(v.s, "Create", v.s.create)(ctx, r)
}

func (v service) Start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	return through(v.s, "Start", v.s.start)(ctx, r)
}

func (v service) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	return through(v.s, "Delete", v.s.remove)(ctx, r)
}

func (v service) Pids(ctx context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	return through(v.s, "Pids", func(_ context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
		return &task.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: pid()}}}, v.s.check(r.ID, shimapi.ReqPids)
	})(ctx, r)
}

func (v service) Pause(ctx context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	return through(v.s, "Pause", func(_ context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
		if err := v.s.step(r.ID, shimapi.ReqPause); err != nil {
			return nil, err
		}
		return empty, v.s.emit("/tasks/paused", &events.TaskPaused{ContainerID: r.ID})
	})(ctx, r)
}

func (v service) Resume(ctx context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	return through(v.s, "Resume", func(_ context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
		if err := v.s.step(r.ID, shimapi.ReqResume); err != nil {
			return nil, err
		}
		return empty, v.s.emit("/tasks/resumed", &events.TaskResumed{ContainerID: r.ID})
	})(ctx, r)
}

func (v service) Checkpoint(ctx context.Context, r *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return through(v.s, "Checkpoint", v.s.checkpoint)(ctx, r)
}

func (v service) Kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	return through(v.s, "Kill", func(_ context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
		return empty, v.s.Exit(r.ExecID, 128+r.Signal)
	})(ctx, r)
}

func (v service) Exec(ctx context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	return through(v.s, "Exec", v.s.exec)(ctx, r)
}

func (v service) ResizePty(ctx context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
	return through(v.s, "ResizePty", func(_ context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
		return empty, v.s.check(r.ID, shimapi.ReqResizePty)
	})(ctx, r)
}

func (v service) CloseIO(ctx context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	return through(v.s, "CloseIO", func(_ context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
		return empty, v.s.check(r.ID, shimapi.ReqCloseIO)
	})(ctx, r)
}

func (v service) Update(ctx context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	return through(v.s, "Update", func(_ context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
		return empty, v.s.check(r.ID, shimapi.ReqUpdate)
	})(ctx, r)
}

func (v service) Wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	return through(v.s, "Wait", v.s.wait)(ctx, r)
}

func (v service) Stats(ctx context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	return through(v.s, "Stats", func(_ context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
		if err := v.s.check(r.ID, shimapi.ReqStats); err != nil {
			return nil, err
		}
		any, err := typeurl.MarshalAny(&cgroup1.Metrics{})
		if err != nil {
			return nil, err
		}
		return &task.StatsResponse{Stats: &anypb.Any{TypeUrl: any.GetTypeUrl(), Value: any.GetValue()}}, nil
	})(ctx, r)
}

func (v service) Connect(ctx context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	return through(v.s, "Connect", func(context.Context, *task.ConnectRequest) (*task.ConnectResponse, error) {
		return &task.ConnectResponse{ShimPid: pid(), TaskPid: pid(), Version: "v3"}, nil
	})(ctx, r)
}

func (v service) Shutdown(ctx context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	return through(v.s, "Shutdown", func(context.Context, *task.ShutdownRequest) (*emptypb.Empty, error) {
		v.s.making.Lock()
		defer v.s.making.Unlock()
		v.s.mu.Lock()
		defer v.s.mu.Unlock()
		if idle := v.s.init == nil || v.s.init.state == shimapi.Deleted; idle && !v.s.down {
			v.s.down = true
			close(v.s.ended)
		}
		return empty, nil
	})(ctx, r)
}

func (s *Shim) check(id string, req shimapi.Request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.findLocked(id, "", req)
	return err
}

// step takes the init through a request that changes its state.
func (s *Shim) step(id string, req shimapi.Request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.findLocked(id, "", req)
	if err == nil {
		p.state = shimapi.MustNext(p.kind, p.state, req)
	}
	return err
}

var statuses = map[shimapi.State]tasktypes.Status{
	shimapi.Created: tasktypes.Status_CREATED, shimapi.Running: tasktypes.Status_RUNNING,
	shimapi.Paused: tasktypes.Status_PAUSED, shimapi.Stopped: tasktypes.Status_STOPPED,
}

func (s *Shim) state(_ context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.findLocked(r.ID, r.ExecID, shimapi.ReqState)
	if err != nil {
		return nil, err
	}
	resp := &task.StateResponse{
		ID: r.ID, ExecID: p.execID, Bundle: s.cfg.Bundle, Pid: pid(), Status: statuses[p.state],
		Stdin: p.stdin, Stdout: p.stdout, Stderr: p.stderr, Terminal: p.terminal,
	}
	if p.images != "" {
		resp.Pid = 0
	}
	if p.state == shimapi.Stopped {
		resp.ExitStatus, resp.ExitedAt = p.status, timestamppb.New(p.at)
	}
	return resp, nil
}

func (s *Shim) create(_ context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return nil, fmt.Errorf("cannot create container %s: its shim was shut down: %w", r.ID, errdefs.ErrUnavailable)
	}
	if s.init != nil || r.ID != s.cfg.ID {
		return nil, shimapi.Check(shimapi.Init, r.ID, shimapi.Created, shimapi.ReqCreate)
	}
	var spec struct {
		Process struct {
			Args []string `json:"args"`
		} `json:"process"`
	}
	data, err := os.ReadFile(filepath.Join(s.cfg.Bundle, shimapi.ConfigFile))
	if err == nil {
		err = json.Unmarshal(data, &spec)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot create container %s: %w: %w", r.ID, err, errdefs.ErrInvalidArgument)
	}
	p := &process{
		kind: shimapi.Init, args: spec.Process.Args, state: shimapi.Created, exited: make(chan struct{}),
		stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr, terminal: r.Terminal,
	}
	if r.Checkpoint != "" {
		return s.createFrom(p, r)
	}
	if err := s.record(p); err != nil {
		return nil, err
	}
	s.init = p
	return &task.CreateTaskResponse{Pid: pid()}, s.emit("/tasks/create", &events.TaskCreate{ContainerID: r.ID, Bundle: r.Bundle, Pid: pid()})
}

// record writes down that there is a process.
func (s *Shim) record(p *process) error {
	if err := os.WriteFile(filepath.Join(s.cfg.Bundle, shimapi.InitPidFile), []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		return err
	}
	_, err := s.ledger.Append(&ledgerpb.Record{Process: &ledgerpb.Process{
		ContainerId: s.cfg.ID, Pid: pid(), StartTicks: startTicks(), Terminal: p.terminal, Stdin: p.stdin, Stdout: p.stdout, Stderr: p.stderr,
	}})
	return err
}

// startTicks is field 22 of our own /proc/PID/stat.
func startTicks() (ticks uint64) {
	data, err := os.ReadFile("/proc/self/stat")
	if err == nil {
		f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
		ticks, _ = strconv.ParseUint(f[19], 10, 64)
	}
	return ticks
}

func (s *Shim) start(_ context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.findLocked(r.ID, r.ExecID, shimapi.ReqStart)
	if err != nil {
		return nil, err
	}
	if p.images != "" {
		if err := s.restore(p); err != nil {
			return nil, err
		}
	}
	p.state = shimapi.MustNext(p.kind, p.state, shimapi.ReqStart)
	if p.kind == shimapi.Init {
		err = s.emit("/tasks/start", &events.TaskStart{ContainerID: r.ID, Pid: pid()})
	} else {
		err = s.emit("/tasks/exec-started", &events.TaskExecStarted{ContainerID: r.ID, ExecID: r.ExecID, Pid: pid()})
	}
	if err != nil {
		return nil, err
	}
	if len(p.args) == 2 && p.args[0] == "exit" {
		status, err := strconv.ParseUint(p.args[1], 10, 32)
		if err != nil {
			return nil, err
		}
		if err := s.exitLocked(p, uint32(status)); err != nil {
			return nil, err
		}
	}
	return &task.StartResponse{Pid: pid()}, nil
}

func (s *Shim) exec(_ context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	var spec struct {
		Args []string `json:"args"`
	}
	if err := json.Unmarshal(r.Spec.GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("exec %s: malformed spec: %w: %w", r.ExecID, err, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.findLocked(r.ID, "", shimapi.ReqExec); err != nil {
		return nil, err
	}
	if old := s.execs[r.ExecID]; old != nil {
		return nil, shimapi.Check(shimapi.Exec, r.ExecID, old.state, shimapi.ReqCreate)
	}
	s.execs[r.ExecID] = &process{
		kind: shimapi.Exec, execID: r.ExecID, args: spec.Args, state: shimapi.Created, exited: make(chan struct{}),
		stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr, terminal: r.Terminal,
	}
	return empty, s.emit("/tasks/exec-added", &events.TaskExecAdded{ContainerID: r.ID, ExecID: r.ExecID})
}

func (s *Shim) wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	s.mu.Lock()
	p, err := s.findLocked(r.ID, r.ExecID, shimapi.ReqWait)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	select {
	case <-p.exited:
	case <-s.stopped:
		return nil, errGone
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return &task.WaitResponse{ExitStatus: p.status, ExitedAt: timestamppb.New(p.at)}, nil
}

func (s *Shim) remove(_ context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.findLocked(r.ID, r.ExecID, shimapi.ReqDelete)
	if err != nil {
		return nil, err
	}
	if p.kind == shimapi.Init && p.state == shimapi.Created {
		if err := s.exitLocked(p, 137); err != nil {
			return nil, err
		}
	}
	p.state = shimapi.MustNext(p.kind, p.state, shimapi.ReqDelete)
	resp := &task.DeleteResponse{Pid: pid(), ExitStatus: p.status}
	if !p.at.IsZero() {
		resp.ExitedAt = timestamppb.New(p.at)
	}
	if p.kind == shimapi.Exec {
		delete(s.execs, r.ExecID)
		return resp, nil
	}
	return resp, s.emit("/tasks/delete", &events.TaskDelete{
		ContainerID: r.ID, ID: r.ID, Pid: pid(), ExitStatus: resp.ExitStatus, ExitedAt: resp.ExitedAt,
	})
}

// own is managerd.shim.v1.
type own struct{ s *Shim }

var _ shim.ShimService = own{}

func (o own) Describe(ctx context.Context, r *shim.DescribeRequest) (*shim.DescribeResponse, error) {
	return through(o.s, "Describe", func(context.Context, *shim.DescribeRequest) (*shim.DescribeResponse, error) {
		return &shim.DescribeResponse{
			Version: "fake", Pid: pid(), Namespace: o.s.cfg.Namespace, Id: o.s.cfg.ID, Bundle: o.s.cfg.Bundle, LastSeq: o.s.ledger.Last(),
		}, nil
	})(ctx, r)
}

func (o own) Events(ctx context.Context, r *shim.EventsRequest, stream shim.Shim_EventsServer) error {
	fault, err := o.s.take("Events")
	if err != nil {
		return err
	}
	if !fault.After {
		if err := o.s.suffer(ctx, fault); err != nil {
			return shimapi.ToWire(err)
		}
	}
	for since := r.Since; ; {
		ended := false
		select {
		case <-o.s.ended:
			ended = true // what was written before is read below
		default:
		}
		records, more, err := o.s.ledger.Since(since, 64)
		if err != nil {
			return err
		}
		for _, rec := range records {
			since = rec.Seq
			if rec.Event == nil {
				continue
			}
			if err := stream.Send(&shim.EventRecord{
				Seq: rec.Seq, Timestamp: timestamppb.New(time.Unix(0, rec.UnixNano)), Topic: rec.Event.Topic,
				Event: &anypb.Any{TypeUrl: rec.Event.TypeUrl, Value: rec.Event.Value},
			}); err != nil {
				return err
			}
			if fault.After {
				if err := o.s.suffer(ctx, fault); err != nil {
					return shimapi.ToWire(err)
				}
			}
		}
		if len(records) > 0 {
			continue
		}
		if ended {
			return nil
		}
		select {
		case <-more:
		case <-o.s.ended:
		case <-o.s.stopped:
			return errGone
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Park takes the daemon's word for it: a fake has nothing that must outlive it.
func (o own) Park(ctx context.Context, r *shim.ParkRequest) (*shim.ParkResponse, error) {
	return through(o.s, "Park", func(context.Context, *shim.ParkRequest) (*shim.ParkResponse, error) { return &shim.ParkResponse{}, nil })(ctx, r)
}

func (o own) Exits(ctx context.Context, r *shim.ExitsRequest) (*shim.ExitsResponse, error) {
	return through(o.s, "Exits", func(_ context.Context, r *shim.ExitsRequest) (*shim.ExitsResponse, error) {
		resp := &shim.ExitsResponse{}
		records, _, err := o.s.ledger.Since(r.Since, 1<<20)
		for _, rec := range records {
			if e := rec.Exit; e != nil {
				resp.Exits = append(resp.Exits, &shim.Exit{
					Seq: rec.Seq, ContainerId: e.ContainerId, ExecId: e.ExecId, Pid: e.Pid, ExitStatus: e.Status,
					ExitedAt: timestamppb.New(time.Unix(0, e.ExitedUnixNano)),
				})
			}
		}
		return resp, err
	})(ctx, r)
}

// Upgrade is refused: a fake has no other code.
func (o own) Upgrade(ctx context.Context, r *shim.UpgradeRequest) (*shim.UpgradeResponse, error) {
	return through(o.s, "Upgrade", func(context.Context, *shim.UpgradeRequest) (*shim.UpgradeResponse, error) {
		return nil, shimapi.ToWire(fmt.Errorf("cannot upgrade a fake: %w", errdefs.ErrNotImplemented))
	})(ctx, r)
}

func (o own) Profile(context.Context, *shim.ProfileRequest, shim.Shim_ProfileServer) error {
	return shimapi.ToWire(fmt.Errorf("cannot profile a fake: %w", errdefs.ErrNotImplemented))
}
