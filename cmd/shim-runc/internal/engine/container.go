package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/reaper"
)

// Container is one container of this engine. Its methods may be called at once by many goroutines; whether a request
// makes sense in the container's state is for the caller to judge.
type Container struct {
	id        string
	engine    *Engine
	c         *libcontainer.Container
	init      *reaper.Process
	sharedPID bool // processes may outlive init: there is no pid namespace that dies with it
	released  atomic.Bool
	destroyed atomic.Bool
	launcher  string           // argv[0] of the process that forked init
	poststart configs.HookList // libcontainer would run them at create

	dirsOnce sync.Once
	dirs     map[string]string // the container's cgroup, by its controller on v1

	execs    sync.Mutex
	execDirs map[string]string // cgroups of running execs, by their ids
	left     []string          // those of ended ones, in which something may run on
}

// ID is the container's id.
func (c *Container) ID() string { return c.id }

// Init is the container's first process, from Create on.
func (c *Container) Init() *reaper.Process { return c.init }

// SharedPID says that the container has no pid namespace of its own, so that its processes can outlive init.
func (c *Container) SharedPID() bool { return c.sharedPID }

// load reads the container afresh: a value of our own, because libcontainer serialises what is done through one.
func (c *Container) load() (*libcontainer.Container, error) {
	lc, err := libcontainer.Load(c.engine.cfg.Root, c.id)
	if err != nil {
		return nil, fmt.Errorf("cannot load state of container %s: %w", c.id, err)
	}
	return lc, nil
}

// Start lets the parked init execute the user's program.
func (c *Container) Start(ctx context.Context) error {
	begin := time.Now()
	if err := c.release(ctx); err != nil {
		return fmt.Errorf("cannot start container %s: %w", c.id, err)
	}
	c.released.Store(true)
	if len(c.c.Config().Hooks[configs.StartContainer]) > 0 {
		if err := c.awaitProgram(); err != nil {
			return fmt.Errorf("cannot start container %s: %w", c.id, err)
		}
	}
	if err := c.runPoststart(); err != nil {
		return fmt.Errorf("cannot start container %s: %w", c.id, err)
	}
	c.engine.cfg.OnPhase("start", time.Since(begin))
	return nil
}

// initFailed is the exit status of libcontainer's half of an init whose start went wrong.
const initFailed = 255

// awaitProgram waits until the released init executes the user's program. libcontainer runs the startContainer hooks before
// that, when nobody hears any more how they went: only the exit status and the container's standard error tell.
func (c *Container) awaitProgram() error {
	for wait := time.Millisecond; ; wait = min(2*wait, 5*time.Millisecond) {
		select {
		case <-c.init.Done():
			if c.init.Exit().Status == initFailed {
				return fmt.Errorf("init ended before the user's program: a startContainer hook failed; the container's standard error has the reason: %w", errdefs.ErrFailedPrecondition)
			}
			return nil
		case <-time.After(wait): // an execve tells nobody
		}
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", c.init.Pid()))
		if err == nil && len(line) > 0 && !c.libcontainers(line) {
			return nil
		}
	}
}

// runPoststart runs the hooks whose time is when the user's program runs. One that fails ends the container, as the
// specification has it.
func (c *Container) runPoststart() error {
	if len(c.poststart) == 0 {
		return nil
	}
	c.Settle(c.init)
	lc, err := c.load()
	if err != nil {
		return err
	}
	state, err := lc.OCIState()
	if err == nil {
		err = c.engine.cfg.Reaper.Guard(func() error { return configs.Hooks{configs.Poststart: c.poststart}.Run(configs.Poststart, state) })
	}
	if err != nil {
		_ = c.init.Signal(unix.SIGKILL)
	}
	return err
}

// release opens libcontainer's exec FIFO: init is blocked opening the other side, and writes one byte once it may go
// on. Polling init's pidfd besides the FIFO tells a dead init from a slow one, without a thread left behind.
func (c *Container) release(ctx context.Context) error {
	path := filepath.Join(c.engine.cfg.Root, c.id, "exec.fifo")
	// Before the FIFO: to open that lets init go, and it may have ended a moment later.
	pidfd, perr := unix.PidfdOpen(c.init.Pid(), 0)
	if perr == nil {
		defer func() { _ = unix.Close(pidfd) }()
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("it has been started already: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	if perr != nil {
		return fmt.Errorf("init has ended before it was started: %w", errdefs.ErrFailedPrecondition)
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := unix.Poll(fds, 1000)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("cannot poll %s: %w", path, err)
		}
		// A shim that was killed may have let init go without having removed the FIFO: then nobody is at its other side. Asked
		// before the FIFO is read: who goes on after that has written.
		gone := n <= 0 && c.executed(c.init)
		if n <= 0 && !gone {
			continue
		}
		var b [1]byte
		if got, _ := unix.Read(fd, b[:]); got == 1 {
			if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			return nil
		}
		if gone {
			_ = os.Remove(path)
			return fmt.Errorf("it has been started already: %w", errdefs.ErrFailedPrecondition)
		}
		if fds[1].Revents != 0 {
			return fmt.Errorf("init has ended before it was started: %w", errdefs.ErrFailedPrecondition)
		}
	}
}

