package command

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/orphans"
	managerapi "github.com/managerd/managerd/protos/manager/v1"
	"github.com/managerd/managerd/shimapi"
)

// Exit statuses of fsck: what is found is no error, and no success.
const (
	fsckFound  = 1
	fsckFailed = 2
)

type orphanRow struct {
	Kind    string `json:"kind"`
	Object  string `json:"object"`
	Owner   string `json:"owner,omitempty"`
	Problem string `json:"problem"`
	Command string `json:"command"`
	Fixed   bool   `json:"fixed"`
	Error   string `json:"error,omitempty"` // why it could not be fixed
}

var orphanTable = table.Table[orphanRow]{Wide: true, Columns: []table.Column[orphanRow]{
	{Title: "KIND", Cell: func(r orphanRow) string { return r.Kind }},
	{Title: "OBJECT", Cell: func(r orphanRow) string { return r.Object }},
	{Title: "OWNER", Cell: func(r orphanRow) string { return dash(r.Owner) }},
	{Title: "PROBLEM", Cell: func(r orphanRow) string { return r.Problem }},
	{Title: "FIX", Cell: func(r orphanRow) string {
		switch {
		case r.Fixed:
			return "fixed"
		case r.Error != "":
			return "failed: " + r.Error
		}
		return r.Command
	}},
}}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (c *cli) fsckCommand() *cobra.Command {
	var fix bool
	var older time.Duration
	var state, fifos string
	cmd := &cobra.Command{
		Use: "fsck [flags] [KIND:OBJECT...]", Short: "Find what nobody owns any more, and remove it",
		Long: `Looks at the shims, mounts, loop devices, cgroups, bundles, sockets and FIFOs of this managerd, and at what its database and
its stores contradict each other in, in all namespaces. Each finding has its owner and the command that fixes it; --fix does
it, for all or for those that are named. Nothing that is not provably of this managerd is touched. Without a managerd it looks
at what can be judged without one.

Exit status: 0 nothing found, or all of it fixed; 1 something found; 2 not all could be looked at.`,
		RunE: func(cmd *cobra.Command, objects []string) error {
			for _, o := range objects {
				if !strings.Contains(o, ":") {
					return misused(cmd, "%q is not KIND:OBJECT, as `mctl fsck` prints them", o)
				}
			}
			if fifos == "" {
				fifos = filepath.Join(filepath.Dir(strings.TrimPrefix(c.address, "unix://")), "fifo")
			}
			fifos, err := filepath.Abs(fifos)
			if err != nil {
				return err
			}
			var rows []orphanRow
			var incomplete []string
			if !c.served(cmd.Context()) {
				c.notice("no managerd answers: looking only at what can be judged without one, in " + state)
				rows, incomplete, err := c.fsckAlone(cmd.Context(), state, fix, older, objects)
				if err != nil {
					incomplete = append(incomplete, err.Error())
				}
				return c.toldOrphans(rows, incomplete)
			}
			err = c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := managerapi.NewFsckClient(cl.Conn).Check(ctx, &managerapi.CheckRequest{
					Fix: fix, Objects: objects, Older: durationpb.New(older), Fifos: fifos,
				})
				for _, o := range r.GetOrphans() {
					rows = append(rows, orphanRow{o.Kind, o.Object, o.Owner, o.Problem, o.Command, o.Fixed, o.Error})
				}
				incomplete = r.GetIncomplete()
				return err
			})
			if err != nil {
				incomplete = append(incomplete, err.Error())
			}
			return c.toldOrphans(rows, incomplete)
		},
	}
	cmd.Flags().BoolVar(&fix, "fix", false, "fix what is found")
	cmd.Flags().DurationVar(&older, "older", 10*time.Minute, "leave alone what clients may have begun within this `time`")
	cmd.Flags().StringVar(&state, "state", env(defaultState, "MANAGERD_STATE"), "managerd's state `directory`, for when it does not run")
	cmd.Flags().StringVar(&fifos, "fifo-dir", "", "`directory` for the FIFOs of the streams (default: fifo, beside the daemon's socket)")
	return cmd
}

// served says whether somebody listens on the daemon's socket.
func (c *cli) served(ctx context.Context) bool {
	conn, err := shimapi.DialSocket(ctx, strings.TrimPrefix(c.address, "unix://"))
	if err == nil {
		_ = conn.Close()
	}
	return !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ECONNREFUSED)
}

// toldOrphans prints, and chooses the exit status.
func (c *cli) toldOrphans(rows []orphanRow, incomplete []string) error {
	if len(rows) > 0 || c.format() == table.JSON {
		if err := orphanTable.Print(c.out, c.format(), rows); err != nil {
			return err
		}
	}
	for _, i := range incomplete {
		c.notice("not all could be looked at: " + i)
	}
	switch {
	case len(incomplete) > 0:
		return exitStatus(fsckFailed)
	case slices.ContainsFunc(rows, func(r orphanRow) bool { return !r.Fixed }):
		return exitStatus(fsckFound)
	}
	return nil
}

// fsckAlone is what can be done without a managerd.
func (c *cli) fsckAlone(ctx context.Context, state string, fix bool, older time.Duration, objects []string) (rows []orphanRow, incomplete []string, err error) {
	if state, err = filepath.Abs(state); err != nil {
		return nil, nil, err
	}
	found, err := orphans.Places{State: state, Older: older}.Find()
	if err != nil {
		incomplete = append(incomplete, err.Error())
	}
	for _, o := range found {
		if len(objects) > 0 && !slices.Contains(objects, o.Name()) {
			continue
		}
		r := orphanRow{Kind: o.Kind, Object: o.Object, Owner: o.Owner, Problem: o.Problem, Command: o.Command}
		if fix {
			if err := o.Fix(ctx); err != nil {
				r.Error = err.Error()
			} else {
				r.Fixed = true
			}
		}
		rows = append(rows, r)
	}
	if len(objects) == 0 {
		c.notice(fmt.Sprintf("snapshots, content, leases, cgroups and FIFOs were not looked at; start managerd on %s for them", state))
	}
	return rows, incomplete, nil
}
