package service

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/cmd/shim-runc/internal/sandbox"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
)

// specType is the type of an OCI runtime spec in an Any.
const specType = "types.containerd.io/opencontainers/runtime-spec/1/Spec"

// Sandbox is the service of a shim that keeps a sandbox: the namespaces that several containers share. What it has in common
// with a shim that keeps a container (ledger, events, upgrade) is the Service's, which keeps none.
type Sandbox struct {
	*Service

	keeping sync.Mutex // held while the record is written; taken before state

	state   sync.Mutex // guards all below
	record  shimstate.Sandbox
	init    *reaper.Process // nil: no pid namespace is shared
	home    *sandbox.Home   // not nil: our first thread is in the namespaces
	exited  chan struct{}   // closed once the exit is in the ledger
	members map[string]*member
}

var _ shimapi.SandboxAPI = (*Sandbox)(nil)

// NewSandbox is New for a shim that keeps a sandbox.
func NewSandbox(cfg Config) (*Sandbox, error) {
	s, err := New(cfg)
	if err != nil {
		return nil, err
	}
	b := &Sandbox{Service: s, exited: make(chan struct{}), members: map[string]*member{}, record: shimstate.Sandbox{State: string(shimapi.Absent)}}
	s.keepsSandbox, s.sandboxUntold = true, b.untoldInit
	return b, nil
}

// Requests of a sandbox.
const (
	boxStart = iota
	boxStop
	boxWait // and status
	boxUse  // ping, metrics, update
)

// boxAllowed says in which states a request is legal, beside Create, which wants none; Shutdown always is.
var boxAllowed = map[int][]shimapi.State{
	boxStart: {shimapi.Created},
	boxStop:  {shimapi.Created, shimapi.Running, shimapi.Stopped},
	boxWait:  {shimapi.Created, shimapi.Running, shimapi.Stopped},
	boxUse:   {shimapi.Created, shimapi.Running},
}

// check gives the record as it is, if request is legal now.
func (b *Sandbox) check(id string, request int) (shimstate.Sandbox, error) {
	if err := b.mine(id); err != nil {
		return shimstate.Sandbox{}, err
	}
	b.state.Lock()
	defer b.state.Unlock()
	for _, st := range boxAllowed[request] {
		if string(st) == b.record.State {
			return b.record, nil
		}
	}
	if b.record.State == string(shimapi.Absent) {
		return b.record, fmt.Errorf("sandbox %s was not created: %w", id, errdefs.ErrNotFound)
	}
	return b.record, fmt.Errorf("sandbox %s is %s: %w", id, b.record.State, errdefs.ErrFailedPrecondition)
}

func (b *Sandbox) mine(id string) error {
	if id != b.cfg.ID {
		return fmt.Errorf("sandbox %s is not kept by this shim, which keeps %s: %w", id, b.cfg.ID, errdefs.ErrNotFound)
	}
	return nil
}

// CreateSandbox makes the namespaces that the bundle's config.json asks for. A client that goes away does not stop it half
// way; a failure leaves nothing of it.
func (b *Sandbox) CreateSandbox(ctx context.Context, r *api.CreateSandboxRequest) (_ *api.CreateSandboxResponse, err error) {
	b.transition.Lock()
	defer b.transition.Unlock()
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot create sandbox %s: %w", r.SandboxID, err)
		}
	}()
	plan, err := b.plan(r)
	if err != nil {
		return nil, err
	}
	record := shimstate.Sandbox{
		Schema: tableSchema, BootId: b.boot, Id: b.cfg.ID, State: string(shimapi.Created), CreatedUnixNano: time.Now().UnixNano(),
		Kinds: plan.Kinds(), Shm: plan.Shm(), Cgroup: plan.Cgroup(),
	}
	if record.Spec, err = plan.Carried(b.cfg.Bundle); err != nil {
		return nil, err
	}
	undo := undoStack{}
	defer func() {
		if err != nil {
			undo.run(b.cfg.Log)
		}
	}()
	begin := time.Now()
	if record.Cgroup != "" {
		undo.add(func() error { return removeCgroup(&record) })
		if record.Cgroup, record.CgroupMade, err = makeCgroup(record.Cgroup, plan.Resources()); err != nil {
			return nil, err
		}
	}
	made, err := sandbox.Make(context.WithoutCancel(ctx), plan, b.cfg.Bundle, b.cfg.Reaper)
	if err != nil {
		return nil, err
	}
	undo.add(func() error { return made.Abandon(b.cfg.Bundle) })
	if err := b.enter(record.Kinds); err != nil {
		return nil, err
	}
	undo.add(b.leave)
	if made.Init != nil {
		record.Pid, record.StartTicks = uint32(made.Init.Pid()), reaper.StartTicks(made.Init.Pid())
	}
	b.set(record, made.Init)
	undo.add(func() error {
		b.set(shimstate.Sandbox{State: string(shimapi.Absent)}, nil)
		return os.Remove(b.recordPath())
	})
	if err := b.keepSandbox(); err != nil {
		return nil, err
	}
	if err := made.Release(); err != nil {
		return nil, err
	}
	if err := b.emit(shimapi.TopicSandboxCreate, &events.SandboxCreate{SandboxID: b.cfg.ID}); err != nil {
		return nil, err
	}
	b.phases.note("create.sandbox", time.Since(begin))
	if made.Init != nil {
		go b.awaitInit(made.Init)
	}
	return &api.CreateSandboxResponse{}, nil
}