// Exec starts another process in the container. Execs run side by side: each has a libcontainer value of its own.
func (c *Container) Exec(ctx context.Context, execID string, p *specs.Process, io IO) (*reaper.Process, error) {
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
	lc, err := c.load()
	if err != nil {
		return fail(err)
	}
	c.engine.clamp.Process(p)
	config := lc.Config()
	if err := c.engine.execHonoured(p, config.Umask, config.OomScoreAdj); err != nil {
		return fail(err)
	}
	dir, sub := c.execCgroup(execID, io.Tree)
	proc, err := c.engine.launch(ctx, lc, p, false, io, sub)
	if dir != "" {
		c.execs.Lock()
		if c.execDirs == nil {
			c.execDirs = map[string]string{}
		}
		c.execDirs[execID] = dir
		c.execs.Unlock()
	}
	if err != nil {
		c.ForgetExec(execID)
		return fail(err)
	}
	c.engine.cfg.OnPhase("exec", time.Since(begin))
	return proc, nil
}

// Pids lists the processes of the container, in our pid namespace.
func (c *Container) Pids() ([]int, error) {
	if c.c == nil {
		return nil, fmt.Errorf("cannot list processes of container %s: it has been removed: %w", c.id, errdefs.ErrNotFound)
	}
	pids, err := c.c.Processes()
	if err != nil {
		return nil, fmt.Errorf("cannot list processes of container %s: %w", c.id, err)
	}
	return pids, nil
}

// Pause freezes every process of the container.
func (c *Container) Pause() error {
	lc, err := c.load()
	if err != nil {
		return err
	}
	if err := lc.Pause(); err != nil {
		return fmt.Errorf("cannot pause container %s: %w", c.id, err)
	}
	return nil
}

// Resume undoes Pause.
func (c *Container) Resume() error {
	lc, err := c.load()
	if err != nil {
		return err
	}
	if err := lc.Resume(); err != nil {
		return fmt.Errorf("cannot resume container %s: %w", c.id, err)
	}
	return nil
}

// Signal sends sig to init, or with all to every process of the container. A SIGKILL reaches paused processes too.
func (c *Container) Signal(sig unix.Signal, all bool) error {
	if all {
		lc, err := c.load()
		if err != nil {
			return err
		}
		if sig == unix.SIGKILL {
			return killAll(lc)
		}
		pids, err := lc.Processes()
		if err != nil {
			return fmt.Errorf("cannot list processes of container %s: %w", c.id, err)
		}
		if err := cgroups.Signal(pids, sig, lc.Processes); err != nil {
			return fmt.Errorf("container %s: %w", c.id, err)
		}
		return nil
	}
	if c.released.Load() && sig != unix.SIGKILL {
		c.Settle(c.init)
	}
	if err := c.init.Signal(sig); err != nil {
		if errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("container %s: process already finished: %w", c.id, errdefs.ErrNotFound)
		}
		return err
	}
	if sig == unix.SIGKILL {
		// On cgroup v1 a frozen process dies only when it is thawed.
		c.thaw()
	}
	return nil
}

// Settle waits until a started process executes its program. Between the last word of libcontainer's half of it and its
// execve(2), a signal would reach the Go runtime there, which drops many. It takes no longer than a second.
func (c *Container) Settle(p *reaper.Process) {
	deadline := time.Now().Add(time.Second)
	for wait := 50 * time.Microsecond; ; wait = min(2*wait, 5*time.Millisecond) {
		if c.executed(p) || time.Now().After(deadline) {
			return
		}
		select {
		case <-p.Done():
			return
		case <-time.After(wait): // an execve tells nobody
		}
	}
}

