package command

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/diff"
)

func (c *cli) imagesConvert() *cobra.Command {
	var o archive.ConvertOptions
	var given []string
	var uncompress, zstd bool
	cmd := &cobra.Command{
		Use: "convert [flags] NAME NEW", Short: "Make an image of other media types, or with layers packed otherwise, of one", Args: args(2, 2),
		Long: `Makes the image NEW of the image NAME, and prints its digest. What is inside of the layers stays the same, so what is unpacked
of one is of the other, too. An index keeps the images for this machine's platform, those that --platform names, or all.`,
		Example: "  mctl images convert --oci --zstd docker.io/library/busybox:latest local/busybox:zstd",
		RunE: func(cmd *cobra.Command, names []string) error {
			list, err := parsePlatforms(cmd, given)
			if err != nil {
				return err
			}
			if o.Platforms = list; o.AllPlatforms && len(list) > 0 {
				return misused(cmd, "--platform and --all-platforms cannot both be given")
			}
			switch {
			case uncompress && zstd:
				return misused(cmd, "--uncompress and --zstd cannot both be given")
			case uncompress:
				o.Layers = new(diff.None)
			case zstd:
				o.Layers = new(diff.Zstd)
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				i, err := cl.Image(ctx, names[0])
				if err != nil {
					return err
				}
				return cl.Leased(ctx, func(ctx context.Context) error {
					target, err := archive.Convert(ctx, cl.Blobs(), i.Target, o)
					if err != nil {
						return fmt.Errorf("%s: %w", i.Name, err)
					}
					if err := cl.Names().Put(ctx, names[1], target, nil); err != nil {
						return err
					}
					if c.format() == table.JSON {
						return table.PrintJSON(c.out, moved{Name: names[1], Digest: target.Digest.String()})
					}
					_, err = fmt.Fprintln(c.out, target.Digest)
					return err
				})
			})
		},
	}
	cmd.Flags().BoolVar(&o.OCI, "oci", false, "give it OCI's media types instead of Docker's")
	cmd.Flags().BoolVar(&uncompress, "uncompress", false, "leave its layers uncompressed")
	cmd.Flags().BoolVar(&zstd, "zstd", false, "compress its layers with zstd")
	cmd.Flags().StringArrayVar(&given, "platform", nil, "take the image for `OS/ARCH` of an index; may be repeated")
	cmd.Flags().BoolVar(&o.AllPlatforms, "all-platforms", false, "take the images for all platforms, which must be there")
	refused(cmd, "no snapshotter here takes layers that are EROFS images: mctl images pull --snapshotter erofs makes them of ordinary layers, on this machine",
		"erofs=", "erofs-compressors=", "erofs-mkfs-options=")
	return cmd
}
