package command

import (
	"context"
	"fmt"
	"strings"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/archive"
)

func (c *cli) imagesCommand() *cobra.Command {
	return group("images", "Manage images", []string{"image", "i"},
		c.imagesPull(), c.imagesPush(), c.imagesMount(), c.imagesUnmount(),
		c.imagesImport(), c.imagesExport(), c.imagesConvert(), c.imagesLs(), c.imagesInspect(), c.imagesRm(), c.imagesTag(), c.imagesLabel(),
		c.imagesCheck(), c.imagesUsage(), c.imagesPrune(),
		refusedCommand("build-erofs-cache", "no snapshotter here has a cache of EROFS layers: mctl images pull --snapshotter erofs makes EROFS images of ordinary ones"))
}

// ofImage says what to do about an error about an image.
func ofImage(err error) error {
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w; `mctl images ls` lists those there are", err)
	}
	return err
}

type imageRow struct {
	Name      string            `json:"name"`
	Type      string            `json:"type"`
	Digest    string            `json:"digest"`
	Size      *int64            `json:"size,omitempty"` // absent when parts are missing
	Platforms []string          `json:"platforms,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

var imageTable = table.Table[imageRow]{Columns: []table.Column[imageRow]{
	{Title: "REF", Cell: func(r imageRow) string { return r.Name }},
	{Title: "TYPE", Cell: func(r imageRow) string { return r.Type }},
	{Title: "DIGEST", Cell: func(r imageRow) string { return r.Digest }},
	{Title: "SIZE", Cell: func(r imageRow) string {
		if r.Size == nil {
			return "-"
		}
		return table.Bytes(*r.Size)
	}},
	{Title: "PLATFORMS", Cell: func(r imageRow) string { return orDash(strings.Join(r.Platforms, ",")) }},
	{Title: "LABELS", Cell: func(r imageRow) string { return table.Labels(r.Labels, "-") }},
}}

func (c *cli) imagesLs() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls [FILTER...]", Aliases: []string{"list"}, Short: "List images",
		Example: "  mctl images ls 'name~=busybox'",
		RunE: func(cmd *cobra.Command, filters []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Images.List(ctx, &imagesapi.ListImagesRequest{Filters: filters})
				if err != nil {
					return err
				}
				var rows []imageRow
				var names []string
				for _, i := range r.Images {
					names = append(names, i.Name)
					if quiet {
						continue
					}
					row := imageRow{Name: i.Name, Type: i.Target.GetMediaType(), Digest: i.Target.GetDigest(), Labels: i.Labels}
					parts, err := archive.Inspect(ctx, cl.Blobs(), client.Descriptor(i.Target))
					switch {
					case err == nil:
						row.Size, row.Platforms = new(parts.Size()), parts.Platforms
					case !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err): // a damaged one is shown all the same
						return err
					}
					rows = append(rows, row)
				}
				return list(c, quiet, names, imageTable, rows)
			})
		},
	}
	quietly(cmd, &quiet)
	return cmd
}

func (c *cli) imagesRm() *cobra.Command {
	var sync bool
	cmd := &cobra.Command{
		Use: "rm NAME...", Aliases: []string{"delete", "del", "remove"}, Short: "Remove images; one that is not there is not an error", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, names []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return each(names, func(name string) error {
					_, err := cl.Images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: name, Sync: sync})
					if errdefs.IsNotFound(err) { // as ctr does, and scripts expect
						c.notice(err.Error())
						return nil
					}
					if err != nil || c.format() == table.JSON {
						return err
					}
					_, err = fmt.Fprintln(c.out, name)
					return err
				})
			})
		},
	}
	cmd.Flags().BoolVar(&sync, "sync", false, "return when what the images held is removed, too")
	return cmd
}

func (c *cli) imagesTag() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "tag NAME NEW...", Short: "Give an image further names", Args: args(2, -1),
		RunE: func(cmd *cobra.Command, names []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Images.Get(ctx, &imagesapi.GetImageRequest{Name: names[0]})
				if err != nil {
					return ofImage(err)
				}
				return each(names[1:], func(name string) error {
					i := &imagesapi.Image{Name: name, Target: r.Image.Target, Labels: r.Image.Labels}
					_, err := cl.Images.Create(ctx, &imagesapi.CreateImageRequest{Image: i})
					if errdefs.IsAlreadyExists(err) && force {
						_, err = cl.Images.Update(ctx, &imagesapi.UpdateImageRequest{Image: i})
					}
					switch {
					case errdefs.IsAlreadyExists(err):
						return fmt.Errorf("%w; --force gives the name to another image", err)
					case err != nil || c.format() == table.JSON:
						return err
					}
					_, err = fmt.Fprintln(c.out, name)
					return err
				})
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "take the name from the image that has it")
	accepted(cmd, "mctl makes names itself, always", "local")
	accepted(cmd, "a name is taken as it is, always", "skip-reference-check")
	return cmd
}

func (c *cli) imagesLabel() *cobra.Command {
	var replace bool
	cmd := &cobra.Command{
		Use: "label NAME [KEY=VALUE...]", Short: "Set labels of an image, or clear those given as KEY=, and print all", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, given []string) error {
			labels, paths, err := labelArgs(given[1:])
			if err != nil {
				return misused(cmd, "%w", err)
			}
			if replace {
				paths = []string{"labels"}
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				if len(paths) == 0 {
					r, err := cl.Images.Get(ctx, &imagesapi.GetImageRequest{Name: given[0]})
					if err != nil {
						return ofImage(err)
					}
					return c.printLabels(r.Image.Labels)
				}
				r, err := cl.Images.Update(ctx, &imagesapi.UpdateImageRequest{
					Image: &imagesapi.Image{Name: given[0], Labels: labels}, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
				})
				if err != nil {
					return ofImage(err)
				}
				return c.printLabels(r.Image.Labels)
			})
		},
	}
	cmd.Flags().BoolVarP(&replace, "replace-all", "r", false, "replace all labels")
	return cmd
}

// checkRow is how complete an image is, on this machine's platform.
type checkRow struct {
	Name     string `json:"name"`
	Type     string `json:"type"`
	Digest   string `json:"digest"`
	Status   string `json:"status"` // complete, incomplete, unavailable or error
	Present  int    `json:"present"`
	Required int    `json:"required"`
	Have     int64  `json:"size_present"`
	Want     int64  `json:"size_required"`
	Unpacked bool   `json:"unpacked"`
}

var checkTable = table.Table[checkRow]{Columns: []table.Column[checkRow]{
	{Title: "REF", Cell: func(r checkRow) string { return r.Name }},
	{Title: "TYPE", Cell: func(r checkRow) string { return r.Type }},
	{Title: "DIGEST", Cell: func(r checkRow) string { return r.Digest }},
	{Title: "STATUS", Cell: func(r checkRow) string {
		return fmt.Sprintf("%s (%s/%s)", r.Status, count(r.Required, r.Present), count(r.Required, r.Required))
	}},
	{Title: "SIZE", Cell: func(r checkRow) string {
		if r.Required == 0 {
			return "-"
		}
		return table.Bytes(r.Have) + "/" + table.Bytes(r.Want)
	}},
	{Title: "UNPACKED", Cell: func(r checkRow) string { return fmt.Sprint(r.Unpacked) }},
}}

// count is n, unless nothing is known.
func count(known, n int) string {
	if known == 0 {
		return "?"
	}
	return fmt.Sprint(n)
}

func (c *cli) imagesCheck() *cobra.Command {
	var quiet bool
	var snapshotter string
	cmd := &cobra.Command{
		Use: "check [FILTER...]", Short: "Look whether images are complete and unpacked",
		RunE: func(cmd *cobra.Command, filters []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				name, err := cl.DefaultSnapshotter(ctx, c.namespace, snapshotter)
				if err != nil {
					return err
				}
				r, err := cl.Images.List(ctx, &imagesapi.ListImagesRequest{Filters: filters})
				if err != nil {
					return err
				}
				var rows []checkRow
				var ready []string
				for _, i := range r.Images {
					row, err := check(ctx, cl, name, i)
					if err != nil {
						return err
					}
					if rows = append(rows, row); row.Status == "complete" && row.Unpacked {
						ready = append(ready, i.Name)
					}
				}
				return list(c, quiet, ready, checkTable, rows)
			})
		},
	}
	quietly(cmd, &quiet)
	cmd.Flags().StringVar(&snapshotter, "snapshotter", "", "`name` of the snapshotter")
	return cmd
}

func check(ctx context.Context, cl *client.Client, snapshotter string, i *imagesapi.Image) (checkRow, error) {
	row := checkRow{Name: i.Name, Type: i.Target.GetMediaType(), Digest: i.Target.GetDigest(), Status: "complete"}
	target := client.Descriptor(i.Target)
	parts, err := archive.Inspect(ctx, cl.Blobs(), target)
	switch {
	case errdefs.IsNotFound(err):
		row.Status = "unavailable"
		return row, nil
	case errdefs.IsInvalidArgument(err):
		row.Status = "error"
		return row, nil
	case err != nil:
		return row, err
	}
	for _, d := range parts.Content {
		row.Required++
		row.Want += d.Size
		_, err := cl.Blobs().Labels(ctx, d.Digest)
		if err == nil {
			row.Present++
			row.Have += d.Size
		} else if !errdefs.IsNotFound(err) {
			return row, err
		}
	}
	if row.Present < row.Required {
		row.Status = "incomplete"
	}
	_, chain, err := archive.Config(ctx, cl.Blobs(), target)
	switch {
	case errdefs.IsNotFound(err):
		return row, nil
	case err != nil:
		return row, err
	}
	row.Unpacked = chain == ""
	if chain != "" {
		row.Unpacked, err = cl.Snapshotter(snapshotter).Exists(ctx, chain)
	}
	return row, err
}
