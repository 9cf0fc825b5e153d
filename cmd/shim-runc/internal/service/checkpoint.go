package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine/criu"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
)

// Checkpoint saves the container's processes to the directory r.Path, and ends them if its options say so. What they had
// written is with the client before, so that a restored container does not write it again.
func (s *Service) Checkpoint(_ context.Context, r *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	s.transition.Lock()
	defer s.transition.Unlock()
	p, err := s.find(r.ID, "", shimapi.ReqCheckpoint)
	if err != nil {
		return nil, err
	}
	ck, err := s.decodeCheckpoint(r)
	if err != nil {
		return nil, fmt.Errorf("cannot checkpoint container %s: %w", r.ID, err)
	}
	s.mu.Lock()
	paused := p.state == shimapi.Paused
	s.mu.Unlock()
	begin := time.Now()
	if err := s.through(p, shimapi.ReqCheckpoint, func() error { return s.checkpoint(p, ck, paused) }); err != nil {
		return nil, err
	}
	s.phases.note("checkpoint", time.Since(begin))
	if err := s.emit("/tasks/checkpointed", &events.TaskCheckpointed{ContainerID: r.ID}); err != nil {
		return nil, err
	}
	if ck.Exit { // so that it can be deleted at once
		select {
		case <-p.exited:
		case <-time.After(stubborn):
			s.cfg.Log.Error("a container that was checkpointed does not end", "waited", stubborn)
		}
	}
	return empty, nil
}

func (s *Service) checkpoint(p *process, ck criu.Checkpoint, paused bool) error {
	if err := criu.Find(); err != nil { // before anything is touched
		return fmt.Errorf("cannot checkpoint container %s: %w", s.cfg.ID, err)
	}
	if !paused {
		if err := s.container.Pause(); err != nil {
			return err
		}
	}
	p.io.open.Drain(patience)
	err := s.container.Checkpoint(ck)
	select {
	case <-p.proc.Done():
		return err
	default:
	}
	// An end that the freezer holds up is one more reason to let it go on.
	if !paused || err == nil && ck.Exit {
		if rerr := s.container.Resume(); rerr != nil && (err != nil || !ck.Exit) {
			err = errors.Join(err, rerr)
		}
	}
	return err
}

