package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/session"
)

// ioFlags say how the streams of a process are connected, and who waits for it.
type ioFlags struct {
	detach, interactive, nullIO, sigProxy bool
	logURI, fifoDir, detachKeys, pidFile  string
}

func (f *ioFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.BoolVarP(&f.detach, "detach", "d", false, "return as soon as the process runs; the last of its output is kept for logs, unless --log-uri, --interactive or --tty is given")
	fs.BoolVarP(&f.interactive, "interactive", "i", false, "with --detach: keep the streams, for `mctl tasks attach` later")
	fs.BoolVar(&f.nullIO, "null-io", false, "connect all streams to /dev/null")
	fs.StringVar(&f.logURI, "log-uri", "", "`URI` where output goes instead: file:///PATH, json-file:///PATH?max-size=10m, cri:///PATH, binary:///PROGRAM or null:// (docs/logging.md)")
	fs.StringVar(&f.fifoDir, "fifo-dir", "", "`directory` for the FIFOs of the streams (default: fifo, beside the daemon's socket)")
	fs.StringVar(&f.pidFile, "pid-file", "", "`file` to write the process's pid to")
	f.addSession(cmd)
}

func (f *ioFlags) addSession(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.sigProxy, "sig-proxy", true, "pass signals on to the process; with =false they end mctl alone")
	cmd.Flags().StringVar(&f.detachKeys, "detach-keys", session.DefaultDetachKeys, "`keys` that leave a terminal's process running, empty: none")
}

func (f *ioFlags) validate(cmd *cobra.Command) error {
	if _, err := session.ParseKeys(f.detachKeys); err != nil {
		return misused(cmd, "--detach-keys: %w", err)
	}
	if f.nullIO && (f.logURI != "" || f.interactive) {
		return misused(cmd, "--null-io excludes --log-uri and --interactive")
	}
	if f.logURI != "" && f.interactive {
		return misused(cmd, "--log-uri excludes --interactive")
	}
	return nil
}

// process is a task (exec empty) or an exec in one, as a session knows it. Its calls outlast the daemon, or go straight to its
// shim.
type process struct {
	c        *cli
	cl       *client.Client
	direct   *straight // not nil: there is no cl
	id, exec string
	timeout  time.Duration     // that the exec may run; 0: any
	begun    time.Time         // when it was started
	from     *types.Descriptor // what a task is restored from, or nil
}

func (p *process) String() string {
	if p.exec != "" {
		return "exec " + p.exec + " of task " + p.id
	}
	return "task " + p.id
}

// Wait gives the exit status.
func (p *process) Wait(ctx context.Context) (uint32, error) {
	if p.direct != nil {
		return p.direct.wait(ctx, p.exec)
	}
	r, err := p.cl.Wait(ctx, p.c.notice, p.id, p.exec)
	return r.GetExitStatus(), err
}

// Kill signals.
func (p *process) Kill(ctx context.Context, signal uint32) error {
	return p.kill(ctx, signal, false)
}

func (p *process) kill(ctx context.Context, signal uint32, all bool) error {
	if p.direct != nil {
		return p.direct.kill(ctx, p.exec, signal, all)
	}
	return p.cl.Again(ctx, p.c.notice, func(ctx context.Context, _ bool) error {
		_, err := p.cl.Tasks.Kill(ctx, &tasksapi.KillRequest{ContainerID: p.id, ExecID: p.exec, Signal: signal, All: all})
		return err
	})
}

// Resize sets the size of the terminal.
func (p *process) Resize(ctx context.Context, width, height uint32) error {
	if p.direct != nil {
		return p.direct.resize(ctx, p.exec, width, height)
	}
	return p.cl.Again(ctx, nil, func(ctx context.Context, _ bool) error {
		_, err := p.cl.Tasks.ResizePty(ctx, &tasksapi.ResizePtyRequest{ContainerID: p.id, ExecID: p.exec, Width: width, Height: height})
		return err
	})
}

// CloseStdin ends the input.
func (p *process) CloseStdin(ctx context.Context) error {
	if p.direct != nil {
		return p.direct.closeStdin(ctx, p.exec)
	}
	return p.cl.Again(ctx, nil, func(ctx context.Context, _ bool) error {
		_, err := p.cl.Tasks.CloseIO(ctx, &tasksapi.CloseIORequest{ContainerID: p.id, ExecID: p.exec, Stdin: true})
		return err
	})
}