// plan reads what is to be made.
func (b *Sandbox) plan(r *api.CreateSandboxRequest) (*sandbox.Plan, error) {
	invalid := func(format string, a ...any) error {
		return fmt.Errorf(format+": %w", append(a, errdefs.ErrInvalidArgument)...)
	}
	switch {
	case r.SandboxID != b.cfg.ID:
		return nil, invalid("this shim keeps %s", b.cfg.ID)
	case r.BundlePath != "" && filepath.Clean(r.BundlePath) != filepath.Clean(b.cfg.Bundle):
		return nil, invalid("bundle is %s, this shim keeps %s", r.BundlePath, b.cfg.Bundle)
	case len(r.Rootfs) > 0:
		return nil, invalid("it has no process of its own, and so no root file system")
	}
	b.state.Lock()
	state := b.record.State
	b.state.Unlock()
	b.mu.Lock()
	ended := b.ended
	b.mu.Unlock()
	if ended {
		return nil, fmt.Errorf("its shim was shut down: %w", errdefs.ErrUnavailable)
	}
	if state != string(shimapi.Absent) {
		return nil, fmt.Errorf("it is %s: %w", state, errdefs.ErrAlreadyExists)
	}
	opts, err := decodeOptions(r.Options)
	if err != nil {
		return nil, err
	}
	if opts.ShimCgroup != "" {
		if err := cgroups.Join(opts.ShimCgroup, os.Getpid()); err != nil {
			return nil, fmt.Errorf("runtime option ShimCgroup: %w", err)
		}
	}
	spec, err := readSpec(b.cfg.Bundle)
	if errors.Is(err, fs.ErrNotExist) {
		spec, err = nil, nil // containerd writes none for a sandbox without a spec
	}
	if err != nil {
		return nil, err
	}
	return sandbox.Read(spec, r.NetnsPath, r.Annotations)
}

// StartSandbox says that the sandbox may be used, and gives its spec as it was carried out: with the paths of the namespaces
// and of /dev/shm, for the specs of its containers.
func (b *Sandbox) StartSandbox(_ context.Context, r *api.StartSandboxRequest) (*api.StartSandboxResponse, error) {
	b.transition.Lock()
	defer b.transition.Unlock()
	record, err := b.check(r.SandboxID, boxStart)
	if err != nil {
		return nil, fmt.Errorf("cannot start: %w", err)
	}
	b.state.Lock()
	if b.record.State == string(shimapi.Created) { // else its init has ended just now
		b.record.State = string(shimapi.Running)
	}
	b.state.Unlock()
	if err := b.keepSandbox(); err != nil {
		return nil, err
	}
	if err := b.emit(shimapi.TopicSandboxStart, &events.SandboxStart{SandboxID: b.cfg.ID}); err != nil {
		return nil, err
	}
	return &api.StartSandboxResponse{
		Pid: b.pid(), CreatedAt: timestamppb.New(time.Unix(0, record.CreatedUnixNano)), Spec: &anypb.Any{TypeUrl: specType, Value: record.Spec},
	}, nil
}

