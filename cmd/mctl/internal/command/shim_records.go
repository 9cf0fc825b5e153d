package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/direct"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/shims"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/blackbox"
	"github.com/managerd/managerd/shimapi/ledger"
)

// What a shim has written down, which is there whether it answers or not; and the start of a successor, which goes by that.

// records calls f with every record above since of a shim's ledger. Of a damaged one, what can be read comes before the error.
func (k *keepers) records(cmd *cobra.Command, id string, since uint64, f func(s *direct.Shim, r *ledgerpb.Record) error) error {
	return k.within(cmd, func(context.Context) error {
		s, err := direct.Find(k.state, k.namespace, id)
		if err != nil {
			return err
		}
		if _, err := s.Header(); err != nil {
			return err
		}
		records, damage := s.Ledger()
		if trimmed := ledger.TrimmedBy(records); since > 0 && since < trimmed {
			return fmt.Errorf("the ledger of container %s has been compacted up to number %d, behind %d not everything is there; leave --since out to get what there is: %w",
				s.ID, trimmed, since, errdefs.ErrOutOfRange)
		}
		for _, r := range records {
			if r.Seq > since {
				if err := f(s, r); err != nil {
					return err
				}
			}
		}
		return damage
	})
}

func (k *keepers) events() *cobra.Command {
	var since uint64
	var follow bool
	cmd := &cobra.Command{
		Use: "events ID", Short: "Print the events of a container, from its shim's ledger", Args: args(1, 1),
		Long: `Prints what stands in the ledger, which needs no answer from the shim. With --follow it then goes on with what the shim tells,
until that ends. Every event has its number in the ledger; --since goes on behind one. With -o json every line is an object.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			if follow {
				return k.ask(cmd, given[0], 0, func(ctx context.Context, s *direct.Shim, c *shimapi.Client) error { return k.follow(ctx, s, c, since) })
			}
			return k.records(cmd, given[0], since, func(s *direct.Shim, r *ledgerpb.Record) error {
				if e := shims.FromLedger(r); e != nil {
					return k.printOwn(s, e)
				}
				return nil
			})
		},
	}
	cmd.Flags().Uint64Var(&since, "since", 0, "only those behind the one of this `number`")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with those to come")
	return cmd
}

func (k *keepers) follow(ctx context.Context, s *direct.Shim, c *shimapi.Client, since uint64) error {
	stream, err := c.Shim().Events(ctx, &shim.EventsRequest{Since: since})
	if err != nil {
		return shimapi.FromWire(err)
	}
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return shimapi.FromWire(err)
		}
		if err := k.printOwn(s, e); err != nil {
			return err
		}
	}
}

func (k *keepers) printOwn(s *direct.Shim, e *shim.EventRecord) error {
	return k.printEvent(e.Seq, shims.Envelope(s.Namespace, e))
}

type exitRow struct {
	Seq      uint64    `json:"seq"`
	ID       string    `json:"id"`
	ExecID   string    `json:"exec_id,omitempty"`
	PID      uint32    `json:"pid"`
	Status   uint32    `json:"exit_status"`
	ExitedAt time.Time `json:"exited_at"`
	Unknown  string    `json:"exit_unknown,omitempty"` // why the status is not known
	OOM      bool      `json:"oom_killed,omitempty"`   // for want of memory
	TimedOut bool      `json:"timed_out,omitempty"`    // its time was over
}

var exitTable = table.Table[exitRow]{Wide: true, Columns: []table.Column[exitRow]{
	{Title: "SEQ", Cell: func(r exitRow) string { return strconv.FormatUint(r.Seq, 10) }},
	{Title: "CONTAINER", Cell: func(r exitRow) string { return r.ID }},
	{Title: "EXEC", Cell: func(r exitRow) string { return orDash(r.ExecID) }},
	{Title: "PID", Cell: func(r exitRow) string { return number(r.PID) }},
	{Title: "EXIT", Cell: func(r exitRow) string {
		if r.Unknown != "" {
			return "unknown: " + r.Unknown
		}
		return marked(strconv.Itoa(int(r.Status)), r.OOM, r.TimedOut)
	}},
	{Title: "AT", Cell: func(r exitRow) string { return r.ExitedAt.Format(time.RFC3339Nano) }},
}}

// marked is an exit status, or a state, and why it came to that.
func marked(status string, oom, timedOut bool) string {
	switch {
	case oom:
		return status + " (out of memory)"
	case timedOut:
		return status + " (time was over)"
	}
	return status
}

func (k *keepers) exits() *cobra.Command {
	var since uint64
	cmd := &cobra.Command{
		Use: "exits ID", Short: "Print how a container and its execs have ended, from its shim's ledger", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			var rows []exitRow
			err := k.records(cmd, given[0], since, func(_ *direct.Shim, r *ledgerpb.Record) error {
				if e := r.Exit; e != nil {
					rows = append(rows, exitRow{r.Seq, e.ContainerId, e.ExecId, e.Pid, e.Status, time.Unix(0, e.ExitedUnixNano), e.Unknown, e.OomKilled, e.TimedOut})
				}
				return nil
			})
			if err != nil && len(rows) == 0 {
				return err
			}
			return errors.Join(exitTable.Print(k.out, k.format(), rows), err)
		},
	}
	cmd.Flags().Uint64Var(&since, "since", 0, "only those behind the record of this `number`")
	return cmd
}

type boxRow struct {
	Number uint64    `json:"number"`
	Time   time.Time `json:"time"`
	PID    uint32    `json:"pid"`
	Kind   string    `json:"kind"`
	Took   int64     `json:"ns,omitempty"`
	Text   string    `json:"text"`
}

var boxTable = table.Table[boxRow]{Columns: []table.Column[boxRow]{
	{Title: "NUMBER", Cell: func(r boxRow) string { return strconv.FormatUint(r.Number, 10) }},
	{Title: "TIME", Cell: func(r boxRow) string { return r.Time.Format("2006-01-02T15:04:05.000000") }},
	{Title: "PID", Cell: func(r boxRow) string { return number(r.PID) }},
	{Title: "KIND", Cell: func(r boxRow) string { return r.Kind }},
	{Title: "TOOK", Cell: func(r boxRow) string {
		if r.Took == 0 {
			return "-"
		}
		return time.Duration(r.Took).Round(time.Microsecond).String()
	}},
	{Title: "WHAT", Cell: func(r boxRow) string { return r.Text }},
}}

func (k *keepers) blackbox() *cobra.Command {
	var last int
	cmd := &cobra.Command{
		Use: "blackbox ID", Short: "Print what a shim did last: requests, phases, events, errors; also of one that is stopped or dead", Args: args(1, 1),
		Long: `Prints the last things a shim did, oldest first. It reads a file in the bundle and needs no answer from the shim. A request
without an answer is one under way. Requests that only look (State, Pids, Stats ...) are there when they failed.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			if last < 0 {
				return misused(cmd, "--last %d is no number of entries", last)
			}
			return k.within(cmd, func(context.Context) error {
				s, err := direct.Find(k.state, k.namespace, given[0])
				if err != nil {
					return err
				}
				entries, err := blackbox.Read(s.File(shimapi.BlackBoxFile))
				if errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("shim of container %s keeps no black box: it is not one of ours, or older: %w", s.ID, err)
				}
				if err != nil {
					return err
				}
				if last > 0 && len(entries) > last {
					entries = entries[len(entries)-last:]
				}
				var rows []boxRow
				for _, e := range entries {
					rows = append(rows, boxRow{e.Number, e.Time, e.PID, e.Kind.String(), int64(e.Took), e.Text})
				}
				return boxTable.Print(k.out, k.format(), rows)
			})
		},
	}
	cmd.Flags().IntVar(&last, "last", 0, "only the last `N` entries (0: all)")
	return cmd
}

