package command

import (
	"context"
	"errors"
	"fmt"
	"strings"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/archive"
)

type imageUsage struct {
	Name      string `json:"name"`
	Content   int64  `json:"content"`   // bytes of the blobs that are there
	Snapshots int64  `json:"snapshots"` // bytes of its unpacked layers
	Inodes    int64  `json:"inodes"`
}

func (c *cli) imagesUsage() *cobra.Command {
	var snapshotter string
	cmd := &cobra.Command{
		Use: "usage [NAME | FILTER...]", Short: "Tell how much room images take; what they share counts for each",
		Long: `Tells how much room images take, each with all it needs; what they share counts for each. Of one that is named it tells what
each of its snapshots takes, the topmost first.`,
		RunE: func(cmd *cobra.Command, filters []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				name, err := cl.DefaultSnapshotter(ctx, c.namespace, snapshotter)
				if err != nil {
					return err
				}
				if len(filters) == 1 && !strings.Contains(filters[0], "=") {
					return c.usageOfLayers(ctx, cl, name, filters[0])
				}
				r, err := cl.Images.List(ctx, &imagesapi.ListImagesRequest{Filters: filters})
				if err != nil {
					return err
				}
				var rows []imageUsage
				var errs []error
				for _, i := range r.Images {
					u, err := usage(ctx, cl, name, i)
					if err != nil {
						errs = append(errs, fmt.Errorf("image %s: %w", i.Name, err))
						continue
					}
					rows = append(rows, u)
				}
				err = table.Table[imageUsage]{Columns: []table.Column[imageUsage]{
					{Title: "REF", Cell: func(r imageUsage) string { return r.Name }},
					{Title: "CONTENT", Cell: func(r imageUsage) string { return table.Bytes(r.Content) }},
					{Title: "SNAPSHOTS", Cell: func(r imageUsage) string { return table.Bytes(r.Snapshots) }},
					{Title: "INODES", Cell: func(r imageUsage) string { return fmt.Sprint(r.Inodes) }},
				}}.Print(c.out, c.format(), rows)
				return errors.Join(append(errs, err)...)
			})
		},
	}
	cmd.Flags().StringVar(&snapshotter, "snapshotter", "", "`name` of the snapshotter")
	return cmd
}

func usage(ctx context.Context, cl *client.Client, snapshotter string, i *imagesapi.Image) (imageUsage, error) {
	u := imageUsage{Name: i.Name}
	parts, err := archive.Inspect(ctx, cl.Blobs(), client.Descriptor(i.Target))
	if err != nil {
		return u, err
	}
	for _, d := range append(parts.Meta, parts.Content...) {
		if _, err := cl.Blobs().Labels(ctx, d.Digest); err == nil {
			u.Content += d.Size
		} else if !errdefs.IsNotFound(err) {
			return u, err
		}
	}
	_, chain, err := archive.Config(ctx, cl.Blobs(), client.Descriptor(i.Target))
	for err == nil && chain != "" {
		var size, inodes int64
		var parent string
		if size, inodes, parent, err = snapshotUsage(ctx, cl, snapshotter, chain); err == nil {
			u.Snapshots, u.Inodes, chain = u.Snapshots+size, u.Inodes+inodes, parent
		}
	}
	if errdefs.IsNotFound(err) { // not unpacked
		err = nil
	}
	return u, err
}

// usageOfLayers prints what each snapshot of an image takes.
func (c *cli) usageOfLayers(ctx context.Context, cl *client.Client, snapshotter, name string) error {
	i, err := cl.Image(ctx, name)
	if err != nil {
		return err
	}
	_, chain, err := archive.Config(ctx, cl.Blobs(), i.Target)
	if err != nil {
		return err
	}
	var rows []usageRow
	for chain != "" {
		size, inodes, parent, err := snapshotUsage(ctx, cl, snapshotter, chain)
		if errdefs.IsNotFound(err) {
			return fmt.Errorf("image %s is not unpacked by snapshotter %s; `mctl snapshots unpack %s` unpacks it: %w", i.Name, snapshotter, i.Name, err)
		}
		if err != nil {
			return err
		}
		rows, chain = append(rows, usageRow{chain, size, inodes}), parent
	}
	return usageTable(false).Print(c.out, c.format(), rows)
}
