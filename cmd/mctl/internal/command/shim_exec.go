package command

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/mctl/internal/direct"
	"github.com/managerd/managerd/cmd/mctl/internal/session"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// straight is a process's shim, for who speaks to it and not to the daemon.
type straight struct {
	shim  *direct.Shim
	c     *shimapi.Client
	fifos string // directory for the FIFOs of streams
}

// aside is within for what a session has done beside its wait: it is not broken off in the end, because ttrpc would complain about
// the answer.
func (d *straight) aside(ctx context.Context, f func(ctx context.Context) error) error {
	return d.within(context.WithoutCancel(ctx), asking, f)
}

// within gives a call of a shim the time that it may take.
func (d *straight) within(ctx context.Context, limit time.Duration, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return f(ctx)
}

func (d *straight) wait(ctx context.Context, exec string) (uint32, error) {
	r, err := d.c.Wait(ctx, &task.WaitRequest{ID: d.shim.ID, ExecID: exec})
	return r.GetExitStatus(), err
}

func (d *straight) kill(ctx context.Context, exec string, signal uint32, all bool) error {
	return d.aside(ctx, func(ctx context.Context) error {
		_, err := d.c.Kill(ctx, &task.KillRequest{ID: d.shim.ID, ExecID: exec, Signal: signal, All: all})
		return err
	})
}

func (d *straight) resize(ctx context.Context, exec string, width, height uint32) error {
	return d.aside(ctx, func(ctx context.Context) error {
		_, err := d.c.ResizePty(ctx, &task.ResizePtyRequest{ID: d.shim.ID, ExecID: exec, Width: width, Height: height})
		return err
	})
}

func (d *straight) closeStdin(ctx context.Context, exec string) error {
	return d.aside(ctx, func(ctx context.Context) error {
		_, err := d.c.CloseIO(ctx, &task.CloseIORequest{ID: d.shim.ID, ExecID: exec, Stdin: true})
		return err
	})
}

func (d *straight) get(ctx context.Context, exec string) (p *tasktypes.Process, err error) {
	err = d.within(ctx, asking, func(ctx context.Context) error {
		r, err := d.c.State(ctx, &task.StateRequest{ID: d.shim.ID, ExecID: exec})
		p = &tasktypes.Process{Pid: r.GetPid(), Status: r.GetStatus(), Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), Terminal: r.GetTerminal()}
		return err
	})
	return p, err
}

func (d *straight) add(ctx context.Context, exec string, spec *anypb.Any, s *session.Streams) error {
	return d.within(ctx, asking, func(ctx context.Context) error {
		_, err := d.c.Exec(ctx, &task.ExecProcessRequest{
			ID: d.shim.ID, ExecID: exec, Spec: spec, Stdin: s.Stdin, Stdout: s.Stdout, Stderr: s.Stderr, Terminal: s.Terminal,
		})
		return err
	})
}

func (d *straight) start(ctx context.Context, exec string) (pid uint32, err error) {
	err = d.within(ctx, answering, func(ctx context.Context) error {
		r, err := d.c.Start(ctx, &task.StartRequest{ID: d.shim.ID, ExecID: exec})
		pid = r.GetPid()
		return err
	})
	return pid, err
}

// remove removes an exec. A container that has ended is the next managerd's to remove, or for `mctl shim delete`.
func (d *straight) remove(ctx context.Context, exec string) error {
	if exec == "" {
		return nil
	}
	return d.within(ctx, answering, func(ctx context.Context) error {
		if _, err := d.c.Delete(ctx, &task.DeleteRequest{ID: d.shim.ID, ExecID: exec}); !errdefs.IsNotFound(err) {
			return err
		}
		return nil
	})
}

// timedOut says whether an exec was killed because its time was over.
func (d *straight) timedOut(ctx context.Context, exec string) (over bool) {
	_ = d.within(ctx, asking, func(ctx context.Context) error { // who cannot be asked has not said so
		r, err := d.c.Shim().Describe(ctx, &shim.DescribeRequest{})
		for _, p := range r.GetProcesses() {
			over = over || p.ExecId == exec && p.TimedOut
		}
		return err
	})
	return over
}

// spec is the one in the bundle, with what runs in its place.
func (d *straight) spec(ctx context.Context) (s *specs.Spec, pid func() (uint32, error), err error) {
	data, err := os.ReadFile(d.shim.File(shimapi.ConfigFile))
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the spec of container %s: %w", d.shim.ID, err)
	}
	return s, func() (uint32, error) {
		p, err := d.get(ctx, "")
		return p.GetPid(), err
	}, nil
}

// process calls f with a container's process, or that of an exec, behind its shim.
func (k *keepers) process(cmd *cobra.Command, id, exec string, f func(ctx context.Context, p *process) error) error {
	return k.ask(cmd, id, 0, func(ctx context.Context, s *direct.Shim, c *shimapi.Client) error {
		return f(ctx, &process{c: k.cli, direct: &straight{s, c, filepath.Join(k.state, "fifo")}, id: id, exec: exec})
	})
}

func (k *keepers) exec() *cobra.Command {
	return k.execCommand(func(cmd *cobra.Command, id, exec string, f func(ctx context.Context, p *process) error) error {
		return k.process(cmd, id, exec, f)
	}, `  mctl shim exec web ps
  mctl shim exec -t web sh
  mctl shim exec --timeout 5s web wget -O - http://localhost`)
}

func (k *keepers) attach() *cobra.Command {
	ios, exec := &ioFlags{}, ""
	cmd := &cobra.Command{
		Use: "attach [flags] ID", Short: "Come back to the streams of a process", Args: args(1, 1),
		Long: `Connects with the streams of a container (or of an exec in it), stays until it has ended, and exits with its status. It must have
been started with --tty or --interactive, or left with the detach keys. A container that has ended stays for the next managerd, or
until "mctl shim delete".`,
		RunE: func(cmd *cobra.Command, given []string) error {
			if err := ios.validate(cmd); err != nil {
				return err
			}
			return k.process(cmd, given[0], exec, func(ctx context.Context, p *process) error { return p.attach(ctx, ios) })
		},
	}
	cmd.Flags().StringVar(&exec, "exec-id", "", "`id` of an exec")
	ios.addSession(cmd)
	return cmd
}
