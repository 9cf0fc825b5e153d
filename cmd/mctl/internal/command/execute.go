package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/session"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/spec"
	shim "github.com/managerd/managerd/protos/shim/v1"
)

const processType = "types.containerd.io/opencontainers/runtime-spec/1/Process"

func (c *cli) tasksStart() *cobra.Command {
	ios := &ioFlags{}
	cmd := &cobra.Command{
		Use: "start [flags] ID", Short: "Run a container that was made or has ended, and stay with it", Args: args(1, 1),
		Long: `Runs a container. Without --detach mctl stays until it has ended and exits with its status, as "mctl run" does.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			if err := ios.validate(cmd); err != nil {
				return err
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				k, mounts, err := containerOf(ctx, cl, given[0])
				if err != nil {
					return err
				}
				s, err := specOf(k)
				if err != nil {
					return err
				}
				tty := s.Process != nil && s.Process.Terminal
				con, err := c.console(cmd, tty, ios.detach)
				if err != nil {
					return fmt.Errorf("container %s has a terminal, standard input is none; use --detach", k.ID)
				}
				p := &process{c: c, cl: cl, id: k.ID}
				pid, _, err := p.run(ctx, ios, tty, con, func(ctx context.Context, s *session.Streams) (uint32, error) {
					pid, err := p.create(ctx, mounts.Mounts, s)
					if errdefs.IsAlreadyExists(err) {
						return 0, fmt.Errorf("%w; if it has ended, remove it first with `mctl tasks rm %s`", err, k.ID)
					}
					return pid, err
				})
				if err == nil && ios.detach && c.format() == table.JSON {
					return table.PrintJSON(c.out, started{ID: k.ID, PID: pid})
				}
				return err
			})
		},
	}
	ios.add(cmd)
	return cmd
}

// specOf reads a container's spec.
func specOf(k *containersapi.Container) (*specs.Spec, error) {
	var s specs.Spec
	if err := json.Unmarshal(k.Spec.GetValue(), &s); err != nil {
		return nil, fmt.Errorf("cannot read the spec of container %s: %w", k.ID, err)
	}
	return &s, nil
}

// execFlags say what is different from the container's own process.
type execFlags struct {
	id, cwd, user string
	env           []string
	tty           bool
	timeout       time.Duration
}

func (c *cli) tasksExec() *cobra.Command {
	return c.execCommand(func(cmd *cobra.Command, id, exec string, f func(ctx context.Context, p *process) error) error {
		return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
			return f(ctx, &process{c: c, cl: cl, id: id, exec: exec})
		})
	}, `  mctl tasks exec web ps
  mctl t exec -t web sh
  mctl t exec -d --exec-id watch --log-uri file:///tmp/watch.log web top -b`)
}

// execCommand is exec, by way of the daemon or straight to the shim: reach calls f with the process that is to be.
func (c *cli) execCommand(reach func(cmd *cobra.Command, id, exec string, f func(ctx context.Context, p *process) error) error, example string) *cobra.Command {
	f, ios := &execFlags{}, &ioFlags{}
	cmd := &cobra.Command{
		Use: "exec [flags] ID COMMAND [ARG...]", Short: "Run a further process in a container", Args: args(2, -1),
		Long: `Runs COMMAND in the running container ID, with the environment, user and limits of its own process. Without --detach mctl stays
until COMMAND has ended and exits with its status. With --timeout the shim kills COMMAND, and all that it has begotten, when its time
is over, whether mctl and managerd still live or not; the status is then 137.`,
		Example: example,
		RunE: func(cmd *cobra.Command, given []string) error {
			if err := ios.validate(cmd); err != nil {
				return err
			}
			if f.id == "" {
				f.id = fmt.Sprintf("mctl-%d-%d", os.Getpid(), time.Now().UnixNano())
			}
			if err := identifiers.Validate(f.id); err != nil {
				return misused(cmd, "--exec-id: %w", err)
			}
			if f.timeout < 0 {
				return misused(cmd, "--timeout %v is negative", f.timeout)
			}
			con, err := c.console(cmd, f.tty, ios.detach)
			if err != nil {
				return err
			}
			return reach(cmd, given[0], f.id, func(ctx context.Context, process *process) error {
				process.timeout = f.timeout
				body, err := process.execSpec(ctx, f, given[1:])
				if err != nil {
					return err
				}
				pid, _, err := process.run(ctx, ios, f.tty, con, func(ctx context.Context, s *session.Streams) (uint32, error) {
					return 0, ofTask(given[0], process.add(ctx, body, s))
				})
				if err == nil && ios.detach && c.format() == table.JSON {
					return table.PrintJSON(c.out, started{ID: given[0], ExecID: f.id, PID: pid})
				}
				return err
			})
		},
	}
	cmd.Flags().SetInterspersed(false)
	cmd.Flags().BoolVarP(&f.tty, "tty", "t", false, "give the process a terminal")
	cmd.Flags().StringVar(&f.id, "exec-id", "", "`id` of the process (default: made up)")
	cmd.Flags().StringVar(&f.cwd, "cwd", "", "working `directory`")
	cmd.Flags().StringVarP(&f.user, "user", "u", "", "`USER[:GROUP]`, names or numbers")
	cmd.Flags().DurationVar(&f.timeout, "timeout", 0, "`time` after which the process and all that it has begotten are killed (0: none)")
	cmd.Flags().StringArrayVarP(&f.env, "env", "e", nil, "further environment `KEY=VALUE`")
	ios.add(cmd)
	return cmd
}

// execSpec is the container's own process, changed as the flags say.
func (p *process) execSpec(ctx context.Context, f *execFlags, args []string) (*anypb.Any, error) {
	s, pid, err := p.ownSpec(ctx)
	if err != nil {
		return nil, err
	}
	s.Process = spec.Process(s.Process, args, f.tty)
	opts := []spec.Option{spec.Env(f.env...)}
	if f.cwd != "" {
		opts = append(opts, spec.Cwd(f.cwd))
	}
	if f.user != "" {
		// Names are those of the running container.
		init, err := pid()
		if err != nil {
			return nil, ofTask(p.id, err)
		}
		opts = append(opts, spec.User(f.user, fmt.Sprintf("/proc/%d/root", init)))
	}
	if err := spec.Apply(s, opts...); err != nil {
		return nil, err
	}
	data, err := json.Marshal(s.Process)
	body := &anypb.Any{TypeUrl: processType, Value: data}
	if err != nil || f.timeout == 0 {
		return body, err
	}
	own := &shim.ExecSpec{Process: body, TimeoutNano: int64(f.timeout)}
	data, err = proto.Marshal(own)
	return &anypb.Any{TypeUrl: string(own.ProtoReflect().Descriptor().FullName()), Value: data}, err
}

// ownSpec is the container's spec, and pid gives its init.
func (p *process) ownSpec(ctx context.Context) (s *specs.Spec, pid func() (uint32, error), err error) {
	if p.direct != nil {
		return p.direct.spec(ctx)
	}
	r, err := p.cl.Containers.Get(ctx, &containersapi.GetContainerRequest{ID: p.id})
	if err != nil {
		return nil, nil, ofContainer(err)
	}
	s, err = specOf(r.Container)
	return s, func() (uint32, error) {
		t, err := (&process{cl: p.cl, id: p.id}).get(ctx)
		return t.GetPid(), err
	}, err
}

func (c *cli) tasksAttach() *cobra.Command {
	ios, exec := &ioFlags{}, ""
	cmd := &cobra.Command{
		Use: "attach [flags] ID", Short: "Come back to the streams of a process", Args: args(1, 1),
		Long: `Connects with the streams of a task (or of an exec in it), stays until it has ended, removes it, and exits with its status. Its
container must have been started with --tty or --interactive, or left with the detach keys.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			if err := ios.validate(cmd); err != nil {
				return err
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				p := &process{c: c, cl: cl, id: given[0], exec: exec}
				return p.attach(ctx, ios)
			})
		},
	}
	cmd.Flags().StringVar(&exec, "exec-id", "", "`id` of an exec")
	ios.addSession(cmd)
	return cmd
}

func (p *process) attach(ctx context.Context, f *ioFlags) error {
	t, err := p.get(ctx)
	if err != nil {
		return ofTask(p.id, err)
	}
	if t.Stdout == "" {
		return fmt.Errorf("cannot attach to %s: it was started without streams to attach to; start it with --interactive, --tty or --log-uri", p)
	}
	keys, err := session.ParseKeys(f.detachKeys)
	if err != nil {
		return err
	}
	s := &session.Streams{Stdin: t.Stdin, Stdout: t.Stdout, Stderr: t.Stderr, Terminal: t.Terminal}
	at := &session.Session{Streams: s, In: p.c.in, SigProxy: f.sigProxy, DetachKeys: keys}
	if t.Terminal {
		if at.Console, err = p.c.ownConsole(); err != nil {
			return fmt.Errorf("cannot attach to %s: it has a terminal, standard input is none", p)
		}
	}
	// Before anything is seen of the process: a signal that comes then is for it.
	defer at.Catch()()
	p.c.release()
	if err := s.Open(p.c.out, p.c.err); err != nil {
		if errors.Is(err, session.ErrTaken) {
			return fmt.Errorf("cannot attach to %s: %w", p, err)
		}
		return fmt.Errorf("cannot attach to %s: its output goes to %s: %w", p, t.Stdout, err)
	}
	defer s.Close()
	ended, err := p.stay(ctx, at)
	if ended {
		s.Forget()
	}
	return err
}

// exit is how a process ended.
type exit struct {
	ID         string    `json:"id"`
	ExecID     string    `json:"exec_id,omitempty"`
	ExitStatus uint32    `json:"exit_status"`
	ExitedAt   time.Time `json:"exited_at"`
}

func (c *cli) tasksWait() *cobra.Command {
	var exec string
	cmd := &cobra.Command{
		Use: "wait ID", Short: "Wait until a task has ended, and exit with its status", Args: args(1, 1),
		Long: `Waits until the task ID has ended, also while managerd is killed and started again, and exits with its exit status. The task is
not removed.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Wait(ctx, c.notice, given[0], exec)
				if err != nil {
					return ofTask(given[0], err)
				}
				if c.format() == table.JSON {
					if err := table.PrintJSON(c.out, exit{given[0], exec, r.ExitStatus, r.ExitedAt.AsTime()}); err != nil {
						return err
					}
				}
				if r.ExitStatus != 0 {
					return exitStatus(r.ExitStatus)
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&exec, "exec-id", "", "`id` of an exec to wait for instead")
	return cmd
}

func (c *cli) tasksStop() *cobra.Command {
	var name string
	var grace time.Duration
	cmd := &cobra.Command{
		Use: "stop ID...", Short: "End tasks: a signal first, then, after a time of grace, KILL", Args: args(1, -1),
		Long: `Sends the signal by which the image wants to be stopped, or TERM, waits for the end, and kills what has not ended after
--grace. The tasks are not removed, and neither are their containers.`,
		RunE: func(cmd *cobra.Command, ids []string) error {
			if _, err := parseSignal(name); name != "" && err != nil {
				return misused(cmd, "%w", err)
			}
			if grace < 0 {
				return misused(cmd, "--grace %v is negative", grace)
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				exits, err := all(ids, func(id string) (exit, error) {
					e, err := c.stop(ctx, cl, id, name, grace)
					return e, ofTask(id, err)
				})
				if c.format() == table.JSON {
					return errors.Join(table.Table[exit]{}.Print(c.out, table.JSON, exits), err)
				}
				return err
			})
		},
	}
	cmd.Flags().DurationVarP(&grace, "grace", "g", 10*time.Second, "`time` between the signal and KILL")
	cmd.Flags().StringVarP(&name, "signal", "s", "", "`signal` to begin with")
	return cmd
}

// stop ends one task.
func (c *cli) stop(ctx context.Context, cl *client.Client, id, signal string, grace time.Duration) (exit, error) {
	p := &process{c: c, cl: cl, id: id}
	sig, err := c.stopSignal(ctx, cl, id, signal)
	if err != nil {
		return exit{}, err
	}
	t, err := p.get(ctx)
	if err != nil {
		return exit{}, err
	}
	if t.Status == tasktypes.Status_STOPPED {
		return exit{ID: id, ExitStatus: t.ExitStatus, ExitedAt: t.ExitedAt.AsTime()}, nil
	}
	gone := func(err error) bool { return errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) }
	if err := p.Kill(ctx, sig); err != nil && !gone(err) {
		return exit{}, err
	}
	wait, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	r, err := cl.Wait(wait, c.notice, id, "")
	// The daemon knows of the deadline, and may be the first to say that it has passed.
	late := wait.Err() != nil || errdefs.IsDeadlineExceeded(err) || errors.Is(err, context.DeadlineExceeded)
	if err != nil && late && ctx.Err() == nil {
		if err := p.kill(ctx, sigkill, true); err != nil && !gone(err) {
			return exit{}, err
		}
		r, err = cl.Wait(ctx, c.notice, id, "")
	}
	return exit{ID: id, ExitStatus: r.GetExitStatus(), ExitedAt: r.GetExitedAt().AsTime()}, err
}
