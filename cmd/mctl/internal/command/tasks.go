package command

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/launch"
	"github.com/managerd/managerd/cmd/mctl/internal/session"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	managerapi "github.com/managerd/managerd/protos/manager/v1"
)

func (c *cli) tasksCommand() *cobra.Command {
	return group("tasks", "Manage what runs in containers", []string{"task", "t"},
		c.tasksStart(), c.tasksLs(), c.tasksExec(), c.tasksAttach(), c.tasksWait(), c.tasksStop(), c.tasksKill(),
		c.tasksPause(), c.tasksResume(), c.tasksRm(), c.tasksPs(), c.tasksMetrics())
}

// ofTask says what to do about an error about a task.
func ofTask(id string, err error) error {
	switch {
	case errdefs.IsNotFound(err):
		return fmt.Errorf("%w; `mctl tasks ls` lists tasks, `mctl tasks start %s` starts the one of a container", err, id)
	case errdefs.IsFailedPrecondition(err):
		return fmt.Errorf("%w; `mctl tasks ls` shows how it is", err)
	}
	return err
}

func lower(s tasktypes.Status) string { return strings.ToLower(s.String()) }

type taskRow struct {
	ID         string     `json:"id"`
	PID        uint32     `json:"pid"`
	Status     string     `json:"status"`
	ExitStatus *uint32    `json:"exit_status,omitempty"` // of one that is stopped
	ExitedAt   *time.Time `json:"exited_at,omitempty"`
	Since      *time.Time `json:"unresponsive_since,omitempty"` // its shim has not answered what was asked then
}

// status is what a person reads.
func (r taskRow) status() string {
	if r.Since == nil {
		return r.Status
	}
	return r.Status + ", unresponsive since " + r.Since.Local().Format("2006-01-02 15:04:05")
}

var taskTable = table.Table[taskRow]{Wide: true, Columns: []table.Column[taskRow]{
	{Title: "TASK", Cell: func(r taskRow) string { return r.ID }},
	{Title: "PID", Cell: func(r taskRow) string { return strconv.Itoa(int(r.PID)) }},
	{Title: "STATUS", Cell: taskRow.status},
}}

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
				var since map[string]*timestamppb.Timestamp
				if slices.ContainsFunc(resp.Tasks, func(t *tasktypes.Process) bool { return t.Status == tasktypes.Status_UNKNOWN }) {
					r, err := managerapi.NewShimsClient(cl.Conn).Unresponsive(ctx, &managerapi.UnresponsiveRequest{})
					if err != nil && !errdefs.IsNotImplemented(err) { // another daemon does not know
						return err
					}
					since = r.GetSince()
				}
				var rows []taskRow
				var ids []string
				for _, t := range resp.Tasks {
					r := taskRow{ID: t.ID, PID: t.Pid, Status: t.Status.String()}
					if t.Status == tasktypes.Status_STOPPED {
						r.ExitStatus, r.ExitedAt = &t.ExitStatus, new(t.ExitedAt.AsTime())
					}
					if at := since[t.ID]; at != nil && t.Status == tasktypes.Status_UNKNOWN {
						r.Since = new(at.AsTime())
					}
					rows, ids = append(rows, r), append(ids, t.ID)
				}
				return list(c, quiet, ids, taskTable, rows)
			})
		},
	}
	quietly(cmd, &quiet)
	return cmd
}

func (c *cli) tasksKill() *cobra.Command {
	var name, exec string
	var all bool
	cmd := &cobra.Command{
		Use: "kill ID", Short: "Send a signal (the one that the image wants to be stopped with, or TERM)", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			if _, err := parseSignal(name); name != "" && err != nil {
				return misused(cmd, "%w", err)
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				sig, err := c.stopSignal(ctx, cl, given[0], name)
				if err != nil {
					return err
				}
				_, err = cl.Tasks.Kill(ctx, &tasksapi.KillRequest{ContainerID: given[0], ExecID: exec, Signal: sig, All: all})
				return ofTask(given[0], err)
			})
		},
	}
	cmd.Flags().StringVarP(&name, "signal", "s", "", "`signal`: a name, with or without SIG, or a number")
	cmd.Flags().StringVar(&c.address, "address", fromEnv(), "`path` of the daemon's socket") // -a is --all here, as with ctr
	cmd.Flags().BoolVarP(&all, "all", "a", false, "send it to all processes of the container")
	cmd.Flags().StringVar(&exec, "exec-id", "", "`id` of an exec to send it to")
	return cmd
}

