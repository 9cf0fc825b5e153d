package command

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/launch"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

func (c *cli) containersCommand() *cobra.Command {
	return group("containers", "Manage containers", []string{"container", "c"},
		c.containersCreate(), c.containersLs(), c.containersInfo(), c.containersRm(), c.containersLabel())
}

// ofContainer says what to do about an error about a container.
func ofContainer(err error) error {
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w; `mctl containers ls` lists those there are", err)
	}
	return err
}

func (c *cli) containersCreate() *cobra.Command {
	f := &launch.Flags{}
	cmd := &cobra.Command{
		Use: "create [flags] IMAGE ID [COMMAND] [ARG...]", Short: "Make a container; `tasks start` runs it",
		RunE: func(cmd *cobra.Command, given []string) error {
			image, id, args, err := f.Arguments(given)
			if err == nil {
				err = f.Validate()
			}
			if err != nil {
				return misused(cmd, "%w", err)
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				_, err := f.Create(ctx, cl, c.namespace, image, id, args, launch.Size{})
				if err == nil && c.format() == table.JSON {
					return table.PrintJSON(c.out, map[string]string{"id": id})
				}
				return err
			})
		},
	}
	cmd.Flags().SetInterspersed(false)
	f.Add(cmd.Flags())
	return cmd
}

type containerRow struct {
	ID      string            `json:"id"`
	Image   string            `json:"image"`
	Runtime string            `json:"runtime"`
	Labels  map[string]string `json:"labels,omitempty"`
	Created time.Time         `json:"created_at"`
}

var containerTable = table.Table[containerRow]{Wide: true, Columns: []table.Column[containerRow]{
	{Title: "CONTAINER", Cell: func(r containerRow) string { return r.ID }},
	{Title: "IMAGE", Cell: func(r containerRow) string {
		if r.Image == "" {
			return "-"
		}
		return r.Image
	}},
	{Title: "RUNTIME", Cell: func(r containerRow) string { return r.Runtime }},
}}

func (c *cli) containersLs() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls [FILTER...]", Aliases: []string{"list"}, Short: "List containers",
		Example: "  mctl containers ls 'labels.app==web' 'image~=busybox'",
		RunE: func(cmd *cobra.Command, filters []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Containers.List(ctx, &containersapi.ListContainersRequest{Filters: filters})
				if err != nil {
					return err
				}
				var rows []containerRow
				var ids []string
				for _, k := range r.Containers {
					rows = append(rows, containerRow{k.ID, k.Image, k.Runtime.GetName(), k.Labels, k.CreatedAt.AsTime()})
					ids = append(ids, k.ID)
				}
				return list(c, quiet, ids, containerTable, rows)
			})
		},
	}
	quietly(cmd, &quiet)
	return cmd
}

// containerInfo is a container as ctr shows it.
type containerInfo struct {
	ID      string
	Labels  map[string]string
	Image   string
	Runtime struct {
		Name    string
		Options any
	}
	SnapshotKey, Snapshotter string
	CreatedAt, UpdatedAt     time.Time
	Extensions               map[string]any
	Spec                     json.RawMessage
}

func (c *cli) containersInfo() *cobra.Command {
	var only bool
	cmd := &cobra.Command{
		Use: "info ID", Short: "Print all about a container, as JSON", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Containers.Get(ctx, &containersapi.GetContainerRequest{ID: given[0]})
				if err != nil {
					return ofContainer(err)
				}
				k := r.Container
				spec := json.RawMessage(k.Spec.GetValue())
				if !json.Valid(spec) {
					return fmt.Errorf("the spec of container %s is a %s, no JSON", k.ID, k.Spec.GetTypeUrl())
				}
				if only {
					return table.PrintJSON(c.out, spec)
				}
				info := containerInfo{
					ID: k.ID, Labels: k.Labels, Image: k.Image, SnapshotKey: k.SnapshotKey, Snapshotter: k.Snapshotter,
					CreatedAt: k.CreatedAt.AsTime(), UpdatedAt: k.UpdatedAt.AsTime(), Spec: spec,
				}
				info.Runtime.Name = k.Runtime.GetName()
				if k.Runtime.GetOptions() != nil {
					info.Runtime.Options = k.Runtime.Options
				}
				for name, e := range k.Extensions {
					if info.Extensions == nil {
						info.Extensions = map[string]any{}
					}
					info.Extensions[name] = e
				}
				return table.PrintJSON(c.out, info)
			})
		},
	}
	cmd.Flags().BoolVar(&only, "spec", false, "print the OCI spec alone")
	return cmd
}

