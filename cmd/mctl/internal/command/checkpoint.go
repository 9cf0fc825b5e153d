package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/checkpoint"
	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/launch"
	"github.com/managerd/managerd/cmd/mctl/internal/session"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

func (c *cli) tasksCheckpoint() *cobra.Command {
	var exit bool
	var images, work string
	cmd := &cobra.Command{
		Use: "checkpoint [flags] CONTAINER", Short: "Save a running task with criu, and print the name of the checkpoint", Args: args(1, 1),
		Long: `Saves the processes of a task, and what the container has changed in its root file system, as an image, whose name is
printed; mctl containers restore --live makes a container of it again. With --image-path only criu's files are written, to that
directory. It needs criu (docs/checkpoint.md).`,
		RunE: func(cmd *cobra.Command, given []string) (err error) {
			opts := &options.CheckpointOptions{Exit: exit}
			if opts.ImagePath, err = absolute(images); err != nil {
				return err
			}
			if opts.WorkPath, err = absolute(work); err != nil {
				return err
			}
			any, err := typeurl.MarshalAnyToProto(opts)
			if err != nil {
				return err
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				if images != "" {
					_, err := cl.Tasks.Checkpoint(ctx, &tasksapi.CheckpointTaskRequest{ContainerID: given[0], Options: any})
					return ofTask(given[0], err)
				}
				name := fmt.Sprintf("containerd.io/checkpoint/%s:%s", given[0], time.Now().Format("01-02-2006-15:04:05"))
				err := c.checkpoint(ctx, cl, given[0], name, checkpoint.Parts{Task: true, Options: any, RW: true})
				if err != nil {
					return err
				}
				if c.format() == table.JSON {
					return table.PrintJSON(c.out, map[string]string{"checkpoint": name})
				}
				_, err = fmt.Fprintln(c.out, name)
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&exit, "exit", false, "end the task when it is saved")
	cmd.Flags().StringVar(&images, "image-path", "", "`directory` for criu's files; no image is made then")
	cmd.Flags().StringVar(&work, "work-path", "", "`directory` for criu's log")
	return cmd
}

// checkpoint makes a checkpoint of one moment: a task that runs is paused meanwhile.
func (c *cli) checkpoint(ctx context.Context, cl *client.Client, id, name string, p checkpoint.Parts) (err error) {
	r, err := cl.Containers.Get(ctx, &containersapi.GetContainerRequest{ID: id})
	if err != nil {
		return ofContainer(err)
	}
	t, err := cl.Tasks.Get(ctx, &tasksapi.GetRequest{ContainerID: id})
	if err != nil && (p.Task || !errdefs.IsNotFound(err)) {
		return ofTask(id, err)
	}
	if t.GetProcess().GetStatus() == tasktypes.Status_RUNNING {
		if _, err := cl.Tasks.Pause(ctx, &tasksapi.PauseTaskRequest{ContainerID: id}); err != nil {
			return ofTask(id, err)
		}
		defer func() {
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleaning)
			defer cancel()
			_, rerr := cl.Tasks.Resume(end, &tasksapi.ResumeTaskRequest{ContainerID: id})
			if !errdefs.IsFailedPrecondition(rerr) && !errdefs.IsNotFound(rerr) { // it was to end
				err = errors.Join(err, rerr)
			}
		}()
	}
	return cl.Leased(ctx, func(ctx context.Context) error { return checkpoint.Make(ctx, cl, r.Container, name, p) })
}

func (c *cli) containersCheckpoint() *cobra.Command {
	var p checkpoint.Parts
	cmd := &cobra.Command{
		Use: "checkpoint [flags] CONTAINER REF", Short: "Save a container as an image named REF; it runs on", Args: args(2, 2),
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return c.checkpoint(ctx, cl, given[0], given[1], p)
			})
		},
	}
	cmd.Flags().BoolVar(&p.RW, "rw", false, "with what it has changed in its root file system")
	cmd.Flags().BoolVar(&p.Image, "image", false, "with the image that it was made of")
	cmd.Flags().BoolVar(&p.Task, "task", false, "with its processes, by criu (docs/checkpoint.md)")
	return cmd
}

func (c *cli) containersRestore() *cobra.Command {
	ios, rw, live := &ioFlags{}, false, false
	cmd := &cobra.Command{
		Use: "restore [flags] CONTAINER REF", Short: "Make a container of a checkpoint, and run it", Args: args(2, 2),
		Long: `Makes a container, named CONTAINER, of the checkpoint REF and runs it: with --live its processes go on where they were, else
they begin anew. Without --detach mctl stays until it has ended, as run does.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			if err := ios.validate(cmd); err != nil {
				return err
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				from, err := checkpoint.Find(ctx, cl, given[1])
				if err != nil {
					return err
				}
				var task *types.Descriptor
				if live {
					if task = from.Task; task == nil {
						return fmt.Errorf("checkpoint %s has no processes; make it with --task: %w", given[1], errdefs.ErrFailedPrecondition)
					}
				}
				var spec specs.Spec
				if err := json.Unmarshal(from.Spec.Value, &spec); err != nil {
					return fmt.Errorf("the spec of checkpoint %s is malformed: %w", given[1], err)
				}
				tty := spec.Process != nil && spec.Process.Terminal
				con, err := c.console(cmd, tty, ios.detach)
				if err != nil {
					return err
				}
				made, err := launch.Restore(ctx, cl, c.namespace, given[0], from, rw)
				if err != nil {
					return err
				}
				p := &process{c: c, cl: cl, id: given[0], from: task}
				pid, _, err := p.run(ctx, ios, tty, con, func(ctx context.Context, s *session.Streams) (uint32, error) {
					return p.create(ctx, made.Rootfs, s)
				})
				switch {
				case pid == 0 && err != nil:
					return errors.Join(err, made.Undo(ctx))
				case ios.detach && err == nil && c.format() == table.JSON:
					return table.PrintJSON(c.out, started{ID: given[0], PID: pid})
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&rw, "rw", false, "with the changes of its root file system that the checkpoint has")
	cmd.Flags().BoolVar(&live, "live", false, "with its processes")
	ios.add(cmd)
	return cmd
}

// absolute is filepath.Abs but for the empty path.
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}
