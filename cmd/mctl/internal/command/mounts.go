package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	api "github.com/containerd/containerd/api/services/mounts/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

func (c *cli) mountsCommand() *cobra.Command {
	return group("mounts", "Manage mounts that the daemon makes", []string{"mount"}, c.mountsLs(), c.mountsInfo(), c.mountsActivate(), c.mountsDeactivate(), c.mountsLabel())
}

// ofMounts says what to do about an error about an activation.
func ofMounts(err error) error {
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w; `mctl mounts ls` lists those there are", err)
	}
	return err
}

type activeRow struct {
	mountRow
	Point   string            `json:"mount_point"`
	Mounted time.Time         `json:"mounted_at"`
	Data    map[string]string `json:"data,omitempty"`
}

type activationRow struct {
	Name   string            `json:"name"`
	Active []activeRow       `json:"active"`
	System []mountRow        `json:"system"` // what is left for the client
	Labels map[string]string `json:"labels,omitempty"`
}

func activationOf(i *types.ActivationInfo) activationRow {
	r := activationRow{Name: i.GetName(), Labels: i.GetLabels(), Active: []activeRow{}, System: mountRows(i.GetSystem())}
	for _, a := range i.GetActive() {
		r.Active = append(r.Active, activeRow{mountRows([]*types.Mount{a.Mount})[0], a.MountPoint, a.MountedAt.AsTime(), a.Data})
	}
	return r
}

func mountRows(mounts []*types.Mount) []mountRow {
	rows := []mountRow{}
	for _, m := range mounts {
		rows = append(rows, mountRow{m.GetType(), m.GetSource(), m.GetTarget(), m.GetOptions()})
	}
	return rows
}

var activationTable = table.Table[activationRow]{Columns: []table.Column[activationRow]{
	{Title: "NAME", Cell: func(r activationRow) string { return r.Name }},
	{Title: "ACTIVE", Cell: func(r activationRow) string { return strconv.Itoa(len(r.Active)) }},
	{Title: "SYSTEM", Cell: func(r activationRow) string { return strconv.Itoa(len(r.System)) }},
	{Title: "LABELS", Cell: func(r activationRow) string { return table.Labels(r.Labels, "-") }},
}}

func (c *cli) mountsLs() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls [FILTER...]", Aliases: []string{"list"}, Short: "List activations of mounts",
		RunE: func(cmd *cobra.Command, filters []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				s, err := api.NewMountsClient(cl.Conn).List(ctx, &api.ListRequest{Filters: filters})
				if err != nil {
					return errgrpc.ToNative(err)
				}
				var rows []activationRow
				var names []string
				for {
					m, err := s.Recv()
					if errors.Is(err, io.EOF) {
						return list(c, quiet, names, activationTable, rows)
					}
					if err != nil {
						return errgrpc.ToNative(err)
					}
					rows, names = append(rows, activationOf(m.Info)), append(names, m.Info.GetName())
				}
			})
		},
	}
	quietly(cmd, &quiet)
	return cmd
}

func (c *cli) mountsInfo() *cobra.Command {
	return &cobra.Command{
		Use: "info NAME", Aliases: []string{"inspect"}, Short: "Print an activation as JSON", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := api.NewMountsClient(cl.Conn).Info(ctx, &api.InfoRequest{Name: given[0]})
				if err != nil {
					return ofMounts(err)
				}
				return table.PrintJSON(c.out, activationOf(r.Info))
			})
		},
	}
}

