package command

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/launch"
	"github.com/managerd/managerd/cmd/mctl/internal/session"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

// started is what -o json tells of a process that was left running.
type started struct {
	ID     string `json:"id"`
	ExecID string `json:"exec_id,omitempty"`
	PID    uint32 `json:"pid"`
}

func (c *cli) runCommand() *cobra.Command {
	f, ios, remove := &launch.Flags{}, &ioFlags{}, false
	cmd := &cobra.Command{
		Use:   "run [flags] IMAGE ID [COMMAND] [ARG...]",
		Short: "Make a container of an image and run it",
		Long: `Makes a container, named ID, of IMAGE and runs COMMAND in it, or what the image says. Without --detach mctl stays until it has
ended, with its streams and signals connected, and exits with its status; managerd may be killed and started again meanwhile. With a
terminal (--tty), ctrl-p ctrl-q leaves it running.`,
		Example: `  mctl run --rm docker.io/library/busybox:latest hello echo hello
  mctl run --rm -t busybox sh sh
  mctl run -d --log-uri file:///var/log/web.log --memory-limit 64MiB --cpus 0.5 web:1 web
  mctl run --rm --rootfs /srv/root box /bin/sh -c 'exit 7'; echo $?`,
		RunE: func(cmd *cobra.Command, given []string) error {
			image, id, args, err := f.Arguments(given)
			if err == nil {
				err = f.Validate()
			}
			switch {
			case err != nil:
				return misused(cmd, "%w", err)
			case remove && ios.detach:
				return misused(cmd, "--rm and --detach exclude each other: nobody would be there to remove the container")
			}
			if err := ios.validate(cmd); err != nil {
				return err
			}
			con, err := c.console(cmd, f.TTY, ios.detach)
			if err != nil {
				return err
			}
			var size launch.Size
			if con != nil {
				if width, height, err := con.Size(); err == nil {
					size = launch.Size{Width: uint(width), Height: uint(height)}
				}
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				made, err := f.Create(ctx, cl, c.namespace, image, id, args, size)
				if err != nil {
					return err
				}
				p := &process{c: c, cl: cl, id: id}
				pid, ended, err := p.run(ctx, ios, f.TTY, con, func(ctx context.Context, s *session.Streams) (uint32, error) {
					return p.create(ctx, made.Rootfs, s)
				})
				switch {
				case pid == 0 && err != nil: // it never ran: nothing is left of it
					return errors.Join(err, made.Undo(ctx))
				case ended && remove:
					if rerr := made.Remove(ctx); rerr != nil {
						return rerr
					}
				case ios.detach && err == nil && c.format() == table.JSON:
					return table.PrintJSON(c.out, started{ID: id, PID: pid})
				}
				return err
			})
		},
	}
	cmd.Flags().SetInterspersed(false) // what follows ID is the process's
	cmd.Flags().BoolVar(&remove, "rm", false, "remove the container when it has ended")
	ios.add(cmd)
	f.Add(cmd.Flags())
	return cmd
}
