package command

import (
	"context"
	"fmt"
	"strconv"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

type taskRow struct {
	ID     string `json:"id"`
	PID    uint32 `json:"pid"`
	Status string `json:"status"`
}

func (c *cli) tasksCommand() *cobra.Command {
	return group("tasks", "Manage what runs in containers", []string{"task", "t"}, c.tasksLs())
}

func (c *cli) tasksLs() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List tasks", Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				resp, err := cl.Tasks.List(ctx, &tasksapi.ListTasksRequest{})
				if err != nil {
					return err
				}
				var rows []taskRow
				for _, t := range resp.Tasks {
					if quiet {
						_, _ = fmt.Fprintln(c.out, t.ID)
					}
					rows = append(rows, taskRow{t.ID, t.Pid, t.Status.String()})
				}
				if quiet {
					return nil
				}
				return table.Print(c.out, c.format(), []table.Column[taskRow]{
					{Title: "TASK", Cell: func(r taskRow) string { return r.ID }},
					{Title: "PID", Cell: func(r taskRow) string { return strconv.Itoa(int(r.PID)) }},
					{Title: "STATUS", Cell: func(r taskRow) string { return r.Status }},
				}, rows)
			})
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only ids")
	return cmd
}