func (c *cli) mountsActivate() *cobra.Command {
	var lease, from string
	var temporary bool
	var labels []string
	cmd := &cobra.Command{
		Use: "activate [flags] NAME [TYPE:SOURCE[:OPTION,...]...]", Short: "Have the daemon make mounts, and print what is left to be mounted", Args: args(1, -1),
		Long: `Has the daemon make those of a list of mounts that others of it are made of, and prints the rest as JSON. The types are those
of the kernel, and loop: a loop device of a file. Before them may stand format/ (the mount refers to those before it), mkdir/
(directories are made) and mkfs/ (the source is made, a file with a file system). What was made stays until it is deactivated,
or until nothing keeps it any more: its label containerd.io/gc.root or, with --lease, that lease.`,
		Example: `  mctl mounts activate disk mkfs/loop:/var/tmp/disk:X-containerd.mkfs.size=1GiB 'format/ext4:{{ mount 0 }}'
  mctl mounts activate --temporary --from mounts.json work`,
		RunE: func(cmd *cobra.Command, given []string) error {
			of, _, err := labelArgs(labels)
			if err != nil {
				return misused(cmd, "%w", err)
			}
			var mounts []*types.Mount
			if from != "" {
				if mounts, err = readMounts(cmd, from); err != nil {
					return err
				}
			}
			for _, g := range given[1:] {
				kind, rest, ok := strings.Cut(g, ":")
				if !ok || kind == "" {
					return misused(cmd, "%q is not TYPE:SOURCE[:OPTION,...]", g)
				}
				source, options, has := strings.Cut(rest, ":")
				m := &types.Mount{Type: kind, Source: source}
				if has {
					m.Options = strings.Split(options, ",")
				}
				mounts = append(mounts, m)
			}
			if len(mounts) == 0 {
				return misused(cmd, "no mounts are given, and no --from")
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				if lease != "" {
					ctx = metadata.AppendToOutgoingContext(ctx, "containerd-lease", lease)
				} else {
					of = rooted(of)
				}
				r, err := api.NewMountsClient(cl.Conn).Activate(ctx, &api.ActivateRequest{Name: given[0], Mounts: mounts, Labels: of, Temporary: temporary})
				if err != nil {
					return err
				}
				return table.PrintJSON(c.out, mountRows(r.Info.GetSystem()))
			})
		},
	}
	cmd.Flags().StringVar(&lease, "lease", "", "`id` of the lease that keeps it")
	cmd.Flags().StringVar(&from, "from", "", "`file` with mounts as JSON, as `snapshots prepare --mounts` prints them (-: the input)")
	cmd.Flags().BoolVar(&temporary, "temporary", false, "make all mounts, and leave a bind mount of the last one")
	cmd.Flags().StringArrayVarP(&labels, "label", "l", nil, "`KEY=VALUE` of a label")
	return cmd
}

// readMounts reads mounts as printMounts prints them.
func readMounts(cmd *cobra.Command, from string) ([]*types.Mount, error) {
	in := cmd.InOrStdin()
	if from != "-" {
		f, err := os.Open(from)
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }()
		in = f
	}
	var rows []mountRow
	if err := json.NewDecoder(in).Decode(&rows); err != nil {
		return nil, fmt.Errorf("%s has no list of mounts: %w", from, err)
	}
	var out []*types.Mount
	for _, r := range rows {
		out = append(out, &types.Mount{Type: r.Type, Source: r.Source, Target: r.Target, Options: r.Options})
	}
	return out, nil
}

func (c *cli) mountsDeactivate() *cobra.Command {
	return &cobra.Command{
		Use: "deactivate NAME...", Aliases: []string{"rm", "remove", "delete"}, Short: "Unmount what was activated", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, names []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return each(names, func(name string) error {
					_, err := api.NewMountsClient(cl.Conn).Deactivate(ctx, &api.DeactivateRequest{Name: name})
					return ofMounts(err)
				})
			})
		},
	}
}

func (c *cli) mountsLabel() *cobra.Command {
	return &cobra.Command{
		Use: "label NAME [KEY=VALUE...]", Short: "Set labels of an activation, or clear those given as KEY=, and print all", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, given []string) error {
			labels, paths, err := labelArgs(given[1:])
			if err != nil {
				return misused(cmd, "%w", err)
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				m := api.NewMountsClient(cl.Conn)
				if len(paths) == 0 {
					r, err := m.Info(ctx, &api.InfoRequest{Name: given[0]})
					if err != nil {
						return ofMounts(err)
					}
					return c.printLabels(r.Info.GetLabels())
				}
				r, err := m.Update(ctx, &api.UpdateRequest{
					Info: &types.ActivationInfo{Name: given[0], Labels: labels}, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
				})
				if err != nil {
					return ofMounts(err)
				}
				return c.printLabels(r.Info.GetLabels())
			})
		},
	}
}