// executed says whether a process is past libcontainer's half of its start: it executes its program, or has ended.
func (c *Container) executed(p *reaper.Process) bool {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.Pid()))
	return err != nil || !c.libcontainers(line)
}

// libcontainers says whether a command line is that of libcontainer's half of a start.
func (c *Container) libcontainers(line []byte) bool {
	half := func(launcher string) bool { return bytes.Equal(line, []byte(launcher+"\x00init\x00")) }
	return half(os.Args[0]) || half(c.launcher)
}

func (c *Container) thaw() {
	lc, err := c.load()
	if err != nil {
		return
	}
	if st, err := lc.Status(); err == nil && st == libcontainer.Paused {
		_ = lc.Resume()
	}
}

// killAll sends SIGKILL until the container's cgroup is empty, for at most ten seconds.
func killAll(lc *libcontainer.Container) error {
	deadline := time.Now().Add(10 * time.Second)
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		pids, err := lc.Processes()
		if err != nil || len(pids) == 0 {
			return nil //nolint:nilerr // the cgroup is gone: nothing is left to kill
		}
		if err := cgroups.Signal(pids, unix.SIGKILL, func() ([]int, error) {
			now, err := lc.Processes()
			if err != nil {
				return nil, nil //nolint:nilerr // the cgroup is gone
			}
			return now, nil
		}); err != nil {
			return err
		}
		if st, err := lc.Status(); err == nil && st == libcontainer.Paused {
			_ = lc.Resume()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v do not end: %w", pids, context.DeadlineExceeded)
		}
		time.Sleep(wait) // a cgroup tells nobody when its last process has gone (v1)
	}
}

// awaitStopped waits until an init that is not our child has ended. Its cgroup is empty before: an init leaves that, and
// then waits for the processes of its pid namespace, those too that somebody outside has to reap.
func awaitStopped(lc *libcontainer.Container) error {
	deadline := time.Now().Add(10 * time.Second)
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		st, err := lc.Status()
		if err != nil {
			return err
		}
		if st == libcontainer.Stopped {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("its init is killed and does not end: %w", context.DeadlineExceeded)
		}
		time.Sleep(wait) // no pidfd: state.json names a pid, and libcontainer checks its start time
	}
}

// Destroy removes the container's cgroup and state, after its init has ended, runs its poststop hooks, and ends what
// is left of it if it has no pid namespace of its own. Doing it twice is not an error.
func (c *Container) Destroy() error {
	lc, err := c.load()
	if errors.Is(err, libcontainer.ErrNotExist) {
		if c.destroyed.Load() || c.c == nil {
			return nil
		}
		lc, err = c.c, nil // its state was lost; its cgroup is known all the same
	}
	if err != nil {
		return err
	}
	if c.sharedPID {
		if err := killAll(lc); err != nil {
			return fmt.Errorf("cannot remove container %s: %w", c.id, err)
		}
	}
	if err := c.engine.destroy(lc); err != nil {
		return fmt.Errorf("cannot remove container %s: %w", c.id, err)
	}
	c.destroyed.Store(true)
	return nil
}

// destroy removes a container's cgroup and state and runs its poststop hooks. One that fails is logged, and the others run,
// as the specification has it: all else is done by then.
func (e *Engine) destroy(lc *libcontainer.Container) error {
	err := e.cfg.Reaper.Guard(lc.Destroy)
	if err == nil {
		return nil
	}
	if _, serr := os.Stat(filepath.Join(e.cfg.Root, lc.ID())); !errors.Is(serr, os.ErrNotExist) {
		return err
	}
	for hooks := lc.Config().Hooks[configs.Poststop]; err != nil; {
		e.cfg.Log.Warn("a poststop hook failed", "id", lc.ID(), "error", err)
		hooks = after(hooks, err)
		if len(hooks) == 0 {
			return nil
		}
		var state *specs.State
		if state, err = lc.OCIState(); err != nil {
			return nil //nolint:nilerr // nothing is left that could be removed
		}
		state.Status = specs.StateStopped
		err = e.cfg.Reaper.Guard(func() error { return configs.Hooks{configs.Poststop: hooks}.Run(configs.Poststop, state) })
	}
	return nil
}

// after gives the hooks behind that which failed, whose number libcontainer's error has.
func after(hooks configs.HookList, err error) configs.HookList {
	var n int
	_, number, ok := strings.Cut(err.Error(), "hook #")
	if _, serr := fmt.Sscanf(number, "%d", &n); !ok || serr != nil || n >= len(hooks) {
		return nil
	}
	return hooks[n+1:]
}
