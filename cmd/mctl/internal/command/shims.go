package command

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/direct"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

const (
	// defaultState is where a managerd keeps its bundles that nobody told otherwise.
	defaultState = "/run/managerd"
	// surveying is how long shim ls waits for a shim.
	surveying = 2 * time.Second
	// asking is how long a shim may take that was asked something; answering is how long when that is work.
	asking, answering = 5 * time.Second, 30 * time.Second
)

// keepers are the commands that speak to shims and not to the daemon.
type keepers struct {
	*cli
	state string
}

func (c *cli) shimCommand() *cobra.Command {
	k := &keepers{cli: c}
	g := group("shim", "Look at the processes that keep containers, with or without managerd", []string{"shims"},
		k.ls(), k.inspect(), k.timings(), k.blackbox(), k.stacks(), k.taskState(), k.ps(), k.metrics(), k.logs(), k.reopenLogs(), k.events(), k.exits(),
		k.exec(), k.attach(), k.kill(), k.wait(), k.delete(), k.pprof(), k.trace(), k.adopt(), k.upgrade())
	g.Long = `Speaks to the shims themselves, which it finds below managerd's state directory: managerd may be stopped, dead or stuck. A shim
that does not answer is shown as such; blackbox, events and exits read files, and work with it stopped or dead.`
	g.PersistentFlags().StringVar(&k.state, "state", env(defaultState, "MANAGERD_STATE"), "managerd's state `directory`")
	return g
}

// ask calls f with the shim of a container, which has limit to answer unless --timeout says otherwise (0: any time).
func (k *keepers) ask(cmd *cobra.Command, id string, limit time.Duration, f func(ctx context.Context, s *direct.Shim, c *shimapi.Client) error) error {
	return k.within(cmd, func(ctx context.Context) error {
		s, err := direct.Find(k.state, k.namespace, id)
		if err != nil {
			return err
		}
		if k.timeout == 0 && limit > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, limit)
			defer cancel()
		}
		c, err := s.Dial(ctx)
		if errdefs.IsNotFound(err) {
			return fmt.Errorf("%w; `mctl shim adopt %s` starts a successor, `mctl shim blackbox %s` says what it did last", err, id, id)
		}
		if err == nil {
			defer func() { _ = c.Close() }()
			err = f(ctx, s, c)
		}
		if errors.Is(err, context.DeadlineExceeded) || errdefs.IsDeadlineExceeded(err) {
			return fmt.Errorf("shim of container %s, process %d, does not answer; `mctl shim blackbox %s` says what it did last: %w", id, s.PID(), id, err)
		}
		return err
	})
}

var shimTable = table.Table[direct.Status]{Wide: true, Columns: []table.Column[direct.Status]{
	{Title: "NAMESPACE", Cell: func(s direct.Status) string { return s.Namespace }},
	{Title: "CONTAINER", Cell: func(s direct.Status) string { return s.ID }},
	{Title: "PID", Cell: func(s direct.Status) string { return number(s.PID) }},
	{Title: "SHIM", Cell: func(s direct.Status) string { return condition(s) }},
	{Title: "VERSION", Cell: func(s direct.Status) string { return orDash(s.Version) }},
	{Title: "AGE", Cell: func(s direct.Status) string { return age(s.StartedAt) }},
	{Title: "PSS", Cell: func(s direct.Status) string { return memory(s.PSS) }},
	{Title: "STATE", Cell: func(s direct.Status) string { return marked(orDash(s.State), s.OOMKilled, false) }},
}}

func number(n uint32) string {
	if n == 0 {
		return "-"
	}
	return strconv.Itoa(int(n))
}

func age(since *time.Time) string {
	if since == nil {
		return "-"
	}
	return units.HumanDuration(time.Since(*since))
}

func memory(bytes int64) string {
	if bytes == 0 {
		return "-"
	}
	return table.Bytes(bytes)
}

// condition says with the process's state why a shim may be unresponsive.
func condition(s direct.Status) string {
	if s.Condition == direct.Unresponsive && s.ProcessState != "" {
		return fmt.Sprintf("%s (%s)", s.Condition, s.ProcessState)
	}
	return string(s.Condition)
}

