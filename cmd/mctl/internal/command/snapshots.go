package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

func (c *cli) snapshotsCommand() *cobra.Command {
	var name string
	g := group("snapshots", "Manage the file systems of containers", []string{"snapshot"},
		c.snapshotsLs(&name), c.snapshotsTree(&name), c.snapshotsInfo(&name), c.snapshotsUsage(&name), c.snapshotsPrepare(&name), c.snapshotsView(&name),
		c.snapshotsCommit(&name), c.snapshotsMounts(&name), c.snapshotsUnmount(), c.snapshotsDiff(&name), c.snapshotsUnpack(&name), c.snapshotsLabel(&name), c.snapshotsRm(&name))
	g.PersistentFlags().StringVar(&name, "snapshotter", "", "`name` of the snapshotter (default: the namespace's, or overlayfs)")
	return g
}

// ofSnapshot says what to do about an error about a snapshot.
func ofSnapshot(err error) error {
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w; `mctl snapshots ls` lists those there are", err)
	}
	return err
}

type snapshotRow struct {
	Key     string            `json:"key"`
	Parent  string            `json:"parent,omitempty"`
	Kind    string            `json:"kind"` // Active, View or Committed
	Labels  map[string]string `json:"labels,omitempty"`
	Created time.Time         `json:"created_at"`
	Updated time.Time         `json:"updated_at"`
}

func snapshotOf(i *api.Info) snapshotRow {
	kind := i.Kind.String()
	return snapshotRow{i.Name, i.Parent, kind[:1] + strings.ToLower(kind[1:]), i.Labels, i.CreatedAt.AsTime(), i.UpdatedAt.AsTime()}
}

var snapshotTable = table.Table[snapshotRow]{Columns: []table.Column[snapshotRow]{
	{Title: "KEY", Cell: func(r snapshotRow) string { return r.Key }},
	{Title: "PARENT", Cell: func(r snapshotRow) string { return r.Parent }},
	{Title: "KIND", Cell: func(r snapshotRow) string { return r.Kind }},
}}

// snapshots lists them, in the daemon's order.
func (c *cli) snapshots(ctx context.Context, cl *client.Client, named string, filters []string) (snapshotter string, rows []snapshotRow, err error) {
	if snapshotter, err = cl.DefaultSnapshotter(ctx, c.namespace, named); err != nil {
		return "", nil, err
	}
	s, err := cl.Snapshots.List(ctx, &api.ListSnapshotsRequest{Snapshotter: snapshotter, Filters: filters})
	if err != nil {
		return "", nil, errgrpc.ToNative(err)
	}
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return snapshotter, rows, nil
		}
		if err != nil {
			return "", nil, errgrpc.ToNative(err)
		}
		for _, i := range m.Info {
			rows = append(rows, snapshotOf(i))
		}
	}
}

func (c *cli) snapshotsLs(name *string) *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls [FILTER...]", Aliases: []string{"list"}, Short: "List snapshots",
		RunE: func(cmd *cobra.Command, filters []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				_, rows, err := c.snapshots(ctx, cl, *name, filters)
				if err != nil {
					return err
				}
				var keys []string
				for _, r := range rows {
					keys = append(keys, r.Key)
				}
				return list(c, quiet, keys, snapshotTable, rows)
			})
		},
	}
	quietly(cmd, &quiet)
	return cmd
}

// branch is a snapshot and those that stand on it.
type branch struct {
	Key      string   `json:"key"`
	Children []branch `json:"children,omitempty"`
}

func (c *cli) snapshotsTree(name *string) *cobra.Command {
	return &cobra.Command{
		Use: "tree", Short: "Show which snapshot stands on which", Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				_, rows, err := c.snapshots(ctx, cl, *name, nil)
				if err != nil {
					return err
				}
				there, below := map[string]bool{}, map[string][]string{}
				for _, r := range rows {
					there[r.Key] = true
				}
				for _, r := range rows {
					parent := r.Parent
					if !there[parent] {
						parent = ""
					}
					below[parent] = append(below[parent], r.Key)
				}
				var grow func(key string) []branch
				grow = func(key string) (b []branch) {
					for _, k := range below[key] {
						b = append(b, branch{k, grow(k)})
					}
					return b
				}
				roots := grow("")
				if c.format() == table.JSON {
					return table.PrintJSON(c.out, append([]branch{}, roots...))
				}
				var out strings.Builder
				var draw func(b []branch, depth int)
				draw = func(b []branch, depth int) {
					for _, s := range b {
						if depth == 0 {
							_, _ = fmt.Fprintf(&out, " %s\n", s.Key)
						} else {
							_, _ = fmt.Fprintf(&out, "%s\\_ %s\n", strings.Repeat("  ", depth), s.Key)
						}
						draw(s.Children, depth+1)
					}
				}
				draw(roots, 0)
				_, err = fmt.Fprint(c.out, out.String())
				return err
			})
		},
	}
}

