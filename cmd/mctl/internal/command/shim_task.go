package command

import (
	"context"
	"fmt"
	"strconv"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/direct"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/shimapi"
)

// What a shim is asked by the task API, as managerd asks it.

type stateRow struct {
	ID         string     `json:"id"`
	ExecID     string     `json:"exec_id,omitempty"`
	PID        uint32     `json:"pid"`
	Status     string     `json:"status"`
	ExitStatus *uint32    `json:"exit_status,omitempty"` // of one that is stopped
	ExitedAt   *time.Time `json:"exited_at,omitempty"`
	Bundle     string     `json:"bundle"`
}

var stateTable = table.Table[stateRow]{Wide: true, Columns: []table.Column[stateRow]{
	{Title: "TASK", Cell: func(r stateRow) string { return r.ID }},
	{Title: "EXEC", Cell: func(r stateRow) string { return orDash(r.ExecID) }},
	{Title: "PID", Cell: func(r stateRow) string { return number(r.PID) }},
	{Title: "STATUS", Cell: func(r stateRow) string { return r.Status }},
	{Title: "EXIT", Cell: func(r stateRow) string {
		if r.ExitStatus == nil {
			return "-"
		}
		return strconv.Itoa(int(*r.ExitStatus))
	}},
}}

func (k *keepers) taskState() *cobra.Command {
	var exec string
	cmd := &cobra.Command{
		Use: "state ID", Short: "Print the state of a container or of an exec, as its shim says it", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return k.ask(cmd, given[0], asking, func(ctx context.Context, s *direct.Shim, c *shimapi.Client) error {
				r, err := c.State(ctx, &task.StateRequest{ID: s.ID, ExecID: exec})
				if err != nil {
					return err
				}
				row := stateRow{ID: s.ID, ExecID: r.ExecID, PID: r.Pid, Status: r.Status.String(), Bundle: r.Bundle}
				if r.Status == tasktypes.Status_STOPPED {
					row.ExitStatus, row.ExitedAt = &r.ExitStatus, new(r.ExitedAt.AsTime())
				}
				return stateTable.Print(k.out, k.format(), []stateRow{row})
			})
		},
	}
	cmd.Flags().StringVar(&exec, "exec-id", "", "`id` of an exec")
	return cmd
}

func (k *keepers) ps() *cobra.Command {
	return &cobra.Command{
		Use: "ps ID", Short: "List the processes of a container", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return k.ask(cmd, given[0], asking, func(ctx context.Context, s *direct.Shim, c *shimapi.Client) error {
				r, err := c.Pids(ctx, &task.PidsRequest{ID: s.ID})
				if err != nil {
					return err
				}
				return k.printProcesses(r.Processes)
			})
		},
	}
}

func (k *keepers) metrics() *cobra.Command {
	return &cobra.Command{
		Use: "metrics ID", Short: "Print what a container uses: memory, CPU time, processes", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return k.ask(cmd, given[0], asking, func(ctx context.Context, s *direct.Shim, c *shimapi.Client) error {
				r, err := c.Stats(ctx, &task.StatsRequest{ID: s.ID})
				if err != nil {
					return err
				}
				return k.printMetrics(k.format(), s.ID, time.Now(), r.Stats)
			})
		},
	}
}

func (k *keepers) kill() *cobra.Command {
	var name, exec string
	var all bool
	cmd := &cobra.Command{
		Use: "kill ID", Short: "Send a signal to a container or to an exec", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			number, err := parseSignal(name)
			if err != nil {
				return misused(cmd, "%w", err)
			}
			return k.ask(cmd, given[0], asking, func(ctx context.Context, s *direct.Shim, c *shimapi.Client) error {
				_, err := c.Kill(ctx, &task.KillRequest{ID: s.ID, ExecID: exec, Signal: number, All: all})
				return err
			})
		},
	}
	cmd.Flags().StringVarP(&name, "signal", "s", "TERM", "`signal`: a name, with or without SIG, or a number")
	cmd.Flags().BoolVar(&all, "all", false, "send it to all processes of the container")
	cmd.Flags().StringVar(&exec, "exec-id", "", "`id` of an exec to send it to")
	return cmd
}

func (k *keepers) wait() *cobra.Command {
	var exec string
	cmd := &cobra.Command{
		Use: "wait ID", Short: "Wait until a container or an exec has ended, and exit with its status", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return k.ask(cmd, given[0], 0, func(ctx context.Context, s *direct.Shim, c *shimapi.Client) error {
				r, err := c.Wait(ctx, &task.WaitRequest{ID: s.ID, ExecID: exec})
				if err != nil || r.ExitStatus == 0 {
					return err
				}
				return exitStatus(r.ExitStatus)
			})
		},
	}
	cmd.Flags().StringVar(&exec, "exec-id", "", "`id` of an exec to wait for")
	return cmd
}

func (k *keepers) delete() *cobra.Command {
	var exec string
	cmd := &cobra.Command{
		Use: "delete ID", Aliases: []string{"rm"}, Short: "Delete a container, or an exec, that has ended; its shim then ends too", Args: args(1, 1),
		Long: `Deletes the task as managerd would, and ends the shim. What stands in the bundle stays for the next managerd, which tells the
deletion on and removes the rest; the container, as managerd has it stored, stays.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			return k.ask(cmd, given[0], answering, func(ctx context.Context, s *direct.Shim, c *shimapi.Client) error {
				r, err := c.Delete(ctx, &task.DeleteRequest{ID: s.ID, ExecID: exec})
				if err != nil {
					return err
				}
				if exec == "" {
					if _, err := c.Shutdown(ctx, &task.ShutdownRequest{ID: s.ID}); err != nil {
						return fmt.Errorf("container %s is deleted, its shim does not end: %w", s.ID, err)
					}
				}
				row := stateRow{ID: s.ID, ExecID: exec, PID: r.Pid, Status: "DELETED", ExitStatus: &r.ExitStatus, Bundle: s.Path}
				if r.ExitedAt != nil {
					row.ExitedAt = new(r.ExitedAt.AsTime())
				}
				return stateTable.Print(k.out, k.format(), []stateRow{row})
			})
		},
	}
	cmd.Flags().StringVar(&exec, "exec-id", "", "`id` of an exec to delete instead")
	return cmd
}