func (k *keepers) ls() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the shims of all namespaces: whether they live and answer, their memory, their containers", Args: args(0, 0),
		Long: `Asks all shims at once, and gives each two seconds (or --timeout) to answer. One that does not is unresponsive, with the state
of its process: T is stopped, D waits for a device. What is then shown of it and its container is what it has written down.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return k.within(cmd, func(ctx context.Context) error {
				all, err := direct.List(k.state)
				if err != nil {
					return err
				}
				limit := surveying
				if k.timeout > 0 {
					limit = k.timeout
				}
				rows := direct.Survey(ctx, all, limit)
				if cause := context.Cause(ctx); errors.As(cause, new(interrupted)) {
					return cause
				}
				var ids []string
				for _, r := range rows {
					ids = append(ids, r.ID)
				}
				return list(k.cli, quiet, ids, shimTable, rows)
			})
		},
	}
	quietly(cmd, &quiet)
	return cmd
}

type processRow struct {
	ExecID      string     `json:"exec_id,omitempty"` // none: the container's init
	PID         uint32     `json:"pid,omitempty"`
	State       string     `json:"state"`
	ExitStatus  *uint32    `json:"exit_status,omitempty"` // of one that has ended
	ExitedAt    *time.Time `json:"exited_at,omitempty"`
	ExitUnknown string     `json:"exit_unknown,omitempty"`
	OOMKilled   bool       `json:"oom_killed,omitempty"`
	Timeout     string     `json:"timeout,omitempty"` // of an exec
	TimedOut    bool       `json:"timed_out,omitempty"`
	Terminal    bool       `json:"terminal"`
	Stdin       string     `json:"stdin,omitempty"`
	Stdout      string     `json:"stdout,omitempty"`
	Stderr      string     `json:"stderr,omitempty"`
	Outputs     []output   `json:"outputs,omitempty"`
}

var processTable = table.Table[processRow]{Wide: true, Columns: []table.Column[processRow]{
	{Title: "PROCESS", Cell: func(r processRow) string {
		if r.ExecID == "" {
			return "init"
		}
		return "exec " + r.ExecID
	}},
	{Title: "PID", Cell: func(r processRow) string { return number(r.PID) }},
	{Title: "STATE", Cell: func(r processRow) string { return r.State }},
	{Title: "EXIT", Cell: func(r processRow) string {
		switch {
		case r.ExitUnknown != "":
			return "unknown: " + r.ExitUnknown
		case r.ExitStatus != nil:
			return marked(strconv.Itoa(int(*r.ExitStatus)), r.OOMKilled, r.TimedOut)
		}
		return "-"
	}},
	{Title: "STDOUT", Cell: func(r processRow) string {
		if r.Terminal {
			return "terminal " + r.Stdout
		}
		return orDash(r.Stdout)
	}},
	{Title: "WAITS", Cell: func(r processRow) string { return orDash(waiting(r.Outputs)) }},
}}

// description is a DescribeResponse as people and scripts read it.
type description struct {
	Namespace   string       `json:"namespace"`
	ID          string       `json:"id"`
	PID         uint32       `json:"pid"`
	Version     string       `json:"version"`
	Revision    string       `json:"revision"`
	StartedAt   time.Time    `json:"started_at"`
	Bundle      string       `json:"bundle"`
	Socket      string       `json:"socket"`
	Incarnation string       `json:"incarnation"`
	LastSeq     uint64       `json:"last_seq"`
	Goroutines  uint32       `json:"goroutines"`
	FDs         uint32       `json:"fds"`
	OOMKills    uint64       `json:"oom_kills"`
	OOMLevel    string       `json:"oom_level,omitempty"`  // where the limit is that was hit last: own, below, ancestor, machine
	OOMCgroup   string       `json:"oom_cgroup,omitempty"` // which has it
	Trimmed     uint64       `json:"trimmed_seq"`
	Processes   []processRow `json:"processes"`
	Sandbox     *sandboxOf   `json:"sandbox,omitempty"` // what a shim of a sandbox keeps
}

// sandboxOf is what a shim says of the sandbox that it keeps.
type sandboxOf struct {
	State      string   `json:"state"`
	PID        uint32   `json:"pid,omitempty"` // of its init
	Namespaces []string `json:"namespaces"`
	Members    []string `json:"members,omitempty"` // that were made on its connection
}

// describe asks one of our shims about itself.
func describe(ctx context.Context, s *direct.Shim, c *shimapi.Client) (*shim.DescribeResponse, error) {
	d, err := c.Shim().Describe(ctx, &shim.DescribeRequest{})
	if err = shimapi.FromWire(err); errdefs.IsNotImplemented(err) {
		return nil, fmt.Errorf("shim of container %s is not one of ours and does not tell; `mctl shim state` and `mctl shim ps` work: %w", s.Name(), err)
	}
	return d, err
}

func (k *keepers) inspect() *cobra.Command {
	return &cobra.Command{
		Use: "inspect ID", Short: "Print what a shim says of itself and of its processes", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return k.ask(cmd, given[0], asking, func(ctx context.Context, s *direct.Shim, c *shimapi.Client) error {
				r, err := describe(ctx, s, c)
				if err != nil {
					return err
				}
				_, p, err := s.Bundle.Shim()
				if err != nil {
					return err
				}
				d := description{
					r.Namespace, r.Id, r.Pid, r.Version, r.Revision, r.StartedAt.AsTime(), r.Bundle, strings.TrimPrefix(p.Address, "unix://"),
					r.Incarnation, r.LastSeq, r.Goroutines, r.Fds, r.OomKills, r.OomLevel, r.OomCgroup, r.TrimmedSeq, []processRow{}, nil,
				}
				for _, p := range r.Processes {
					row := processRow{
						ExecID: p.ExecId, PID: p.Pid, State: p.State, ExitUnknown: p.ExitUnknown,
						Terminal: p.Terminal, Stdin: p.Stdin, Stdout: p.Stdout, Stderr: p.Stderr, OOMKilled: p.OomKilled, TimedOut: p.TimedOut,
					}
					if p.TimeoutNano > 0 {
						row.Timeout = time.Duration(p.TimeoutNano).String()
					}
					row.Outputs = outputs(p.Outputs)
					if p.ExitedAt != nil {
						row.ExitStatus, row.ExitedAt = &p.ExitStatus, new(p.ExitedAt.AsTime())
					}
					d.Processes = append(d.Processes, row)
				}
				if b := r.Sandbox; b != nil {
					d.Sandbox = &sandboxOf{b.State, b.Pid, b.Namespaces, b.Members}
				}
				slices.SortFunc(d.Processes, func(a, b processRow) int { return strings.Compare(a.ExecID, b.ExecID) }) // the init first
				if k.format() == table.JSON {
					return table.PrintJSON(k.out, d)
				}
				return k.printDescription(d)
			})
		},
	}
}

func (k *keepers) printDescription(d description) error {
	what := "container"
	if d.Sandbox != nil {
		what = "sandbox"
	}
	rows := []metricRow{
		{"namespace", d.Namespace}, {what, d.ID}, {"pid", strconv.Itoa(int(d.PID))}, {"version", d.Version}, {"revision", d.Revision},
		{"started", d.StartedAt.Format(time.RFC3339Nano)}, {"bundle", d.Bundle}, {"socket", d.Socket}, {"incarnation", d.Incarnation},
		{"last_seq", strconv.FormatUint(d.LastSeq, 10)}, {"goroutines", strconv.Itoa(int(d.Goroutines))}, {"fds", strconv.Itoa(int(d.FDs))},
		{"oom_kills", strings.TrimSpace(fmt.Sprint(d.OOMKills, " ", d.OOMLevel, " ", d.OOMCgroup))}, {"trimmed_seq", strconv.FormatUint(d.Trimmed, 10)},
	}
	if b := d.Sandbox; b != nil {
		rows = append(rows, metricRow{"state", b.State}, metricRow{"init", number(b.PID)}, metricRow{"namespaces", strings.Join(b.Namespaces, " ")},
			metricRow{"members", orDash(strings.Join(b.Members, " "))})
	}
	if err := metricTable("SHIM", "VALUE").Print(k.out, table.Text, rows); err != nil {
		return err
	}
	if d.Sandbox != nil {
		return nil
	}
	_, _ = fmt.Fprintln(k.out)
	return processTable.Print(k.out, table.Text, d.Processes)
}

type timingRow struct {
	Phase string `json:"phase"`
	Took  int64  `json:"ns"`
}

func (k *keepers) timings() *cobra.Command {
	return &cobra.Command{
		Use: "timings ID", Short: "Print how long the phases of the last create, start and exec took", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return k.ask(cmd, given[0], asking, func(ctx context.Context, s *direct.Shim, c *shimapi.Client) error {
				r, err := describe(ctx, s, c)
				if err != nil {
					return err
				}
				var rows []timingRow
				for phase, took := range r.Timings {
					rows = append(rows, timingRow{phase, took})
				}
				slices.SortFunc(rows, func(a, b timingRow) int { return strings.Compare(a.Phase, b.Phase) })
				return table.Table[timingRow]{Wide: true, Columns: []table.Column[timingRow]{
					{Title: "PHASE", Cell: func(r timingRow) string { return r.Phase }},
					{Title: "TOOK", Cell: func(r timingRow) string { return time.Duration(r.Took).String() }},
				}}.Print(k.out, k.format(), rows)
			})
		},
	}
}