// get says how it is.
func (p *process) get(ctx context.Context) (*tasktypes.Process, error) {
	if p.direct != nil {
		return p.direct.get(ctx, p.exec)
	}
	r, err := p.cl.Tasks.Get(ctx, &tasksapi.GetRequest{ContainerID: p.id, ExecID: p.exec})
	return r.GetProcess(), err
}

// create makes the task, its process parked.
func (p *process) create(ctx context.Context, rootfs []*types.Mount, s *session.Streams) (pid uint32, err error) {
	err = p.cl.Again(ctx, p.c.notice, func(ctx context.Context, again bool) error {
		r, err := p.cl.Tasks.Create(ctx, &tasksapi.CreateTaskRequest{
			ContainerID: p.id, Rootfs: rootfs, Stdin: s.Stdin, Stdout: s.Stdout, Stderr: s.Stderr, Terminal: s.Terminal,
			Checkpoint: p.from,
		})
		pid = r.GetPid()
		if again && errdefs.IsAlreadyExists(err) { // the answer was lost with the daemon, the task was not
			if t, gerr := p.get(ctx); gerr == nil && t.Status == tasktypes.Status_CREATED && t.Stdout == s.Stdout {
				pid, err = t.Pid, nil
			}
		}
		return err
	})
	return pid, err
}

// add makes the exec, which start starts.
func (p *process) add(ctx context.Context, spec *anypb.Any, s *session.Streams) error {
	if p.direct != nil {
		return p.direct.add(ctx, p.exec, spec, s)
	}
	return p.cl.Again(ctx, p.c.notice, func(ctx context.Context, again bool) error {
		_, err := p.cl.Tasks.Exec(ctx, &tasksapi.ExecProcessRequest{
			ContainerID: p.id, ExecID: p.exec, Spec: spec, Stdin: s.Stdin, Stdout: s.Stdout, Stderr: s.Stderr, Terminal: s.Terminal,
		})
		if again && errdefs.IsAlreadyExists(err) {
			if t, gerr := p.get(ctx); gerr == nil && t.Stdout == s.Stdout {
				return nil
			}
		}
		return err
	})
}

// start starts it.
func (p *process) start(ctx context.Context) (pid uint32, err error) {
	p.begun = time.Now()
	if p.direct != nil {
		return p.direct.start(ctx, p.exec)
	}
	err = p.cl.Again(ctx, p.c.notice, func(ctx context.Context, again bool) error {
		r, err := p.cl.Tasks.Start(ctx, &tasksapi.StartRequest{ContainerID: p.id, ExecID: p.exec})
		pid = r.GetPid()
		if again && errdefs.IsFailedPrecondition(err) { // it was started, and may have ended
			if t, gerr := p.get(ctx); gerr == nil && t.Status != tasktypes.Status_CREATED {
				pid, err = t.Pid, nil
			}
		}
		return err
	})
	return pid, err
}

// remove removes it when it has ended or never run. That it is gone is no error.
func (p *process) remove(ctx context.Context) error {
	if p.direct != nil {
		return p.direct.remove(ctx, p.exec)
	}
	return p.cl.Again(ctx, p.c.notice, func(ctx context.Context, _ bool) error {
		var err error
		if p.exec == "" {
			_, err = p.cl.Tasks.Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: p.id})
		} else {
			_, err = p.cl.Tasks.DeleteProcess(ctx, &tasksapi.DeleteProcessRequest{ContainerID: p.id, ExecID: p.exec})
		}
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	})
}

// console is our terminal, for a process that gets one. It is an error not to have one.
func (c *cli) console(cmd *cobra.Command, tty, detach bool) (*session.Console, error) {
	if !tty || detach {
		return nil, nil
	}
	con, err := c.ownConsole()
	if err != nil {
		return nil, misused(cmd, "--tty: standard input is no terminal; leave --tty out, or use --detach")
	}
	return con, nil
}

func (c *cli) ownConsole() (*session.Console, error) {
	in, ok := c.in.(*os.File)
	if !ok {
		return nil, errors.New("standard input is no terminal")
	}
	return session.NewConsole(in)
}

