package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/leases"
)

func (c *cli) imagesCommand() *cobra.Command {
	return group("images", "Manage images", []string{"image", "i"}, c.imagesImport(), c.imagesLs())
}

func (c *cli) imagesImport() *cobra.Command {
	var o archive.ImportOptions
	var noUnpack bool
	cmd := &cobra.Command{
		Use: "import FILE", Short: "Import the images of an archive (OCI layout or docker save; - is standard input)", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			in := c.in
			if given[0] != "-" {
				f, err := os.Open(given[0])
				if err != nil {
					return fmt.Errorf("cannot import: %w", err)
				}
				defer func() { _ = f.Close() }()
				in = f
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return c.leased(ctx, cl, func(ctx context.Context) error { return c.importFrom(ctx, cl, in, o, noUnpack) })
			})
		},
	}
	cmd.Flags().StringVar(&o.Base, "base-name", "", "`name` of images that the archive gives only tags")
	cmd.Flags().BoolVar(&noUnpack, "no-unpack", false, "do not unpack the layers")
	return cmd
}

func (c *cli) importFrom(ctx context.Context, cl *client.Client, in io.Reader, o archive.ImportOptions, noUnpack bool) error {
	images, err := archive.Import(ctx, cl.Blobs(), cl.Names(), in, o)
	if err != nil {
		return err
	}
	for _, i := range images {
		if !noUnpack {
			if _, err := archive.Unpack(ctx, cl.Blobs(), cl.Snapshotter("overlayfs"), i.Target); err != nil {
				return err
			}
		}
		_, _ = fmt.Fprintln(c.out, i.Name)
	}
	return nil
}

// leased calls f with a context whose work the collector leaves alone until f returns.
func (c *cli) leased(ctx context.Context, cl *client.Client, f func(context.Context) error) (err error) {
	// A lease that nobody ends (we may be killed) ends itself.
	labels := map[string]string{"containerd.io/gc.expire": time.Now().Add(24 * time.Hour).Format(time.RFC3339)}
	l, err := cl.Leases.Create(ctx, &leasesapi.CreateRequest{ID: fmt.Sprintf("mctl-%d-%d", os.Getpid(), time.Now().UnixNano()), Labels: labels})
	if err != nil {
		return err
	}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		_, lerr := cl.Leases.Delete(end, &leasesapi.DeleteRequest{ID: l.Lease.ID})
		err = errors.Join(err, lerr)
	}()
	return f(leases.With(ctx, l.Lease.ID))
}

type imageRow struct {
	Name   string            `json:"name"`
	Type   string            `json:"type"`
	Digest string            `json:"digest"`
	Labels map[string]string `json:"labels"`
}

func (c *cli) imagesLs() *cobra.Command {
	return &cobra.Command{
		Use: "ls [FILTER...]", Aliases: []string{"list"}, Short: "List images", Args: args(0, -1),
		RunE: func(cmd *cobra.Command, filters []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				resp, err := cl.Images.List(ctx, &imagesapi.ListImagesRequest{Filters: filters})
				if err != nil {
					return err
				}
				var rows []imageRow
				for _, i := range resp.Images {
					rows = append(rows, imageRow{i.Name, i.Target.GetMediaType(), i.Target.GetDigest(), i.Labels})
				}
				return table.Print(c.out, c.format(), []table.Column[imageRow]{
					{Title: "REF", Cell: func(r imageRow) string { return r.Name }},
					{Title: "TYPE", Cell: func(r imageRow) string { return r.Type }},
					{Title: "DIGEST", Cell: func(r imageRow) string { return r.Digest }},
				}, rows)
			})
		},
	}
}
