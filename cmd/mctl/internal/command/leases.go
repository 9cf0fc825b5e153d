package command

import (
	"context"
	"fmt"
	"time"

	api "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

// expireLabel on a lease is when it ends by itself.
const expireLabel = "containerd.io/gc.expire"

func (c *cli) leasesCommand() *cobra.Command {
	return group("leases", "Manage what keeps things from being collected", []string{"lease"}, c.leasesCreate(), c.leasesLs(), c.leasesRm())
}

type leaseRow struct {
	ID      string            `json:"id"`
	Created time.Time         `json:"created_at"`
	Labels  map[string]string `json:"labels,omitempty"`
}

var leaseTable = table.Table[leaseRow]{Columns: []table.Column[leaseRow]{
	{Title: "ID", Cell: func(r leaseRow) string { return r.ID }},
	{Title: "CREATED AT", Cell: func(r leaseRow) string { return r.Created.Local().Format(time.RFC3339) }},
	{Title: "LABELS", Cell: func(r leaseRow) string { return table.Labels(r.Labels, "-") }},
}}

func (c *cli) leasesLs() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls [FILTER...]", Aliases: []string{"list"}, Short: "List leases",
		RunE: func(cmd *cobra.Command, filters []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Leases.List(ctx, &api.ListRequest{Filters: filters})
				if err != nil {
					return err
				}
				var rows []leaseRow
				var ids []string
				for _, l := range r.Leases {
					rows, ids = append(rows, leaseRow{l.ID, l.CreatedAt.AsTime(), l.Labels}), append(ids, l.ID)
				}
				return list(c, quiet, ids, leaseTable, rows)
			})
		},
	}
	quietly(cmd, &quiet)
	return cmd
}

func (c *cli) leasesCreate() *cobra.Command {
	var id string
	var expires time.Duration
	cmd := &cobra.Command{
		Use: "create [flags] [KEY=VALUE...]", Short: "Make a lease, and print its id",
		RunE: func(cmd *cobra.Command, given []string) error {
			labels, _, err := labelArgs(given)
			if err != nil {
				return misused(cmd, "%w", err)
			}
			if expires < 0 {
				return misused(cmd, "--expires %v has passed; 0 is never", expires)
			}
			if expires > 0 {
				labels[expireLabel] = time.Now().Add(expires).UTC().Format(time.RFC3339)
			}
			if id == "" {
				id = fmt.Sprintf("mctl-%d", time.Now().UnixNano())
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Leases.Create(ctx, &api.CreateRequest{ID: id, Labels: labels})
				if err != nil {
					return err
				}
				if c.format() == table.JSON {
					return table.PrintJSON(c.out, leaseRow{r.Lease.ID, r.Lease.CreatedAt.AsTime(), r.Lease.Labels})
				}
				_, err = fmt.Fprintln(c.out, r.Lease.ID)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&id, "id", "", "`id` of the lease (default: made up)")
	cmd.Flags().DurationVarP(&expires, "expires", "x", 24*time.Hour, "`time` after which it ends by itself (0: never)")
	return cmd
}

func (c *cli) leasesRm() *cobra.Command {
	var sync bool
	cmd := &cobra.Command{
		Use: "rm ID...", Aliases: []string{"delete", "del", "remove"}, Short: "Remove leases", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return each(ids, func(id string) error {
					_, err := cl.Leases.Delete(ctx, &api.DeleteRequest{ID: id, Sync: sync})
					if errdefs.IsNotFound(err) {
						return fmt.Errorf("%w; `mctl leases ls` lists those there are", err)
					}
					return err
				})
			})
		},
	}
	cmd.Flags().BoolVar(&sync, "sync", false, "return when what the leases held is removed, too")
	return cmd
}