func (k *keepers) stacks() *cobra.Command {
	return &cobra.Command{
		Use: "stacks ID", Short: "Print what every goroutine of a shim is doing", Args: args(1, 1),
		Long: `Sends the shim SIGUSR1, upon which it writes its stacks to the bundle. It needs no answer to a request, so it tells why a shim
gives none; a process that is stopped cannot do it.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			return k.within(cmd, func(ctx context.Context) error {
				s, err := direct.Find(k.state, k.namespace, given[0])
				if err != nil {
					return err
				}
				if k.timeout == 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, asking)
					defer cancel()
				}
				text, err := s.Stacks(ctx)
				if err != nil {
					return err
				}
				if k.format() == table.JSON {
					return table.PrintJSON(k.out, map[string]string{"stacks": string(text)})
				}
				_, err = k.out.Write(text)
				return err
			})
		},
	}
}

type adoptedRow struct {
	Namespace string `json:"namespace"`
	ID        string `json:"id"`
	PID       uint32 `json:"pid"`
}

func (k *keepers) adopt() *cobra.Command {
	var binary string
	cmd := &cobra.Command{
		Use: "adopt ID", Short: "Start the successor of a dead shim; its container runs on", Args: args(1, 1),
		Long: `Does what managerd does when a shim has died, for when managerd is not there: the successor takes over the container and its
execs, by what stands in the bundle. What was parked with managerd is lost: the terminal of a process that has one hangs up, and
how a process ended while no shim lived, or on a kernel before 6.15 at any time, is not known. The next managerd finds the successor.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			program, err := shims.Find(binary)
			if err != nil {
				return fmt.Errorf("cannot adopt container %s: %w; name the shim's program with --binary", given[0], err)
			}
			return k.within(cmd, func(ctx context.Context) error {
				s, err := direct.Find(k.state, k.namespace, given[0])
				if err != nil {
					return err
				}
				if k.timeout == 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, answering)
					defer cancel()
				}
				log := slog.New(slog.NewTextHandler(k.err, &slog.HandlerOptions{Level: slog.LevelWarn}))
				pid, err := s.Adopt(ctx, program, log)
				if err != nil {
					return err
				}
				return table.Table[adoptedRow]{Wide: true, Columns: []table.Column[adoptedRow]{
					{Title: "NAMESPACE", Cell: func(r adoptedRow) string { return r.Namespace }},
					{Title: "CONTAINER", Cell: func(r adoptedRow) string { return r.ID }},
					{Title: "PID", Cell: func(r adoptedRow) string { return number(r.PID) }},
				}}.Print(k.out, k.format(), []adoptedRow{{s.Namespace, s.ID, pid}})
			})
		},
	}
	cmd.Flags().StringVar(&binary, "binary", "", "`path` of the shim (default: shim-runc beside this program, else on PATH)")
	return cmd
}
