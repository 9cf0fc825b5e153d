package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/shimapi"
)

// memberSocket is the file name, in a member's bundle, of its shim's socket.
const memberSocket = "member.sock"

// member is a container whose task was asked for on the sandbox's connection, as containerd does it. A shim of its own keeps
// it; what is asked of it here is asked there.
type member struct {
	shimstate.Member
	mu     sync.Mutex
	client *shimapi.Client // nil: not connected
}

var _ shimapi.TaskService = (*Sandbox)(nil)

// dial gives the connection to a member's shim. One that has died has a successor first.
func (b *Sandbox) dial(ctx context.Context, m *member) (*shimapi.Client, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.client != nil {
		select {
		case <-m.client.Gone():
			_ = m.client.Close()
			m.client = nil
		default:
			return m.client, nil
		}
	}
	params := shimapi.BootstrapParams{Version: 3, Address: m.Socket}
	c, err := shimapi.Dial(ctx, params)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		if err = b.spawnMember(m, shimapi.VerbAdopt); err == nil {
			c, err = shimapi.Dial(ctx, params)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("container %s: %w: %w", m.Id, err, errdefs.ErrUnavailable)
	}
	m.client = c
	return c, nil
}

// spawnMember starts a shim for a member's bundle: one exec, its socket is bound already.
func (b *Sandbox) spawnMember(m *member, verb string) error {
	l, err := shimapi.Listen(m.Socket)
	if err != nil {
		return err
	}
	socket, err := l.File()
	_ = l.Close()
	if err != nil {
		return err
	}
	defer func() { _ = socket.Close() }()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	argv := []string{"-namespace", b.cfg.Namespace, "-id", m.Id, "-bundle", m.Bundle}
	if b.cfg.Forwards {
		argv = append(argv, "-forward")
	}
	cmd := exec.Command(self, append(argv, verb)...)
	cmd.Dir = m.Bundle
	cmd.ExtraFiles = []*os.File{socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// Not ours to keep: it outlives us. While we live the reaper takes its exit.
	_, err = b.cfg.Reaper.Fork(func() (int, error) {
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		pid := cmd.Process.Pid
		return pid, cmd.Process.Release()
	})
	if err != nil {
		_ = os.Remove(m.Socket)
		return fmt.Errorf("cannot spawn the shim of container %s: %w", m.Id, err)
	}
	return nil
}

// to gives the shim of a member.
func (b *Sandbox) to(ctx context.Context, id string) (*shimapi.Client, error) {
	b.state.Lock()
	m := b.members[id]
	b.state.Unlock()
	if m == nil {
		return nil, fmt.Errorf("container %s is not a member of sandbox %s that was made on this connection: %w", id, b.cfg.ID, errdefs.ErrNotFound)
	}
	return b.dial(ctx, m)
}

// Create makes a member: a shim of its own, asked for the same.
func (b *Sandbox) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	fail := func(err error) (*task.CreateTaskResponse, error) {
		return nil, fmt.Errorf("cannot create container %s in sandbox %s: %w", r.ID, b.cfg.ID, err)
	}
	if _, err := b.check(b.cfg.ID, boxUse); err != nil {
		return fail(err)
	}
	bundle := filepath.Clean(r.Bundle)
	if !filepath.IsAbs(bundle) || bundle == b.cfg.Bundle || r.ID == "" {
		return fail(fmt.Errorf("a member needs an id and a bundle of its own, %q is none: %w", r.Bundle, errdefs.ErrInvalidArgument))
	}
	var err error
	if _, _, r.Options, err = shimapi.TaskAPI(r.Options); err != nil {
		return fail(err)
	}
	m := &member{Member: shimstate.Member{Id: r.ID, Bundle: bundle, Socket: filepath.Join(bundle, memberSocket)}}
	b.state.Lock()
	if b.members[r.ID] != nil {
		b.state.Unlock()
		return fail(errdefs.ErrAlreadyExists)
	}
	b.members[r.ID] = m
	b.recordMembersLocked()
	b.state.Unlock()
	err = b.keepSandbox() // before there is anything to be found
	if err == nil {
		err = b.spawnMember(m, shimapi.VerbServe)
	}
	if err == nil {
		var c *shimapi.Client
		if c, err = b.dial(ctx, m); err == nil {
			var resp *task.CreateTaskResponse
			if resp, err = c.Create(ctx, r); err == nil {
				return resp, nil
			}
		}
	}
	b.dropMember(context.WithoutCancel(ctx), m)
	return nil, err
}