// streams makes what f asks for.
func (p *process) streams(f *ioFlags, tty bool) (*session.Streams, error) {
	switch {
	case f.logURI != "":
		return &session.Streams{Stdout: f.logURI, Stderr: f.logURI, Terminal: tty}, nil
	case f.nullIO, f.detach && !f.interactive && !tty:
		return &session.Streams{Terminal: tty}, nil
	}
	dir := f.fifoDir
	switch {
	case dir != "":
	case p.direct != nil:
		dir = p.direct.fifos
	default:
		dir = filepath.Join(filepath.Dir(p.cl.Address), "fifo")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	name := p.id
	if p.exec != "" {
		name = p.exec
	}
	return session.Make(dir, name, true, tty)
}

// readable says whether output comes here.
func readable(s *session.Streams, f *ioFlags) bool { return f.logURI == "" && s.Stdout != "" }

// run makes a process with make, starts it and, unless detached, stays with it until it has ended: then it is removed, and
// its exit status is the error. On another error nothing is left of the process. ended: it has ended, and was removed.
func (p *process) run(ctx context.Context, f *ioFlags, tty bool, con *session.Console,
	create func(ctx context.Context, s *session.Streams) (uint32, error)) (pid uint32, ended bool, err error) {
	s, err := p.streams(f, tty)
	if err != nil {
		return 0, false, err
	}
	defer func() {
		var status exitStatus
		if ended || err != nil && !errors.As(err, &status) && pid == 0 {
			s.Forget()
		}
	}()
	keys, err := session.ParseKeys(f.detachKeys)
	if err != nil {
		return 0, false, err
	}
	at := &session.Session{Streams: s, In: p.c.in, Console: con, SigProxy: f.sigProxy, DetachKeys: keys}
	if !f.detach && readable(s, f) {
		if err := s.Open(p.c.out, p.c.err); err != nil {
			return 0, false, fmt.Errorf("cannot open the streams of %s: %w", p, err)
		}
		defer s.Close()
	}
	made, err := create(ctx, s)
	if err != nil {
		return 0, false, err
	}
	if !f.detach {
		defer at.Catch()()
		p.c.release()
	}
	started, err := p.start(ctx)
	if err == nil {
		pid = started
		err = writePID(f.pidFile, max(started, made))
	}
	if err != nil {
		err = errors.Join(err, p.discard(ctx, pid != 0))
		pid = 0
		return 0, false, err
	}
	if f.detach {
		return pid, false, nil
	}
	ended, err = p.stay(ctx, at)
	return pid, ended, err
}

// discard takes away a process that somebody half made, killing it if it runs.
func (p *process) discard(ctx context.Context, runs bool) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleaning)
	defer cancel()
	if runs {
		if err := p.Kill(ctx, sigkill); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if _, err := p.Wait(ctx); err != nil {
			return err
		}
	}
	return p.remove(ctx)
}

// stay attends a running process to its end, and removes it. Its exit status is the error. ended is false if it lives on.
func (p *process) stay(ctx context.Context, at *session.Session) (ended bool, err error) {
	p.c.raw.Store(at.Console != nil)
	r, err := at.Attend(ctx, p)
	p.c.raw.Store(false)
	switch {
	case err != nil:
		return false, fmt.Errorf("%s may run on: %w", p, err)
	case r.Signal != 0:
		return false, exitStatus(128 + int(r.Signal))
	case r.Detached:
		again := "mctl tasks attach " + p.id
		if p.direct != nil {
			again = "mctl shim attach " + p.id
		}
		if p.exec != "" {
			again += " --exec-id " + p.exec
		}
		_, _ = fmt.Fprintf(p.c.err, "\nmctl: %s runs on; `%s` comes back to it\n", p, again)
		return false, nil
	}
	if p.timeout > 0 && r.Status == 128+sigkill && p.timedOut(ctx) {
		_, _ = fmt.Fprintf(p.c.err, "mctl: %s was killed: its --timeout of %v was over\n", p, p.timeout)
	}
	if err := p.remove(ctx); err != nil {
		return false, fmt.Errorf("%s exited with status %d, but cannot be removed: %w", p, r.Status, err)
	}
	if r.Status != 0 {
		return true, exitStatus(r.Status)
	}
	return true, nil
}

// timedOut says whether an exec that SIGKILL has ended was killed because its time was over. The shim knows; the API of the daemon
// has no word for it, so that there the time must tell.
func (p *process) timedOut(ctx context.Context) bool {
	if p.direct != nil {
		return p.direct.timedOut(ctx, p.exec)
	}
	return time.Since(p.begun) >= p.timeout
}

func writePID(file string, pid uint32) error {
	if file == "" {
		return nil
	}
	if err := os.WriteFile(file, []byte(strconv.Itoa(int(pid))), 0o644); err != nil {
		return fmt.Errorf("cannot write --pid-file: %w", err)
	}
	return nil
}
