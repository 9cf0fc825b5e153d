package external

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// patience is how long processes may take to end after SIGKILL, and a terminal to arrive.
const patience = 10 * time.Second

// Container is one container of this engine. Its methods may be called at once by many goroutines; whether a request
// makes sense in the container's state is for the caller to judge.
type Container struct {
	id        string
	engine    *Engine
	init      *reaper.Process
	cgroup    *cgroups.Cgroup
	sharedPID bool
	started   atomic.Bool
	paused    atomic.Bool
}

// Init is the container's first process, from Create on.
func (c *Container) Init() *reaper.Process { return c.init }

// SharedPID says that the container has no pid namespace of its own, so that its processes can outlive its init.
func (c *Container) SharedPID() bool { return c.sharedPID }

// Start lets the parked init execute the user's program.
func (c *Container) Start(ctx context.Context) error {
	begin := time.Now()
	if err := c.engine.guarded(func(r *runc.Runc) error { return r.Start(ctx, c.id) }); err != nil {
		return fmt.Errorf("cannot start container %s: %w", c.id, err)
	}
	failpoint.Hit("external.started")
	c.started.Store(true)
	c.engine.cfg.OnPhase("start", time.Since(begin))
	return nil
}

// Exec starts another process in the container. Execs run side by side.
func (c *Container) Exec(ctx context.Context, execID string, p *specs.Process, io engine.IO) (*reaper.Process, error) {
	begin := time.Now()
	fail := func(err error) (*reaper.Process, error) {
		return nil, fmt.Errorf("cannot exec %s in container %s: %w", execID, c.id, err)
	}
	if len(p.Args) == 0 {
		return fail(fmt.Errorf("args is empty: %w", errdefs.ErrInvalidArgument))
	}
	if p.Cwd == "" {
		p.Cwd = "/"
	}
	p.Terminal = io.Console != nil
	c.engine.clamp.Process(p)
	proc, err := c.engine.launch(io, func(r *runc.Runc, s *streams) error {
		return r.Exec(ctx, c.id, *p, &runc.ExecOpts{IO: s, PidFile: s.pidFile, ConsoleSocket: s.socket(), Detach: true})
	})
	if err != nil {
		return fail(err)
	}
	failpoint.Hit("external.exec.made")
	c.engine.cfg.OnPhase("exec", time.Since(begin))
	return proc, nil
}

// KillExec kills a process of Exec and its descendants, as far as their parents live: such an exec is in the container's cgroup.
func (c *Container) KillExec(_ string, p *reaper.Process) error { return engine.KillTree(p) }

// ForgetExec is to be called when an exec has ended. Nothing is kept of it here.
func (c *Container) ForgetExec(string) {}

// Pids lists the processes of the container, in our pid namespace.
func (c *Container) Pids() ([]int, error) {
	if c.cgroup == nil { // taken over after its init had ended
		return nil, nil
	}
	return c.cgroup.Pids()
}

// Pause freezes every process of the container.
func (c *Container) Pause() error {
	if err := c.engine.guarded(func(r *runc.Runc) error { return r.Pause(context.Background(), c.id) }); err != nil {
		return fmt.Errorf("cannot pause container %s: %w", c.id, err)
	}
	c.paused.Store(true)
	return nil
}

// Resume undoes Pause.
func (c *Container) Resume() error {
	if err := c.engine.guarded(func(r *runc.Runc) error { return r.Resume(context.Background(), c.id) }); err != nil {
		return fmt.Errorf("cannot resume container %s: %w", c.id, err)
	}
	c.paused.Store(false)
	return nil
}

// Update changes the limits that r names, and leaves all others as they are.
func (c *Container) Update(res *specs.LinuxResources) error {
	if res == nil {
		return fmt.Errorf("cannot update container %s: no resources given: %w", c.id, errdefs.ErrInvalidArgument)
	}
	if err := c.engine.guarded(func(r *runc.Runc) error { return r.Update(context.Background(), c.id, res) }); err != nil {
		return fmt.Errorf("cannot update container %s: %w", c.id, err)
	}
	return nil
}

// Signal sends sig to init, or with all to every process of the container. A SIGKILL reaches paused processes too.
func (c *Container) Signal(sig unix.Signal, all bool) error {
	switch {
	case all && sig == unix.SIGKILL && c.cgroup != nil:
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return c.cgroup.Kill(ctx)
	case all:
		pids, err := c.Pids()
		if err != nil {
			return err
		}
		if err := cgroups.Signal(pids, sig, c.Pids); err != nil {
			return fmt.Errorf("container %s: %w", c.id, err)
		}
		return nil
	}
	if c.started.Load() && sig != unix.SIGKILL {
		c.Settle(c.init)
	}
	if err := c.init.Signal(sig); err != nil {
		if errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("container %s: process already finished: %w", c.id, errdefs.ErrNotFound)
		}
		return err
	}
	if sig == unix.SIGKILL && c.paused.Load() {
		// On cgroup v1 a frozen process dies only when it is thawed.
		if err := c.Resume(); err != nil {
			c.engine.cfg.Log.Warn("cannot thaw a killed container", "error", err)
		}
	}
	return nil
}

// Settle waits until a started process executes its program, for at most a second: a runtime written in Go is "init" on
// its command line until then, and drops signals.
func (c *Container) Settle(p *reaper.Process) {
	deadline := time.Now().Add(time.Second)
	for wait := 50 * time.Microsecond; time.Now().Before(deadline); wait = min(2*wait, 5*time.Millisecond) {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.Pid()))
		argv := strings.Split(string(line), "\x00")
		if err != nil || len(argv) != 3 || argv[1] != "init" {
			return
		}
		if name := filepath.Base(argv[0]); name != filepath.Base(c.engine.binary) && name != "runc" {
			return // the user's program, run with the word "init"
		}
		select {
		case <-p.Done():
			return
		case <-time.After(wait): // an execve tells nobody
		}
	}
}

// Destroy removes the container's cgroup and state, after its init has ended, runs its poststop hooks, and ends what is
// left of it if it has no pid namespace of its own. Doing it twice is not an error.
func (c *Container) Destroy() error {
	if c.sharedPID {
		if err := c.Signal(unix.SIGKILL, true); err != nil {
			return fmt.Errorf("cannot remove container %s: %w", c.id, err)
		}
	}
	return c.engine.Remove(c.id, "")
}