// Platform says what the containers run on.
func (b *Sandbox) Platform(_ context.Context, r *api.PlatformRequest) (*api.PlatformResponse, error) {
	if err := b.mine(r.SandboxID); err != nil {
		return nil, err
	}
	os, arch := sandbox.Platform()
	return &api.PlatformResponse{Platform: &types.Platform{OS: os, Architecture: arch}}, nil
}

// StopSandbox ends the sandbox. The processes in a shared pid namespace are told to end (SIGTERM), and after the timeout are
// killed; those of other members run on, in namespaces that go with the last of them. A sandbox that has ended is no error.
func (b *Sandbox) StopSandbox(ctx context.Context, r *api.StopSandboxRequest) (*api.StopSandboxResponse, error) {
	if _, err := b.check(r.SandboxID, boxStop); err != nil {
		return nil, fmt.Errorf("cannot stop: %w", err)
	}
	return &api.StopSandboxResponse{}, b.stop(ctx, time.Duration(r.TimeoutSecs)*time.Second)
}

func (b *Sandbox) stop(ctx context.Context, timeout time.Duration) error {
	b.state.Lock()
	init := b.init
	b.state.Unlock()
	if init == nil {
		b.transition.Lock()
		defer b.transition.Unlock()
		b.conclude(reaper.Exit{At: time.Now()})
		return nil
	}
	if timeout > 0 {
		_ = init.Signal(unix.SIGTERM) // an error says that it has ended
		select {
		case <-b.exited:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(timeout):
		}
	}
	_ = init.Signal(unix.SIGKILL)
	select {
	case <-b.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// awaitInit waits for the end of the init of a shared pid namespace: it is the sandbox's.
func (b *Sandbox) awaitInit(init *reaper.Process) {
	exit := init.Exit()
	b.exits.enter()
	defer b.exits.leave()
	b.transition.Lock() // a start under way tells first
	defer b.transition.Unlock()
	b.conclude(exit)
}

// conclude records how the sandbox has ended, once, and lets go of its namespaces. The caller holds transition.
func (b *Sandbox) conclude(exit reaper.Exit) {
	b.state.Lock()
	if b.record.State == string(shimapi.Stopped) {
		b.state.Unlock()
		return
	}
	pid := b.record.Pid
	b.state.Unlock()
	_ = b.Service.record(&ledgerpb.Record{Exit: &ledgerpb.Exit{
		ContainerId: b.cfg.ID, Pid: pid, Status: uint32(exit.Status), ExitedUnixNano: exit.At.UnixNano(), Unknown: exit.Unknown,
	}}, shimapi.TopicSandboxExit, &events.SandboxExit{SandboxID: b.cfg.ID, ExitStatus: uint32(exit.Status), ExitedAt: timestamppb.New(exit.At)})
	b.state.Lock()
	b.record.State, b.record.ExitStatus, b.record.ExitedUnixNano = string(shimapi.Stopped), uint32(exit.Status), exit.At.UnixNano()
	b.record.ExitUnknown = exit.Unknown
	b.state.Unlock()
	if err := b.keepSandbox(); err != nil {
		b.cfg.Log.Error("a successor of this shim would not know the newest state", "error", err)
	}
	b.letGo()
	close(b.exited)
}

// enter makes this process one of those that are in the namespaces, as far as it can be.
func (b *Sandbox) enter(kinds []string) error {
	home, err := sandbox.Enter(b.cfg.Bundle, kinds)
	b.state.Lock()
	defer b.state.Unlock()
	b.home = home
	return err
}

func (b *Sandbox) leave() error {
	b.state.Lock()
	home := b.home
	b.home = nil
	b.state.Unlock()
	return home.Leave()
}

// letGo removes what the sandbox holds.
func (b *Sandbox) letGo() {
	if err := errors.Join(b.leave(), sandbox.Unpin(b.cfg.Bundle)); err != nil {
		b.cfg.Log.Error("cannot let go of the namespaces of a sandbox", "error", err)
	}
}

// WaitSandbox answers when the sandbox has ended.
func (b *Sandbox) WaitSandbox(ctx context.Context, r *api.WaitSandboxRequest) (*api.WaitSandboxResponse, error) {
	if _, err := b.check(r.SandboxID, boxWait); err != nil {
		return nil, fmt.Errorf("cannot wait: %w", err)
	}
	select {
	case <-b.exited:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	b.state.Lock()
	defer b.state.Unlock()
	return &api.WaitSandboxResponse{ExitStatus: b.record.ExitStatus, ExitedAt: timestamppb.New(time.Unix(0, b.record.ExitedUnixNano))}, nil
}

// pid is a process in the sandbox's namespaces: the init, if there is one, or this one. 0: there is none.
func (b *Sandbox) pid() uint32 {
	b.state.Lock()
	defer b.state.Unlock()
	if b.record.Pid == 0 && b.home != nil {
		return uint32(os.Getpid())
	}
	return b.record.Pid
}

// SandboxStatus says how it is; Verbose adds the spec as it was carried out.
func (b *Sandbox) SandboxStatus(_ context.Context, r *api.SandboxStatusRequest) (*api.SandboxStatusResponse, error) {
	record, err := b.check(r.SandboxID, boxWait)
	if err != nil {
		return nil, fmt.Errorf("cannot tell the status: %w", err)
	}
	resp := &api.SandboxStatusResponse{
		SandboxID: b.cfg.ID, Pid: b.pid(), State: shimapi.SandboxNotReady, CreatedAt: timestamppb.New(time.Unix(0, record.CreatedUnixNano)),
	}
	if record.State == string(shimapi.Running) {
		resp.State = shimapi.SandboxReady
	}
	if record.ExitedUnixNano != 0 {
		resp.ExitedAt = timestamppb.New(time.Unix(0, record.ExitedUnixNano))
	}
	if r.Verbose {
		resp.Info = map[string]string{"state": record.State, "spec": string(record.Spec)}
		if record.ExitUnknown != "" {
			resp.Info["exit_unknown"] = record.ExitUnknown
		}
	}
	return resp, nil
}

// PingSandbox answers for a sandbox that has not ended.
func (b *Sandbox) PingSandbox(_ context.Context, r *api.PingRequest) (*api.PingResponse, error) {
	_, err := b.check(r.SandboxID, boxUse)
	return &api.PingResponse{}, err
}

// ShutdownSandbox ends the sandbox at once, if it has not ended, and then the shim.
func (b *Sandbox) ShutdownSandbox(ctx context.Context, r *api.ShutdownSandboxRequest) (*api.ShutdownSandboxResponse, error) {
	if err := b.mine(r.SandboxID); err != nil {
		return nil, err
	}
	b.transition.Lock() // a Create under way decides first
	defer b.transition.Unlock()
	if _, err := b.check(r.SandboxID, boxUse); err == nil {
		b.transition.Unlock()
		err := b.stop(ctx, 0)
		b.transition.Lock()
		if err != nil {
			return nil, fmt.Errorf("cannot end sandbox %s: %w", b.cfg.ID, err)
		}
	}
	b.state.Lock()
	record := b.record
	b.state.Unlock()
	if err := removeCgroup(&record); err != nil {
		b.cfg.Log.Warn("the cgroup of a sandbox stays: something is in it", "error", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.ended {
		b.ended = true
		close(b.ending)
	}
	return &api.ShutdownSandboxResponse{}, nil
}

// Describe says what this shim is.
func (b *Sandbox) Describe(ctx context.Context, r *shim.DescribeRequest) (*shim.DescribeResponse, error) {
	resp, err := b.Service.Describe(ctx, r)
	if err != nil {
		return nil, err
	}
	b.state.Lock()
	defer b.state.Unlock()
	resp.Sandbox = &shim.Sandbox{Pid: b.record.Pid, Namespaces: b.record.Kinds, ExitStatus: b.record.ExitStatus}
	if b.record.State != string(shimapi.Absent) {
		resp.Sandbox.State = b.record.State
	}
	if b.record.ExitedUnixNano != 0 {
		resp.Sandbox.ExitedAt = timestamppb.New(time.Unix(0, b.record.ExitedUnixNano))
	}
	for _, m := range b.record.Members {
		resp.Sandbox.Members = append(resp.Sandbox.Members, m.Id)
	}
	return resp, nil
}