// decodeCheckpoint reads the request and its containerd.runc.v1.CheckpointOptions; none is the default.
func (s *Service) decodeCheckpoint(r *task.CheckpointTaskRequest) (ck criu.Checkpoint, err error) {
	opts := &options.CheckpointOptions{}
	if r.Options.GetTypeUrl() != "" {
		v, err := typeurl.UnmarshalAny(r.Options)
		if err != nil {
			return ck, fmt.Errorf("cannot read its options: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		var ok bool
		if opts, ok = v.(*options.CheckpointOptions); !ok {
			return ck, fmt.Errorf("its options are a %s, not containerd.runc.v1.CheckpointOptions: %w", r.Options.GetTypeUrl(), errdefs.ErrInvalidArgument)
		}
	}
	if opts.ParentPath != "" {
		return ck, fmt.Errorf("option parent_path %q: a checkpoint is always a whole one: %w", opts.ParentPath, errdefs.ErrNotImplemented)
	}
	work := opts.WorkPath
	if work == "" {
		work = KeptOptions(s.cfg.Bundle).CriuWorkPath
	}
	ck = criu.Checkpoint{
		Options: criu.Options{
			OpenTCP: opts.OpenTcp, ExternalUnixSockets: opts.ExternalUnixSockets, Terminal: opts.Terminal, FileLocks: opts.FileLocks,
			EmptyNamespaces: opts.EmptyNamespaces, CgroupsMode: opts.CgroupsMode,
		},
		Place: s.place(r.Path, work), Exit: opts.Exit, FIFOs: map[string]string{},
	}
	if ck.Images == "" {
		ck.Images = opts.ImagePath
	}
	for _, stream := range []string{"stdin", "stdout", "stderr"} {
		ck.FIFOs[stream] = filepath.Join(s.cfg.Bundle, shimapi.StdioDir, shimapi.StdioName("", stream))
	}
	for what, path := range map[string]string{"directory of the images": ck.Images, "work directory": work} {
		if (path != "" || what != "work directory") && !filepath.IsAbs(path) {
			return ck, fmt.Errorf("the %s %q is not an absolute path: %w", what, path, errdefs.ErrInvalidArgument)
		}
	}
	return ck, ck.Validate()
}

func (s *Service) place(images, work string) criu.Place {
	return criu.Place{Images: images, Work: work, Bundle: s.cfg.Bundle, Config: filepath.Join(s.cfg.Bundle, shimapi.CriuConfigFile)}
}

// A container that is created from a checkpoint has no process before Start: what criu restores runs at once. Until then
// its init is in the state created with pid 0, and the kept runtime options name the checkpoint (CriuImagePath).

// restoreOf is what a container that is not restored yet will be restored from.
func (s *Service) restoreOf(opts *options.Options) criu.Restore {
	return criu.Restore{Place: s.place(opts.CriuImagePath, opts.CriuWorkPath)}
}

// prepareRestore refuses early what Start would refuse.
func (s *Service) prepareRestore(opts *options.Options) error {
	if !filepath.IsAbs(opts.CriuImagePath) {
		return fmt.Errorf("the checkpoint %q is not an absolute path: %w", opts.CriuImagePath, errdefs.ErrInvalidArgument)
	}
	r := s.restoreOf(opts)
	return r.Check()
}

// pending says that p is the init of a container that is not restored yet.
func (s *Service) pending(p *process) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return p.kind == shimapi.Init && p.state == shimapi.Created && p.pid == 0
}

// restoreInit is Start of such a container. After an error it is as before.
func (s *Service) restoreInit(ctx context.Context, p *process) (err error) {
	fail := func(err error) error { return fmt.Errorf("cannot restore container %s: %w", s.cfg.ID, err) }
	opts := KeptOptions(s.cfg.Bundle)
	spec, err := readSpec(s.cfg.Bundle)
	if err != nil {
		return fail(err)
	}
	if spec.Process != nil {
		spec.Process.Terminal = p.io.terminal
	}
	e, err := s.cfg.NewEngine(s.engineConfig(opts), opts.BinaryName)
	if err != nil {
		return fail(err)
	}
	files, err := s.openStreams(p, opts)
	if err != nil {
		return fail(err)
	}
	var c Container
	if !p.io.terminal { // a terminal is there when the process is
		err = p.io.open.OpenInput()
	}
	if err == nil {
		c, err = e.Restore(ctx, s.cfg.ID, s.cfg.Bundle, spec, files, s.restoreOf(opts))
	}
	p.io.open.Started()
	if err != nil {
		p.io.open.Close()
		s.mu.Lock()
		p.io.open = nil
		s.mu.Unlock()
		return err
	}
	if err := p.io.open.OpenInput(); err != nil {
		s.cfg.Log.Error("a restored container runs without its input", "error", err)
	}
	s.setProcess(p, c.Init())
	s.mu.Lock()
	s.container = c
	s.mu.Unlock()
	if err := os.WriteFile(filepath.Join(s.cfg.Bundle, shimapi.InitPidFile), []byte(strconv.Itoa(p.pid)), 0o644); err != nil {
		s.cfg.Log.Error("cannot write the pid of a restored container", "error", err)
	}
	if err := s.recordProcess(p); err != nil {
		s.cfg.Log.Error("cannot record a restored container", "error", err)
	}
	s.watchCgroup(cgroups.Load(p.pid))
	return nil
}

// killPending ends a container before it is restored, as a signal ends a parked init.
func (s *Service) killPending(p *process, sig unix.Signal, all bool) error {
	p.starting.Lock()
	defer p.starting.Unlock()
	if !s.pending(p) { // a Start was first
		s.mu.Lock()
		c := s.container
		s.mu.Unlock()
		return c.Signal(sig, all)
	}
	if sig != unix.SIGKILL && sig != unix.SIGTERM {
		return fmt.Errorf("cannot kill container %s with %s: it is not restored before it is started: %w", s.cfg.ID, unix.SignalName(sig), errdefs.ErrFailedPrecondition)
	}
	return s.endPendingLocked(p, 128+int(sig))
}

// endPendingLocked tells the exit of what never ran; p.starting is held.
func (s *Service) endPendingLocked(p *process, status int) error {
	now := time.Now()
	err := s.record(&ledgerpb.Record{Exit: &ledgerpb.Exit{ContainerId: s.cfg.ID, Status: uint32(status), ExitedUnixNano: now.UnixNano()}},
		"/tasks/exit", &events.TaskExit{ContainerID: s.cfg.ID, ID: s.cfg.ID, ExitStatus: uint32(status), ExitedAt: timestamppb.New(now)})
	if err != nil {
		return err
	}
	s.mu.Lock()
	p.state = shimapi.MustNext(p.kind, p.state, shimapi.Exited)
	p.status, p.exitedAt = status, now
	s.mu.Unlock()
	s.keepOrLog(p)
	close(p.exited)
	return nil
}

// unrestored stands for the engine's container until there is one.
type unrestored struct {
	Container // nil: the lifecycle table lets nobody ask for the rest
	id        string
}

func (u unrestored) refuse(what string) error {
	return fmt.Errorf("cannot %s container %s: it is not restored before it is started: %w", what, u.id, errdefs.ErrFailedPrecondition)
}

// SharedPID is of no meaning without a process.
func (u unrestored) SharedPID() bool { return false }

// Pids are none.
func (u unrestored) Pids() ([]int, error) { return nil, nil }

// Exec is refused.
func (u unrestored) Exec(context.Context, string, *specs.Process, engine.IO) (*reaper.Process, error) {
	return nil, u.refuse("exec in")
}

// Update is refused.
func (u unrestored) Update(*specs.LinuxResources) error { return u.refuse("update") }

// Signal is refused: Kill does not come here.
func (u unrestored) Signal(unix.Signal, bool) error { return u.refuse("signal") }

// Destroy has nothing to do.
func (u unrestored) Destroy() error { return nil }
