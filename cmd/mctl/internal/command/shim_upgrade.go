package command

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/direct"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/shims"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// busyPause is how long a shim is left alone that was busy.
const busyPause = 100 * time.Millisecond

type upgradeRow struct {
	Namespace string `json:"namespace"`
	ID        string `json:"id"`
	PID       uint32 `json:"pid,omitempty"`
	From      string `json:"from,omitempty"` // versions
	To        string `json:"to,omitempty"`
	Pause     int64  `json:"pause_ns,omitempty"`
	Error     string `json:"error,omitempty"` // the shim goes on with the code that it had
}

var upgradeTable = table.Table[upgradeRow]{Wide: true, Columns: []table.Column[upgradeRow]{
	{Title: "NAMESPACE", Cell: func(r upgradeRow) string { return r.Namespace }},
	{Title: "CONTAINER", Cell: func(r upgradeRow) string { return r.ID }},
	{Title: "PID", Cell: func(r upgradeRow) string { return number(r.PID) }},
	{Title: "FROM", Cell: func(r upgradeRow) string { return orDash(r.From) }},
	{Title: "TO", Cell: func(r upgradeRow) string { return orDash(r.To) }},
	{Title: "PAUSE", Cell: func(r upgradeRow) string {
		if r.Pause == 0 {
			return "-"
		}
		return time.Duration(r.Pause).Round(10 * time.Microsecond).String()
	}},
	{Title: "RESULT", Cell: func(r upgradeRow) string {
		if r.Error != "" {
			return "failed"
		}
		return "upgraded"
	}},
}}

func (k *keepers) upgrade() *cobra.Command {
	var binary string
	var every, outdated bool
	var parallel int
	cmd := &cobra.Command{
		Use: "upgrade ID... | --all | --outdated", Short: "Replace the code of running shims in place; their containers notice nothing", Args: args(0, -1),
		Long: `A shim runs the code that it was started with, however often managerd is upgraded. This replaces it: same process, same
connections; execs run on, input and output go on, calls that wait go on waiting. Requests wait for some milliseconds. The new
program is tried first, and one that cannot take over gives the process back: then the old code goes on, and the reason is told.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			switch {
			case len(given) > 0 && (every || outdated), every && outdated, len(given) == 0 && !every && !outdated:
				return misused(cmd, "name containers, or give one of --all and --outdated")
			case parallel < 1:
				return misused(cmd, "--parallel %d is no number of shims", parallel)
			}
			program, err := shims.Find(binary)
			if err != nil {
				return fmt.Errorf("cannot upgrade: %w; name the shim's program with --binary", err)
			}
			return k.within(cmd, func(ctx context.Context) error {
				targets, err := k.outdated(ctx, given, program, outdated)
				if err != nil {
					return err
				}
				rows := make([]upgradeRow, len(targets))
				errs := make([]error, len(targets))
				room := make(chan struct{}, parallel)
				var under sync.WaitGroup
				for i, s := range targets {
					under.Go(func() {
						room <- struct{}{}
						defer func() { <-room }()
						rows[i], errs[i] = k.upgradeOne(ctx, s, program)
					})
				}
				under.Wait()
				return errors.Join(upgradeTable.Print(k.out, k.format(), rows), errors.Join(errs...))
			})
		},
	}
	cmd.Flags().StringVar(&binary, "binary", "", "`path` of the new shim (default: shim-runc beside this program, else on PATH)")
	cmd.Flags().BoolVar(&every, "all", false, "upgrade the shims of all namespaces")
	cmd.Flags().BoolVar(&outdated, "outdated", false, "of all namespaces, those that run another version than the new one")
	cmd.Flags().IntVar(&parallel, "parallel", 4, "upgrade as many as `N` at the same time")
	return cmd
}

// outdated gives the shims to upgrade: those named, or all, or all that are not of the program's version.
func (k *keepers) outdated(ctx context.Context, names []string, program string, only bool) ([]*direct.Shim, error) {
	var targets []*direct.Shim
	for _, id := range names {
		s, err := direct.Find(k.state, k.namespace, id)
		if err != nil {
			return nil, err
		}
		targets = append(targets, s)
	}
	if len(names) > 0 {
		return targets, nil
	}
	all, err := direct.List(k.state)
	if err != nil || !only {
		return all, err
	}
	out, err := exec.CommandContext(ctx, program, "-version").Output()
	if err != nil {
		return nil, fmt.Errorf("cannot ask %s for its version: %w", program, err)
	}
	for i, st := range direct.Survey(ctx, all, surveying) {
		now := fmt.Sprintf("shim-runc %s\n  revision: %s", st.Version, st.Revision)
		if st.Condition != direct.Lives || strings.TrimSpace(string(out)) != now {
			targets = append(targets, all[i])
		}
	}
	return targets, nil
}

// upgradeOne upgrades a shim, and tries again while that is busy.
func (k *keepers) upgradeOne(ctx context.Context, s *direct.Shim, program string) (upgradeRow, error) {
	row := upgradeRow{Namespace: s.Namespace, ID: s.Name(), PID: s.PID()}
	if k.timeout == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, answering)
		defer cancel()
	}
	fail := func(err error) (upgradeRow, error) {
		row.Error = err.Error()
		return row, err
	}
	c, err := s.Dial(ctx)
	if err != nil {
		return fail(fmt.Errorf("cannot upgrade the shim of container %s: %w", s.Name(), err))
	}
	defer func() { _ = c.Close() }()
	for {
		r, err := c.Shim().Upgrade(ctx, &shim.UpgradeRequest{Binary: program})
		err = shimapi.FromWire(err)
		switch {
		case err == nil:
			row.From, row.To, row.Pause = r.FromVersion, r.Version, r.PauseNano
			return row, nil
		case errdefs.IsNotImplemented(err):
			return fail(fmt.Errorf("shim of container %s is not one of ours, or too old to be upgraded: %w", s.Name(), err))
		case !errdefs.IsUnavailable(err):
			return fail(err)
		}
		select {
		case <-c.Gone(): // it has died, which is no matter of being busy
			return fail(err)
		case <-time.After(busyPause):
		case <-ctx.Done():
			return fail(err)
		}
	}
}
