package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/archive"
)

// imported is an image that an archive held.
type imported struct {
	Name     string `json:"name"`
	Digest   string `json:"digest"`
	Unpacked bool   `json:"unpacked"`
}

// unnamed leaves names to who imports: there is no image before it is unpacked.
type unnamed struct{}

func (unnamed) Put(context.Context, string, ocispec.Descriptor, map[string]string) error { return nil }

func (c *cli) imagesImport() *cobra.Command {
	var o archive.ImportOptions
	var noUnpack, discard bool
	var snapshotter string
	var labels, given []string
	cmd := &cobra.Command{
		Use: "import [flags] FILE", Short: "Import the images of an archive", Args: args(1, 1),
		Long: `Imports the images of FILE (- is standard input): the tar, plain, gzip or zstd, of an OCI layout or of "docker save". Every blob
is verified by its digest. An image gets its name when it is unpacked: one that cannot be is not imported.`,
		Example: "  docker save busybox | mctl images import -",
		RunE: func(cmd *cobra.Command, files []string) (err error) {
			if o.Labels, _, err = labelArgs(labels); err != nil {
				return misused(cmd, "%w", err)
			}
			if o.SkipNamed && !o.Digests {
				return misused(cmd, "--skip-digest-for-named is of use with --digests only")
			}
			if noUnpack && discard {
				return misused(cmd, "--discard-unpacked-layers and --no-unpack cannot both be given")
			}
			list, err := parsePlatforms(cmd, given)
			if err != nil {
				return err
			}
			switch {
			case noUnpack:
				list = nil
			case len(list) == 0:
				list = []ocispec.Platform{platforms.DefaultSpec()}
			}
			var in io.Reader
			if files[0] != "-" {
				f, err := os.Open(files[0])
				if err != nil {
					return fmt.Errorf("cannot import: %w", err)
				}
				defer func() { _ = f.Close() }()
				in = f
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				name, err := cl.DefaultSnapshotter(ctx, c.namespace, snapshotter)
				if err != nil {
					return err
				}
				if in == nil {
					in = ending(ctx, c.in)
				}
				var done []imported
				err = cl.Leased(ctx, func(ctx context.Context) error {
					images, err := archive.Import(ctx, cl.Blobs(), unnamed{}, in, o)
					if err != nil {
						return fmt.Errorf("%s: %w", files[0], err)
					}
					for _, i := range images {
						for _, p := range list {
							if _, err := archive.UnpackPlatform(ctx, cl.Blobs(), cl.Snapshotter(name), i.Target, p); err != nil {
								return fmt.Errorf("%s was not imported, as it cannot be unpacked for %s: %w; --no-unpack imports it as it is", i.Name, platforms.FormatAll(p), err)
							}
						}
						if err := cl.Names().Put(ctx, i.Name, i.Target, o.Labels); err != nil {
							return fmt.Errorf("cannot name image %s: %w", i.Name, err)
						}
						done = append(done, imported{i.Name, i.Target.Digest.String(), !noUnpack})
						for _, p := range list {
							if !discard {
								break
							}
							if err := archive.DiscardLayers(ctx, cl.Blobs(), i.Target, p); err != nil {
								return fmt.Errorf("%s was imported and unpacked, but its layers are kept: %w", i.Name, err)
							}
						}
					}
					return nil
				})
				return errors.Join(c.printImported(done), err)
			})
		},
	}
	cmd.Flags().StringVar(&o.Base, "base-name", "", "`name` for images that have only a tag, or none (default: import-DATE)")
	cmd.Flags().BoolVar(&o.Digests, "digests", false, "name images by their digests, too (BASE@DIGEST)")
	cmd.Flags().BoolVar(&o.SkipNamed, "skip-digest-for-named", false, "with --digests, not those that have a name in the archive")
	cmd.Flags().StringVar(&o.Index, "index-name", "", "a further `name`, for the archive as a whole")
	cmd.Flags().StringArrayVar(&labels, "label", nil, "`KEY=VALUE` for the images; may be repeated")
	cmd.Flags().StringArrayVar(&given, "platform", nil, "unpack for `OS/ARCH` instead of this machine's; may be repeated")
	accepted(cmd, "the images for all platforms are imported, always", "all-platforms")
	accepted(cmd, "mctl reads archives itself, always", "local")
	accepted(cmd, synced, "sync-fs")
	cmd.Flags().BoolVar(&noUnpack, "no-unpack", false, "do not unpack the layers")
	cmd.Flags().BoolVar(&discard, "discard-unpacked-layers", false, "keep no layers that are unpacked: the image can be run, not pushed or exported")
	cmd.Flags().BoolVar(&o.Compress, "compress-blobs", false, "pack the plain layers of \"docker save\" with gzip")
	cmd.Flags().StringVar(&snapshotter, "snapshotter", "", "`name` of the snapshotter to unpack into")
	return cmd
}

func (c *cli) printImported(images []imported) error {
	if c.format() == table.JSON {
		return table.Table[imported]{}.Print(c.out, table.JSON, images)
	}
	for _, i := range images {
		how := "imported"
		if i.Unpacked {
			how += " and unpacked"
		}
		if _, err := fmt.Fprintf(c.out, "%s (%s) %s\n", i.Name, i.Digest, how); err != nil {
			return err
		}
	}
	return nil
}

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
