package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/api/types"
	wire "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/transfer/wish"
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
			im := importing{c: c, platforms: list, discard: discard, o: o}
			if files[0] != "-" {
				if im.file, err = os.Open(files[0]); err != nil {
					return fmt.Errorf("cannot import: %w", err)
				}
				defer func() { _ = im.file.Close() }()
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				if im.snapshotter, err = cl.DefaultSnapshotter(ctx, c.namespace, snapshotter); err != nil {
					return err
				}
				im.cl = cl
				done, err := im.run(ctx)
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
	accepted(cmd, "the daemon reads files that it finds too, and mctl all others", "local")
	accepted(cmd, synced, "sync-fs")
	cmd.Flags().BoolVar(&noUnpack, "no-unpack", false, "do not unpack the layers")
	cmd.Flags().BoolVar(&discard, "discard-unpacked-layers", false, "keep no layers that are unpacked: the image can be run, not pushed or exported")
	cmd.Flags().BoolVar(&o.Compress, "compress-blobs", false, "pack the plain layers of \"docker save\" with gzip")
	cmd.Flags().StringVar(&snapshotter, "snapshotter", "", "`name` of the snapshotter to unpack into")
	return cmd
}

// importing is an import under way.
type importing struct {
	c           *cli
	cl          *client.Client
	file        *os.File // nil: standard input
	snapshotter string
	platforms   []ocispec.Platform // that images are unpacked for
	discard     bool
	o           archive.ImportOptions
}

// run has the daemon import a file that it finds under the same path; what it does not, mctl reads.
func (im *importing) run(ctx context.Context) ([]imported, error) {
	if im.file == nil {
		return im.here(ctx, ending(ctx, im.c.in), "-")
	}
	if f, ok := wish.File(im.file); ok {
		done, err := im.there(ctx, f)
		// Of any other error the daemon is one that has not tried to.
		if err == nil || ctx.Err() != nil || strings.Contains(err.Error(), "cannot import "+f.Path) {
			return done, err
		}
	}
	return im.here(ctx, im.file, im.file.Name())
}

// there has the daemon import.
func (im *importing) there(ctx context.Context, f *wish.Import) (done []imported, err error) {
	f.Base, f.Digests, f.SkipNamed, f.Discard = im.o.Base, im.o.Digests, im.o.SkipNamed, im.discard
	if ctx, err = wish.With(ctx, wish.Wish{Import: f}); err != nil {
		return nil, err
	}
	store := &wire.ImageStore{Name: im.o.Index, Labels: im.o.Labels}
	for _, p := range types.OCIPlatformToProto(im.platforms) {
		store.Unpacks = append(store.Unpacks, &wire.UnpackConfiguration{Platform: p, Snapshotter: im.snapshotter})
	}
	saved := func(p *wire.Progress) {
		i := imported{p.Name, p.Desc.GetDigest(), len(im.platforms) > 0}
		if p.Event == "saved" && !slices.Contains(done, i) { // a daemon that was killed may have told of it
			done = append(done, i)
		}
	}
	from := &wire.ImageImportStream{ForceCompress: im.o.Compress}
	err = im.cl.Transfer(ctx, from, store, &wire.RegistryResolver{}, nil, saved, im.c.notice, im.c.err)
	return done, err
}

// here imports what mctl reads.
func (im *importing) here(ctx context.Context, in io.Reader, name string) (done []imported, err error) {
	err = im.cl.Leased(ctx, func(ctx context.Context) error {
		blobs, names := im.cl.Blobs(), im.cl.Names()
		images, err := archive.Import(ctx, blobs, unnamed{}, in, im.o)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		for _, i := range images {
			for _, p := range im.platforms {
				if _, err := archive.UnpackPlatform(ctx, blobs, im.cl.Snapshotter(im.snapshotter), i.Target, p); err != nil {
					return fmt.Errorf("%s was not imported, as it cannot be unpacked for %s: %w", i.Name, platforms.FormatAll(p), err)
				}
			}
		}
		for _, i := range images {
			if err := names.Put(ctx, i.Name, i.Target, im.o.Labels); err != nil {
				return fmt.Errorf("cannot name image %s: %w", i.Name, err)
			}
			done = append(done, imported{i.Name, i.Target.Digest.String(), len(im.platforms) > 0})
			for _, p := range im.platforms {
				if !im.discard {
					break
				}
				if err := archive.DiscardLayers(ctx, blobs, i.Target, p); err != nil {
					return fmt.Errorf("%s was imported and unpacked, but its layers are kept: %w", i.Name, err)
				}
			}
		}
		return nil
	})
	return done, err
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
