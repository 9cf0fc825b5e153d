package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine/filter"
	"github.com/managerd/managerd/reaper"
)

// launch starts p in lc: parked before its program for an init, running for an exec; that in cgroups below the container's, if
// sub has any (see libcontainer.Process).
func (e *Engine) launch(ctx context.Context, lc *libcontainer.Container, p *specs.Process, init bool, io IO, sub map[string]string) (*reaper.Process, error) {
	lp, err := process(p)
	if err != nil {
		return nil, err
	}
	lp.Init, lp.SubCgroupPaths = init, sub
	config := lc.Config()
	profile, compiled := e.compiled(config.Seccomp)
	if compiled != nil {
		lp.ExtraFiles = []*os.File{compiled} // see filter.Take; the user's program does not get it
		defer func() { _ = compiled.Close() }()
	}
	proc, err := e.run(ctx, lp, io, func() error {
		if err := lc.Start(lp); err != nil {
			return startError(err)
		}
		return nil
	})
	if err == nil && compiled == nil && profile != nil {
		go func() {
			if err := e.filters.Fill(profile); err != nil {
				e.cfg.Log.Warn("seccomp filters are compiled for each process again", "error", err)
			}
		}()
	}
	return proc, err
}

// compiled gives the filter for a profile, if there is one already. Without it a process starts as well, only slower.
func (e *Engine) compiled(config *configs.Seccomp) (*filter.Profile, *os.File) {
	if e.filters == nil {
		return nil, nil
	}
	profile, err := filter.NewProfile(config)
	if err != nil {
		e.cfg.Log.Warn("cannot look for a compiled seccomp filter", "error", err)
		return nil, nil
	}
	file, err := e.filters.Open(profile)
	if err != nil {
		e.cfg.Log.Warn("cannot use a compiled seccomp filter", "error", err)
	}
	return profile, file
}

// run gives lp its streams and makes it a process by start.
func (e *Engine) run(ctx context.Context, lp *libcontainer.Process, io IO, start func() error) (_ *reaper.Process, err error) {
	var con *console
	if io.Console != nil {
		if con, err = newConsole(); err != nil {
			return nil, err
		}
		defer con.close()
		lp.ConsoleSocket = con.child
	} else {
		setFile(&lp.Stdin, io.Stdin)
		setFile(&lp.Stdout, io.Stdout)
		setFile(&lp.Stderr, io.Stderr)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	wait := lp.Wait // closes libcontainer's pidfd
	if lp.Init {
		wait = nil // and keeps all alive that belongs to lp: of an init, for a long time
	}
	proc, err := e.cfg.Reaper.ForkWaited(func() (int, error) {
		if err := start(); err != nil {
			return 0, err
		}
		return lp.Pid()
	}, wait)
	if err != nil {
		return nil, err
	}
	if con != nil {
		master, err := con.receive()
		if err == nil {
			err = io.Console(master)
		}
		if err != nil {
			_ = proc.Signal(unix.SIGKILL)
			<-proc.Done()
			return nil, fmt.Errorf("cannot set up the terminal: %w", err)
		}
	}
	return proc, nil
}

// setFile keeps a nil *os.File from becoming a non-nil interface.
func setFile[T any](dst *T, f *os.File) {
	if f != nil {
		*dst = any(f).(T)
	}
}

// startError says what kind of failure it was, and keeps libcontainer's sentence, which users know.
func startError(err error) error {
	s := err.Error()
	for _, mark := range []string{
		"executable file not found", "no such file or directory", "permission denied", "is a directory", "not a directory",
		"exec format error",
	} {
		if strings.Contains(s, mark) && strings.Contains(s, "exec") {
			return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	return err
}

// process converts the runtime spec's process; how libcontainer's own runtime does it is in its package main only.
func process(p *specs.Process) (*libcontainer.Process, error) {
	lp := &libcontainer.Process{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd,
		UID: int(p.User.UID), GID: int(p.User.GID),
		Label: p.SelinuxLabel, AppArmorProfile: p.ApparmorProfile, NoNewPrivileges: &p.NoNewPrivileges,
		Scheduler: p.Scheduler, IOPriority: p.IOPriority,
		LogLevel: "3", // logrus.WarnLevel
	}
	for _, g := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(g))
	}
	if p.ConsoleSize != nil {
		lp.ConsoleWidth, lp.ConsoleHeight = uint16(p.ConsoleSize.Width), uint16(p.ConsoleSize.Height)
	}
	if c := p.Capabilities; c != nil {
		lp.Capabilities = &configs.Capabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable, Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	for _, r := range p.Rlimits {
		t, ok := rlimits[r.Type]
		if !ok {
			return nil, fmt.Errorf("unknown rlimit %q: %w", r.Type, errdefs.ErrInvalidArgument)
		}
		lp.Rlimits = append(lp.Rlimits, configs.Rlimit{Type: t, Soft: r.Soft, Hard: r.Hard})
	}
	affinity, err := configs.ConvertCPUAffinity(p.ExecCPUAffinity)
	if err != nil {
		return nil, fmt.Errorf("invalid cpu affinity: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	lp.CPUAffinity = affinity
	return lp, nil
}

// rlimits are the names of the runtime spec (process.rlimits, after getrlimit(2)).
var rlimits = map[string]int{
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU,
	"RLIMIT_DATA": unix.RLIMIT_DATA, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS,
	"RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK, "RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE,
	"RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO, "RLIMIT_RTTIME": unix.RLIMIT_RTTIME, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_STACK": unix.RLIMIT_STACK,
}

// console is the socket pair over which init sends the master of the terminal that it has opened inside the container.
type console struct {
	parent, child *os.File
}

func newConsole() (*console, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot make the console socket: %w", err)
	}
	return &console{os.NewFile(uintptr(fds[0]), "console-parent"), os.NewFile(uintptr(fds[1]), "console-child")}, nil
}

func (c *console) close() {
	_ = c.parent.Close()
	_ = c.child.Close()
}

// receive takes the master; the message is there once libcontainer's Start has returned.
func (c *console) receive() (*os.File, error) {
	_ = c.child.Close() // so that a missing message is an end of file, not a hang
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(c.parent.Fd()), buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot receive the terminal: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil, fmt.Errorf("cannot receive the terminal: %w", err)
	}
	if len(msgs) != 1 {
		return nil, errors.New("cannot receive the terminal: init sent none")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("cannot receive the terminal: %d descriptors, error %w", len(fds), err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil { // for Go's poller
		_ = unix.Close(fds[0])
		return nil, fmt.Errorf("cannot set up the terminal: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "ptmx"), nil
}
