package service

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/cmd/shim-runc/internal/logger"
	"github.com/managerd/managerd/cmd/shim-runc/internal/stdio"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/mount"
)

// ringSize is how many bytes of log are kept at least of a process for which nobody named a sink, once it has written so
// much; at most it is twice that.
const ringSize = 64 << 10

// streams are a process's stdio as the client named it, and as it is open (nil before).
type streams struct {
	stdin, stdout, stderr string
	terminal              bool
	open                  *stdio.Streams
}

// Create mounts the rootfs and makes the container, its init parked, or, from a checkpoint, without any process. A client that goes away does not stop it half way;
// a failure leaves nothing of it.
func (s *Service) Create(ctx context.Context, r *task.CreateTaskRequest) (_ *task.CreateTaskResponse, err error) {
	ctx = context.WithoutCancel(ctx)
	s.transition.Lock()
	defer s.transition.Unlock()
	if err := s.mayCreate(r); err != nil {
		return nil, err
	}
	opts, err := decodeOptions(r.Options)
	if err != nil {
		return nil, fmt.Errorf("cannot create container %s: %w", r.ID, err)
	}
	if opts.ShimCgroup != "" {
		if err := cgroups.Join(opts.ShimCgroup, os.Getpid()); err != nil {
			return nil, fmt.Errorf("cannot create container %s: runtime option ShimCgroup: %w", r.ID, err)
		}
	}
	spec, err := readSpec(s.cfg.Bundle)
	if err != nil {
		return nil, fmt.Errorf("cannot create container %s: %w", r.ID, err)
	}
	if spec.Process != nil && spec.Process.Terminal != r.Terminal {
		// The request is what the client's streams were made for.
		spec.Process.Terminal = r.Terminal
	}
	undo := undoStack{}
	defer func() {
		if err != nil {
			undo.run(s.cfg.Log)
		}
	}()
	begin := time.Now()
	rootfs := filepath.Join(s.cfg.Bundle, shimapi.RootfsDir)
	if len(r.Rootfs) > 0 {
		if err := os.Mkdir(rootfs, 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("cannot create container %s: %w", r.ID, err)
		}
		if err := mount.Mount(r.Rootfs, rootfs); err != nil {
			return nil, fmt.Errorf("cannot create container %s: %w", r.ID, err)
		}
		undo.add(func() error { return mount.Unmount(rootfs) })
		failpoint.Hit("shim.create.mounted")
		s.phases.note("create.mount", time.Since(begin))
	}
	opts.CriuImagePath = r.Checkpoint
	if err := s.keepOptions(opts); err != nil {
		return nil, fmt.Errorf("cannot create container %s: %w", r.ID, err)
	}
	undo.add(func() error { return os.Remove(filepath.Join(s.cfg.Bundle, shimapi.OptionsFile)) })
	failpoint.Hit("shim.create.options")
	p := &process{
		kind: shimapi.Init, state: shimapi.Absent, exited: make(chan struct{}), spec: spec.Process,
		io: streams{stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr, terminal: r.Terminal},
	}
	e, err := s.cfg.NewEngine(s.engineConfig(opts), opts.BinaryName)
	if err != nil {
		return nil, fmt.Errorf("cannot create container %s: %w", r.ID, err)
	}
	var c Container
	if r.Checkpoint == "" {
		c, err = s.makeInit(ctx, e, p, opts, spec, &undo)
	} else if err = s.prepareRestore(opts); err != nil {
		err = fmt.Errorf("cannot restore container %s: %w", r.ID, err)
	} else {
		c = unrestored{id: r.ID}
	}
	if err != nil {
		return nil, err
	}
	p.state = shimapi.MustNext(shimapi.Init, shimapi.Absent, shimapi.ReqCreate)
	if err := s.keep(p); err != nil {
		return nil, err
	}
	failpoint.Hit("shim.create.kept")
	undo.add(func() error { s.drop(p); return nil })
	if err := s.emit("/tasks/create", &events.TaskCreate{
		ContainerID: r.ID, Bundle: r.Bundle, Rootfs: r.Rootfs, Checkpoint: r.Checkpoint, Pid: uint32(p.pid),
		IO: &events.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	}); err != nil {
		return nil, err
	}
	failpoint.Hit("shim.create.told")
	s.mu.Lock()
	s.init, s.container = p, c
	s.mu.Unlock()
	if r.Checkpoint == "" {
		s.park(p)
		failpoint.Hit("shim.create.parked")
		s.watchCgroup(cgroups.Load(p.pid))
		go s.awaitExit(p)
	}
	s.phases.note("create", time.Since(begin))
	return &task.CreateTaskResponse{Pid: uint32(p.pid)}, nil
}

// makeInit makes the container with its init parked, and records that.
func (s *Service) makeInit(ctx context.Context, e Engine, p *process, opts *options.Options, spec *specs.Spec, undo *undoStack) (Container, error) {
	fail := func(err error) (Container, error) {
		return nil, fmt.Errorf("cannot create container %s: %w", s.cfg.ID, err)
	}
	files, err := s.openStreams(p, opts)
	if err != nil {
		return fail(err)
	}
	undo.add(func() error { return p.io.open.Close() })
	failpoint.Hit("shim.create.streams")
	c, err := e.Create(ctx, s.cfg.ID, s.cfg.Bundle, spec, files)
	p.io.open.Started()
	if err != nil {
		return nil, err
	}
	failpoint.Hit("shim.create.forked")
	s.setProcess(p, c.Init())
	undo.add(func() error {
		_ = c.Signal(9, false)
		<-c.Init().Done()
		return c.Destroy()
	})
	pidFile := filepath.Join(s.cfg.Bundle, shimapi.InitPidFile)
	undo.add(func() error { return os.RemoveAll(pidFile) })
	if err := os.WriteFile(pidFile, []byte(strconv.Itoa(p.pid)), 0o644); err != nil {
		return fail(err)
	}
	failpoint.Hit("shim.create.pidfile")
	if err := s.recordProcess(p); err != nil {
		return nil, err
	}
	failpoint.Hit("shim.create.recorded")
	return c, nil
}