func (b *Sandbox) recordMembersLocked() {
	b.record.Members = nil
	for _, m := range b.members {
		member := m.Member
		b.record.Members = append(b.record.Members, &member)
	}
}

// dropMember ends the shim of a member that keeps nothing any more, and forgets it.
func (b *Sandbox) dropMember(ctx context.Context, m *member) {
	m.mu.Lock()
	if m.client != nil {
		if _, err := m.client.Shutdown(ctx, &task.ShutdownRequest{ID: m.Id}); err != nil {
			b.cfg.Log.Warn("the shim of a member does not shut down", "member", m.Id, "error", err)
		}
		_ = m.client.Close()
		m.client = nil
	}
	m.mu.Unlock()
	_ = os.Remove(m.Socket)
	b.state.Lock()
	delete(b.members, m.Id)
	b.recordMembersLocked()
	b.state.Unlock()
	if err := b.keepSandbox(); err != nil {
		b.cfg.Log.Error("a successor of this shim would not know the newest state", "error", err)
	}
}

// forward asks a member's shim.
func forward[Req, Resp any](ctx context.Context, b *Sandbox, id string, r Req, call func(*shimapi.Client, context.Context, Req) (Resp, error)) (Resp, error) {
	var none Resp
	c, err := b.to(ctx, id)
	if err != nil {
		return none, err
	}
	return call(c, ctx, r)
}

// Delete deletes; with the container itself goes its shim.
func (b *Sandbox) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	resp, err := forward(ctx, b, r.ID, r, (*shimapi.Client).Delete)
	if err == nil && r.ExecID == "" {
		b.state.Lock()
		m := b.members[r.ID]
		b.state.Unlock()
		if m != nil {
			b.dropMember(context.WithoutCancel(ctx), m)
		}
	}
	return resp, err
}

// State and all the others are the member's.
func (b *Sandbox) State(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).State)
}

func (b *Sandbox) Start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).Start)
}

func (b *Sandbox) Pids(ctx context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).Pids)
}

func (b *Sandbox) Pause(ctx context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).Pause)
}

func (b *Sandbox) Resume(ctx context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).Resume)
}

func (b *Sandbox) Checkpoint(ctx context.Context, r *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).Checkpoint)
}

func (b *Sandbox) Kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).Kill)
}

func (b *Sandbox) Exec(ctx context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).Exec)
}

func (b *Sandbox) ResizePty(ctx context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).ResizePty)
}

func (b *Sandbox) CloseIO(ctx context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).CloseIO)
}

func (b *Sandbox) Update(ctx context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).Update)
}

func (b *Sandbox) Wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).Wait)
}

func (b *Sandbox) Stats(ctx context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	return forward(ctx, b, r.ID, r, (*shimapi.Client).Stats)
}

// Connect names this shim for the sandbox, and a member's own for that.
func (b *Sandbox) Connect(ctx context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	if r.ID == b.cfg.ID || r.ID == "" {
		return b.Service.Connect(ctx, r)
	}
	return forward(ctx, b, r.ID, r, (*shimapi.Client).Connect)
}

// Park has nothing to do: all that there is of a sandbox is in its bundle.
func (b *Sandbox) Park(context.Context, *shim.ParkRequest) (*shim.ParkResponse, error) {
	return &shim.ParkResponse{}, nil
}

// Shutdown ends nothing: a daemon asks for it behind every task that it has deleted, and the sandbox is there for others.
// ShutdownSandbox does; and this, of a shim that has made no sandbox.
func (b *Sandbox) Shutdown(ctx context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	if _, err := b.check(b.cfg.ID, boxWait); errdefs.IsNotFound(err) && (r.ID == b.cfg.ID || r.ID == "") {
		return b.Service.Shutdown(ctx, r)
	}
	return empty, nil
}
