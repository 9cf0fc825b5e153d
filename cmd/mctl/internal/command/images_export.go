package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/manager/archive"
)

func (c *cli) imagesExport() *cobra.Command {
	var o archive.ExportOptions
	var named []string
	cmd := &cobra.Command{
		Use: "export [flags] FILE NAME...", Short: "Export images to an archive", Args: args(2, -1),
		Long:    `Writes images to FILE (- is standard output) as an OCI layout that "docker load" takes, too. FILE appears when it is complete.`,
		Example: "  mctl images export busybox.tar docker.io/library/busybox:latest",
		RunE: func(cmd *cobra.Command, given []string) (err error) {
			if o.Platforms, err = parsePlatforms(cmd, named); err != nil {
				return err
			}
			if o.AllPlatforms && len(named) > 0 {
				return misused(cmd, "--platform and --all-platforms cannot both be given")
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				var images []archive.Image
				for _, name := range given[1:] {
					i, err := cl.Image(ctx, name)
					if err != nil {
						return err
					}
					images = append(images, i)
				}
				write := func(w io.Writer) error { return archive.Export(ctx, cl.Blobs(), w, images, o) }
				if given[0] == "-" {
					return write(c.out)
				}
				return whole(given[0], write)
			})
		},
	}
	cmd.Flags().StringArrayVar(&named, "platform", nil, "take the image for `OS/ARCH` instead of this machine's; may be repeated")
	cmd.Flags().BoolVar(&o.AllPlatforms, "all-platforms", false, "take the images for all platforms")
	cmd.Flags().BoolVar(&o.NoForeign, "skip-non-distributable", false, "leave out layers that are not to be distributed")
	cmd.Flags().BoolVar(&o.NoDocker, "skip-manifest-json", false, "leave out manifest.json, by which `docker load` of old finds images")
	accepted(cmd, "mctl writes archives itself, always", "local")
	return cmd
}

// whole writes a file that is there completely or not at all. What is no regular file (a FIFO, /dev/stdout) is written to
// as it is.
func whole(name string, write func(io.Writer) error) (err error) {
	if fi, serr := os.Stat(name); serr == nil && !fi.Mode().IsRegular() {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(write(f), f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".mctl-export-")
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		_ = f.Close()
		return err
	}
	if err := errors.Join(f.Chmod(0o644), f.Close()); err != nil {
		return fmt.Errorf("cannot write %s: %w", name, err)
	}
	return os.Rename(f.Name(), name)
}