func (s *Service) engineConfig(opts *options.Options) engine.Config {
	return engine.Config{
		Root: StateRoot(s.cfg.Bundle, s.cfg.Namespace, opts), SystemdCgroup: opts.SystemdCgroup, NoPivotRoot: opts.NoPivotRoot,
		NoNewKeyring: opts.NoNewKeyring, FilterDir: shimapi.FilterDir, Log: s.cfg.Log, Reaper: s.cfg.Reaper, OnPhase: s.phases.note,
	}
}

func (s *Service) mayCreate(r *task.CreateTaskRequest) error {
	if r.ID != s.cfg.ID {
		return fmt.Errorf("cannot create container %s: this shim keeps %s: %w", r.ID, s.cfg.ID, errdefs.ErrInvalidArgument)
	}
	if r.Bundle != "" && filepath.Clean(r.Bundle) != filepath.Clean(s.cfg.Bundle) {
		return fmt.Errorf("cannot create container %s: bundle is %s, this shim keeps %s: %w", r.ID, r.Bundle, s.cfg.Bundle, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.init != nil:
		return shimapi.Check(shimapi.Init, r.ID, s.init.state, shimapi.ReqCreate)
	case s.ended:
		return fmt.Errorf("cannot create container %s: its shim was shut down: %w", r.ID, errdefs.ErrUnavailable)
	}
	return nil
}

// openStreams opens a process's streams and gives the engine its ends.
func (s *Service) openStreams(p *process, opts *options.Options) (engine.IO, error) {
	dir := filepath.Join(s.cfg.Bundle, shimapi.StdioDir)
	if err := os.Mkdir(dir, 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
		return engine.IO{}, err
	}
	open, err := stdio.Open(s.streamConfig(p, opts))
	if err != nil {
		return engine.IO{}, err
	}
	s.mu.Lock()
	p.io.open = open
	ended := p.inputEnd
	s.mu.Unlock()
	if ended {
		open.CloseStdin()
	}
	if p.io.terminal {
		return engine.IO{Console: open.SetConsole}, nil
	}
	in, out, errs := open.Files()
	return engine.IO{Stdin: in, Stdout: out, Stderr: errs}, nil
}

func (s *Service) streamConfig(p *process, opts *options.Options) stdio.Config {
	return stdio.Config{
		Dir: filepath.Join(s.cfg.Bundle, shimapi.StdioDir), ExecID: p.execID,
		Stdin: p.io.stdin, Stdout: p.io.stdout, Stderr: p.io.stderr, Terminal: p.io.terminal,
		UID: int(opts.GetIoUid()), GID: int(opts.GetIoGid()), Ring: ringSize, Restored: p.kind == shimapi.Init && opts.GetCriuImagePath() != "", ID: cmp.Or(p.execID, s.cfg.ID),
		Loggers:  &logger.Host{Reaper: s.cfg.Reaper, Namespace: s.cfg.Namespace, Log: s.cfg.Log.With("process", p.label(s.cfg.ID))},
		OnClosed: func(kinds ...string) { s.unpark(p, kinds...) },
	}
}

// streamsOf gives a process's open streams, nil before it was started.
func (s *Service) streamsOf(p *process) *stdio.Streams {
	s.mu.Lock()
	defer s.mu.Unlock()
	return p.io.open
}

func (s *Service) recordProcess(p *process) error {
	p.oomBefore = s.oomSoFar(p)
	_, err := s.ledger.Append(&ledgerpb.Record{Process: &ledgerpb.Process{
		ContainerId: s.cfg.ID, ExecId: p.execID, Pid: uint32(p.pid), StartTicks: p.ticks, Terminal: p.io.terminal,
		Stdin: p.io.stdin, Stdout: p.io.stdout, Stderr: p.io.stderr, OomKills: p.oomBefore,
	}})
	return err
}

// readSpec reads the bundle's config.json; the error says where it is malformed.
func readSpec(bundle string) (*specs.Spec, error) {
	path := filepath.Join(bundle, shimapi.ConfigFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	var spec specs.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		var syntax *json.SyntaxError
		var typ *json.UnmarshalTypeError
		switch {
		case errors.As(err, &syntax):
			return nil, fmt.Errorf("malformed %s, %s: %w: %w", path, position(data, syntax.Offset), err, errdefs.ErrInvalidArgument)
		case errors.As(err, &typ):
			return nil, fmt.Errorf("malformed %s, %s: field %s is a %s, must be a %s: %w",
				path, position(data, typ.Offset), typ.Field, typ.Value, typ.Type, errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("malformed %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	return &spec, nil
}

// position is where in a text its byte offset lies, for people.
func position(data []byte, offset int64) string {
	before := data[:min(max(offset, 0), int64(len(data)))]
	return fmt.Sprintf("line %d, column %d", bytes.Count(before, []byte("\n"))+1, len(before)-bytes.LastIndexByte(before, '\n')-1)
}