// stopSignal is the signal named, or the one that the container has from its image, or TERM.
func (c *cli) stopSignal(ctx context.Context, cl *client.Client, id, named string) (uint32, error) {
	if named == "" {
		named = "TERM"
		r, err := cl.Containers.Get(ctx, &containersapi.GetContainerRequest{ID: id})
		if err != nil {
			return 0, ofContainer(err)
		}
		if l := r.Container.Labels[launch.StopSignalLabel]; l != "" {
			named = l
		}
	}
	return parseSignal(named)
}

func (c *cli) tasksPause() *cobra.Command {
	return c.eachTask("pause ID...", nil, "Freeze tasks", func(ctx context.Context, cl *client.Client, id string) error {
		_, err := cl.Tasks.Pause(ctx, &tasksapi.PauseTaskRequest{ContainerID: id})
		return err
	})
}

func (c *cli) tasksResume() *cobra.Command {
	return c.eachTask("resume ID...", nil, "Let frozen tasks go on", func(ctx context.Context, cl *client.Client, id string) error {
		_, err := cl.Tasks.Resume(ctx, &tasksapi.ResumeTaskRequest{ContainerID: id})
		return err
	})
}

// eachTask is a command that does the same to any number of tasks.
func (c *cli) eachTask(use string, aliases []string, short string, f func(ctx context.Context, cl *client.Client, id string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Aliases: aliases, Short: short, Args: args(1, -1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return each(ids, func(id string) error { return ofTask(id, f(ctx, cl, id)) })
			})
		},
	}
}

func (c *cli) tasksRm() *cobra.Command {
	var force bool
	var exec string
	cmd := c.eachTask("rm ID...", []string{"delete", "del", "remove"}, "Remove tasks that have ended", func(ctx context.Context, cl *client.Client, id string) error {
		p := &process{c: c, cl: cl, id: id, exec: exec}
		t, err := p.get(ctx)
		if err != nil {
			return err
		}
		if t.Status != tasktypes.Status_STOPPED && force {
			if err := p.kill(ctx, sigkill, exec == ""); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			if _, err := p.Wait(ctx); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		} else if t.Status == tasktypes.Status_RUNNING || t.Status == tasktypes.Status_PAUSED {
			return fmt.Errorf("cannot remove %s: it is %s; end it first with `mctl tasks stop %s`, or use --force", p, lower(t.Status), id)
		}
		// Whoever waited for the end of the process may remove it as well, and be first.
		if err := p.remove(ctx); err != nil && !(force && errdefs.IsNotFound(err)) {
			return err
		}
		session.Forget(t.Stdin, t.Stdout, t.Stderr)
		return nil
	})
	cmd.Flags().BoolVarP(&force, "force", "f", false, "kill one that runs")
	cmd.Flags().StringVar(&exec, "exec-id", "", "`id` of an exec to remove instead")
	return cmd
}

type psRow struct {
	PID  uint32          `json:"pid"`
	Info json.RawMessage `json:"info,omitempty"`
}

func (c *cli) tasksPs() *cobra.Command {
	return &cobra.Command{
		Use: "ps ID", Short: "List the processes of a task", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Tasks.ListPids(ctx, &tasksapi.ListPidsRequest{ContainerID: given[0]})
				if err != nil {
					return ofTask(given[0], err)
				}
				return c.printProcesses(r.Processes)
			})
		},
	}
}

// printProcesses prints the processes of a task, with what its shim knows of each.
func (c *cli) printProcesses(processes []*tasktypes.ProcessInfo) error {
	var rows []psRow
	for _, p := range processes {
		row := psRow{PID: p.Pid}
		if p.Info != nil {
			v, err := typeurl.UnmarshalAny(p.Info)
			if err == nil {
				row.Info, err = json.Marshal(v)
			}
			if err != nil {
				return fmt.Errorf("cannot read about process %d: %w", p.Pid, err)
			}
		}
		rows = append(rows, row)
	}
	return table.Table[psRow]{Wide: true, Columns: []table.Column[psRow]{
		{Title: "PID", Cell: func(r psRow) string { return strconv.Itoa(int(r.PID)) }},
		{Title: "INFO", Cell: func(r psRow) string {
			if r.Info == nil {
				return "-"
			}
			return string(r.Info)
		}},
	}}.Print(c.out, c.format(), rows)
}