func (c *cli) containersRm() *cobra.Command {
	var keep bool
	cmd := &cobra.Command{
		Use: "rm ID...", Aliases: []string{"delete", "del", "remove"}, Short: "Remove containers, with their snapshots", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return each(ids, func(id string) error { return removeContainer(ctx, cl, id, keep) })
			})
		},
	}
	cmd.Flags().BoolVar(&keep, "keep-snapshot", false, "leave the snapshot")
	return cmd
}

func removeContainer(ctx context.Context, cl *client.Client, id string, keep bool) error {
	r, err := cl.Containers.Get(ctx, &containersapi.GetContainerRequest{ID: id})
	if err != nil {
		return ofContainer(err)
	}
	p := &process{cl: cl, id: id}
	if t, err := p.get(ctx); err == nil {
		return fmt.Errorf("cannot remove container %s: its task is %s; remove that with `mctl tasks rm -f %s`", id, lower(t.Status), id)
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	k := r.Container
	snapshot := k.SnapshotKey
	if keep && snapshot != "" {
		if err := keepSnapshot(ctx, cl, k.Snapshotter, snapshot); err != nil {
			return err
		}
		snapshot = ""
	}
	return launch.Remove(ctx, cl, id, k.Snapshotter, snapshot)
}

// keepSnapshot has the collector leave a snapshot alone when the container that it was made for is gone.
func keepSnapshot(ctx context.Context, cl *client.Client, snapshotter, key string) error {
	_, err := cl.Snapshots.Update(ctx, &snapshotsapi.UpdateSnapshotRequest{
		Snapshotter: snapshotter, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels.containerd.io/gc.root"}},
		Info: &snapshotsapi.Info{Name: key, Labels: map[string]string{"containerd.io/gc.root": time.Now().UTC().Format(time.RFC3339)}},
	})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

func (c *cli) containersLabel() *cobra.Command {
	return &cobra.Command{
		Use: "label ID [KEY=VALUE...]", Short: "Set labels of a container, or clear those given as KEY=, and print all", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, given []string) error {
			labels, paths, err := labelArgs(given[1:])
			if err != nil {
				return misused(cmd, "%w", err)
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				if len(paths) == 0 {
					r, err := cl.Containers.Get(ctx, &containersapi.GetContainerRequest{ID: given[0]})
					if err != nil {
						return ofContainer(err)
					}
					return c.printLabels(r.Container.Labels)
				}
				r, err := cl.Containers.Update(ctx, &containersapi.UpdateContainerRequest{
					Container: &containersapi.Container{ID: given[0], Labels: labels}, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
				})
				if err != nil {
					return ofContainer(err)
				}
				return c.printLabels(r.Container.Labels)
			})
		},
	}
}

// containerOf asks for a container and the root file system of a container that was made earlier.
func containerOf(ctx context.Context, cl *client.Client, id string) (*containersapi.Container, *snapshotsapi.MountsResponse, error) {
	r, err := cl.Containers.Get(ctx, &containersapi.GetContainerRequest{ID: id})
	if err != nil {
		return nil, nil, ofContainer(err)
	}
	k := r.Container
	if k.SnapshotKey == "" {
		return k, &snapshotsapi.MountsResponse{}, nil
	}
	m, err := cl.Snapshots.Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: k.Snapshotter, Key: k.SnapshotKey})
	return k, m, err
}
