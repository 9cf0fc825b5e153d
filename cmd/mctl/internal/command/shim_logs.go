package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cmd/mctl/internal/direct"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// logFlags say what of a log is printed.
type logFlags struct {
	follow, timestamps bool
	tail               int
	since              string
}

// logsCommand is shim logs, where people look for it.
func (c *cli) logsCommand() *cobra.Command {
	k := &keepers{cli: c}
	cmd := k.logs()
	cmd.Flags().StringVar(&k.state, "state", env(defaultState, "MANAGERD_STATE"), "managerd's state `directory`")
	return cmd
}

func (k *keepers) logs() *cobra.Command {
	var f logFlags
	cmd := &cobra.Command{
		Use: "logs ID [EXEC]", Short: "Print what a container, or an exec, has written; with or without managerd", Args: args(1, 2),
		Long: `Asks the shim for what it keeps: the log that --log-uri named (json-file, cri, file), across rotations, or the last of the output
of a process for which nobody named one. Standard error is printed on standard error. Output that goes to a client or to a
logger is not here. With -o json every entry is an object on a line.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			r := &shim.LogsRequest{Id: given[0], Follow: f.follow}
			if len(given) > 1 {
				r.ExecId = given[1]
			}
			if f.tail >= 0 {
				r.Tail = new(uint64(f.tail))
			}
			if f.since != "" {
				at, err := moment(f.since, time.Now())
				if err != nil {
					return misused(cmd, "--since %w", err)
				}
				r.Since = timestamppb.New(at)
			}
			limit := answering
			if f.follow {
				limit = 0
			}
			return k.ask(cmd, given[0], limit, func(ctx context.Context, _ *direct.Shim, c *shimapi.Client) error {
				return k.printLogs(ctx, c, r, f.timestamps)
			})
		},
	}
	fs := cmd.Flags()
	fs.BoolVarP(&f.follow, "follow", "f", false, "go on with what is written, until the process has ended")
	fs.IntVar(&f.tail, "tail", -1, "only the last `N` entries (negative: all)")
	fs.StringVar(&f.since, "since", "", "only entries from this `time` on: RFC 3339, or how long ago (10m)")
	fs.BoolVarP(&f.timestamps, "timestamps", "t", false, "print the time before each line, where the log has it")
	return cmd
}

// moment reads a time, or how long before now it was.
func moment(s string, now time.Time) (time.Time, error) {
	if ago, err := time.ParseDuration(s); err == nil {
		return now.Add(-ago), nil
	}
	at, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return at, fmt.Errorf("%q is neither a time, as 2006-01-02T15:04:05Z, nor a duration, as 10m", s)
	}
	return at, nil
}

type logRow struct {
	Time    *time.Time `json:"time,omitempty"`
	Stream  string     `json:"stream,omitempty"`
	Line    string     `json:"line"`
	Partial bool       `json:"partial,omitempty"` // the line goes on in the next of its stream
}

func (k *keepers) printLogs(ctx context.Context, c *shimapi.Client, r *shim.LogsRequest, timestamps bool) error {
	stream, err := c.Shim().Logs(ctx, r)
	if err != nil {
		return shimapi.FromWire(err)
	}
	within := map[string]bool{} // streams whose last line has no end yet
	enc := json.NewEncoder(k.out)
	enc.SetEscapeHTML(false)
	for {
		batch, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return shimapi.FromWire(err)
		}
		for _, e := range batch.Entries {
			if k.format() == table.JSON {
				row := logRow{Stream: e.Stream, Line: string(e.Line), Partial: e.Partial}
				if e.Time != nil {
					row.Time = new(e.Time.AsTime())
				}
				if err := enc.Encode(row); err != nil {
					return err
				}
				continue
			}
			out := k.out
			if e.Stream == "stderr" {
				out = k.err
			}
			line := e.Line
			if timestamps && e.Time != nil && !within[e.Stream] {
				line = append([]byte(e.Time.AsTime().Format(time.RFC3339Nano)+" "), line...)
			}
			within[e.Stream] = e.Partial
			if _, err := out.Write(line); err != nil {
				return err
			}
		}
	}
}

func (k *keepers) reopenLogs() *cobra.Command {
	return &cobra.Command{
		Use: "reopen-logs ID", Short: "Begin new log files where the old ones were moved away (logrotate)", Args: args(1, 1),
		Long: `Has the shim open the logs of the container and its execs anew, by their paths, and prints those. When it returns nothing more
goes into the files that were there before.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			return k.ask(cmd, given[0], answering, func(ctx context.Context, _ *direct.Shim, c *shimapi.Client) error {
				r, err := c.Shim().ReopenLogs(ctx, &shim.ReopenLogsRequest{})
				if err != nil {
					return shimapi.FromWire(err)
				}
				if k.format() == table.JSON {
					return table.PrintJSON(k.out, map[string][]string{"paths": append([]string{}, r.Paths...)})
				}
				for _, p := range r.Paths {
					if _, err := fmt.Fprintln(k.out, p); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}

// output is how one stream of a process is.
type output struct {
	Stream       string     `json:"stream"`
	Sink         string     `json:"sink"`
	Bytes        uint64     `json:"bytes"`             // that the shim has moved
	Waiting      string     `json:"waiting,omitempty"` // why nothing is written now
	Since        *time.Time `json:"waiting_since,omitempty"`
	LostBytes    uint64     `json:"lost_bytes,omitempty"` // of which the log does not tell yet
	LostEntries  uint64     `json:"lost_entries,omitempty"`
	LoggerPID    uint32     `json:"logger_pid,omitempty"`
	LoggerStarts uint32     `json:"logger_restarts,omitempty"`
	LoggerError  string     `json:"logger_error,omitempty"`
}

func outputs(of []*shim.Output) (all []output) {
	for _, o := range of {
		row := output{
			o.Stream, o.Sink, o.Bytes, o.Waiting, nil, o.LostBytes, o.LostEntries, o.LoggerPid, o.LoggerRestarts, o.LoggerError,
		}
		if o.WaitingSince != nil {
			row.Since = new(o.WaitingSince.AsTime())
		}
		all = append(all, row)
	}
	return all
}

// waiting says what the streams of a process wait for.
func waiting(of []output) string {
	var all []string
	for _, o := range of {
		if o.Waiting != "" {
			all = append(all, o.Stream+": "+o.Waiting)
		}
	}
	return strings.Join(all, ", ")
}