// snapshotInfo is a snapshot as ctr shows it.
type snapshotInfo struct {
	Kind, Name       string
	Parent           string            `json:",omitempty"`
	Labels           map[string]string `json:",omitempty"`
	Created, Updated time.Time
}

func (c *cli) snapshotsInfo(name *string) *cobra.Command {
	return &cobra.Command{
		Use: "info KEY", Short: "Print all about a snapshot, as JSON", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				snapshotter, err := cl.DefaultSnapshotter(ctx, c.namespace, *name)
				if err != nil {
					return err
				}
				r, err := cl.Snapshots.Stat(ctx, &api.StatSnapshotRequest{Snapshotter: snapshotter, Key: given[0]})
				if err != nil {
					return ofSnapshot(err)
				}
				s := snapshotOf(r.Info)
				return table.PrintJSON(c.out, snapshotInfo{s.Kind, s.Key, s.Parent, s.Labels, s.Created, s.Updated})
			})
		},
	}
}

type usageRow struct {
	Key    string `json:"key"`
	Size   int64  `json:"size"` // bytes
	Inodes int64  `json:"inodes"`
}

// usageTable prints sizes in bytes if they are to be exact.
func usageTable(exact bool) table.Table[usageRow] {
	return table.Table[usageRow]{Columns: []table.Column[usageRow]{
		{Title: "KEY", Cell: func(r usageRow) string { return r.Key }},
		{Title: "SIZE", Cell: func(r usageRow) string {
			if exact {
				return fmt.Sprint(r.Size)
			}
			return table.Bytes(r.Size)
		}},
		{Title: "INODES", Cell: func(r usageRow) string { return fmt.Sprint(r.Inodes) }},
	}}
}

// snapshotUsage tells how much room a snapshot takes, and what it stands on.
func snapshotUsage(ctx context.Context, cl *client.Client, snapshotter, key string) (size, inodes int64, parent string, err error) {
	s, err := cl.Snapshots.Stat(ctx, &api.StatSnapshotRequest{Snapshotter: snapshotter, Key: key})
	if err != nil {
		return 0, 0, "", err
	}
	u, err := cl.Snapshots.Usage(ctx, &api.UsageRequest{Snapshotter: snapshotter, Key: key})
	return u.GetSize(), u.GetInodes(), s.Info.GetParent(), err
}

func (c *cli) snapshotsUsage(name *string) *cobra.Command {
	var exact bool
	cmd := &cobra.Command{
		Use: "usage [KEY...]", Short: "Tell how much room snapshots take",
		RunE: func(cmd *cobra.Command, keys []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				snapshotter, err := cl.DefaultSnapshotter(ctx, c.namespace, *name)
				if err != nil {
					return err
				}
				everything := len(keys) == 0
				if everything {
					_, all, err := c.snapshots(ctx, cl, *name, nil)
					if err != nil {
						return err
					}
					for _, s := range all {
						keys = append(keys, s.Key)
					}
				}
				var rows []usageRow
				for _, k := range keys {
					u, err := cl.Snapshots.Usage(ctx, &api.UsageRequest{Snapshotter: snapshotter, Key: k})
					if everything && errdefs.IsNotFound(err) {
						continue // removed meanwhile
					}
					if err != nil {
						return ofSnapshot(err)
					}
					rows = append(rows, usageRow{k, u.Size, u.Inodes})
				}
				return usageTable(exact).Print(c.out, c.format(), rows)
			})
		},
	}
	cmd.Flags().BoolVarP(&exact, "bytes", "b", false, "print sizes in bytes")
	return cmd
}

func (c *cli) snapshotsRm(name *string) *cobra.Command {
	return &cobra.Command{
		Use: "rm KEY...", Aliases: []string{"delete", "del", "remove"}, Short: "Remove snapshots", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, keys []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				snapshotter, err := cl.DefaultSnapshotter(ctx, c.namespace, *name)
				if err != nil {
					return err
				}
				return each(keys, func(key string) error {
					_, err := cl.Snapshots.Remove(ctx, &api.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: key})
					return ofSnapshot(err)
				})
			})
		},
	}
}
