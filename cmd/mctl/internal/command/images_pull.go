package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/api/types"
	wire "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/progress"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/transfer/wish"
)

// move runs a transfer, and shows how it goes on standard error.
func (c *cli) move(ctx context.Context, cl *client.Client, from, to proto.Message, r *wire.RegistryResolver, asked client.Asked) error {
	var size func() (int, int, error)
	if f, ok := c.err.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		size = func() (int, int, error) { return term.GetSize(int(f.Fd())) }
	}
	d := progress.New(c.err, size)
	defer d.Close()
	return cl.Transfer(ctx, from, to, r, asked, d.Tell, c.notice, c.err)
}

// moved is an image that was pulled or pushed.
type moved struct {
	Name   string `json:"name"`
	Digest string `json:"digest"`
	Chain  string `json:"chain_id,omitempty"` // if it was asked for
}

func (c *cli) printMoved(rows []moved) error {
	if c.format() == table.JSON {
		return table.Table[moved]{}.Print(c.out, table.JSON, rows)
	}
	for _, r := range rows {
		if _, err := fmt.Fprintf(c.out, "%s %s\n", r.Name, r.Digest); err != nil {
			return err
		}
		if r.Chain != "" {
			if _, err := fmt.Fprintf(c.out, "image chain ID: %s\n", r.Chain); err != nil {
				return err
			}
		}
	}
	return nil
}

// parsePlatforms reads OS/ARCH[/VARIANT] arguments.
func parsePlatforms(cmd *cobra.Command, given []string) (out []ocispec.Platform, err error) {
	for _, g := range given {
		p, err := platforms.Parse(g)
		if err != nil {
			return nil, misused(cmd, "platform %q: %w", g, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// parseReference reads an image's name as docker does: busybox is docker.io/library/busybox:latest.
func parseReference(cmd *cobra.Command, name string) (reference.Named, error) {
	named, err := reference.ParseDockerRef(name)
	if err != nil {
		return nil, misused(cmd, "image name %q: %w", name, err)
	}
	return named, nil
}

func (c *cli) imagesPull() *cobra.Command {
	var f registryFlags
	var given, labels []string
	var all, allMetadata, skipMetadata, noUnpack, printChain bool
	var want wish.Wish
	var snapshotter string
	cmd := &cobra.Command{
		Use: "pull [flags] REF...", Short: "Pull images from a registry, and unpack them", Args: args(1, -1),
		Long: `Pulls images, layers at the same time, and unpacks them as they come. A pull that was interrupted, also by the end of the daemon,
goes on where it was when it is made again. Progress goes to standard error, what was pulled to standard output.`,
		Example: "  mctl images pull docker.io/library/busybox:latest\n  mctl images pull --user me:secret --plain-http registry.local:5000/a/b:1",
		RunE: func(cmd *cobra.Command, names []string) error {
			list, err := parsePlatforms(cmd, given)
			if err != nil {
				return err
			}
			if all && len(list) > 0 {
				return misused(cmd, "--platform and --all-platforms cannot both be given")
			}
			if want.Concurrent < 0 {
				return misused(cmd, "--max-concurrent-downloads %d is less than none", want.Concurrent)
			}
			set, _, err := labelArgs(labels)
			if err != nil {
				return misused(cmd, "%w", err)
			}
			r, done, err := f.resolver(cmd)
			defer done()
			if err != nil {
				return err
			}
			var rows []moved
			err = c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				ctx, err := wish.With(ctx, want)
				if err != nil {
					return err
				}
				return each(names, func(name string) error {
					ref, err := parseReference(cmd, name)
					if err != nil {
						return err
					}
					asked, err := f.asked(cmd, c, ref)
					if err != nil {
						return err
					}
					store := &wire.ImageStore{Name: ref.String(), Labels: set, AllMetadata: allMetadata || !skipMetadata}
					unpack := list
					if len(unpack) == 0 {
						unpack = []ocispec.Platform{platforms.DefaultSpec()}
					}
					if !all {
						store.Platforms = types.OCIPlatformToProto(unpack)
					}
					for _, p := range types.OCIPlatformToProto(unpack) {
						if !noUnpack && !want.MetadataOnly {
							store.Unpacks = append(store.Unpacks, &wire.UnpackConfiguration{Platform: p, Snapshotter: snapshotter})
						}
					}
					if err := c.move(ctx, cl, &wire.OCIRegistry{Reference: ref.String(), Resolver: r}, store, r, asked); err != nil {
						return err
					}
					i, err := cl.Image(ctx, ref.String())
					done := moved{Name: i.Name, Digest: i.Target.Digest.String()}
					if err == nil && printChain {
						_, done.Chain, err = archive.ConfigPlatform(ctx, cl.Blobs(), i.Target, unpack[0])
					}
					rows = append(rows, done)
					return err
				})
			})
			return errors.Join(c.printMoved(rows), err)
		},
	}
	f.add(cmd)
	cmd.Flags().StringArrayVar(&given, "platform", nil, "pull for `OS/ARCH` instead of this machine's; may be repeated")
	cmd.Flags().BoolVar(&all, "all-platforms", false, "pull for all platforms; this machine's is unpacked")
	cmd.Flags().BoolVar(&allMetadata, "all-metadata", false, "pull the manifests and configs of the other platforms, too")
	cmd.Flags().StringVar(&snapshotter, "snapshotter", env("", "CONTAINERD_SNAPSHOTTER"), "`name` of the snapshotter to unpack into")
	cmd.Flags().StringArrayVar(&labels, "label", nil, "`KEY=VALUE` for the image; may be repeated")
	cmd.Flags().BoolVar(&noUnpack, "no-unpack", false, "do not unpack the layers")
	cmd.Flags().BoolVar(&printChain, "print-chainid", false, "print the key of the topmost snapshot, too")
	cmd.Flags().BoolVar(&skipMetadata, "skip-metadata", true, "do not pull the metadata of other platforms; =false is --all-metadata")
	cmd.Flags().BoolVar(&want.MetadataOnly, "metadata-only", false, "fetch the manifests and configs for all platforms, and no layers")
	cmd.Flags().Lookup("metadata-only").Hidden = true // of content fetch
	cmd.Flags().IntVar(&want.Concurrent, "max-concurrent-downloads", 0, "`number` of layers that are pulled at the same time (0: as the daemon is configured)")
	accepted(cmd, transferred, "local")
	accepted(cmd, synced, "sync-fs")
	return cmd
}

func (c *cli) imagesPush() *cobra.Command {
	var f registryFlags
	var given []string
	var manifest, manifestType string
	var want wish.Wish
	cmd := &cobra.Command{
		Use: "push [flags] REF [NAME]", Short: "Push an image to a registry as REF: that of this name, or NAME", Args: args(1, 2),
		Long: `Pushes an image. What the registry has is not sent, nor what it has in another repository the image was pulled from. Of an
index that is here in part, --platform says which image is pushed. With --manifest it is one that has no name.`,
		RunE: func(cmd *cobra.Command, names []string) error {
			list, err := parsePlatforms(cmd, given)
			if err != nil {
				return err
			}
			ref, err := parseReference(cmd, names[0])
			if err != nil {
				return err
			}
			var of digest.Digest
			switch {
			case want.Concurrent < 0:
				return misused(cmd, "--max-concurrent-uploaded-layers %d is less than none", want.Concurrent)
			case manifest == "" && manifestType != "":
				return misused(cmd, "--manifest-type is that of --manifest, which is missing")
			case manifest != "" && len(names) > 1:
				return misused(cmd, "NAME and --manifest cannot both be given")
			case manifest != "":
				if of, err = parseDigest(cmd, manifest); err != nil {
					return err
				}
			}
			r, done, err := f.resolver(cmd)
			defer done()
			if err != nil {
				return err
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				i, err := archive.Image{}, error(nil)
				if of == "" {
					i, err = cl.Image(ctx, names[len(names)-1])
				} else if i.Target, err = manifestOf(ctx, cl, of, manifestType); err == nil {
					want.Target = &i.Target
				}
				if err != nil {
					return err
				}
				asked, err := f.asked(cmd, c, ref)
				if err != nil {
					return err
				}
				if ctx, err = wish.With(ctx, want); err != nil {
					return err
				}
				store := &wire.ImageStore{Name: i.Name, Platforms: types.OCIPlatformToProto(list)}
				if err := c.move(ctx, cl, store, &wire.OCIRegistry{Reference: ref.String(), Resolver: r}, r, asked); err != nil {
					return err
				}
				return c.printMoved([]moved{{Name: ref.String(), Digest: i.Target.Digest.String()}})
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringArrayVar(&given, "platform", nil, "push the image for `OS/ARCH` of an index; may be repeated")
	cmd.Flags().StringVar(&manifest, "manifest", "", "`digest` of a manifest or index of the store to push, instead of an image's")
	cmd.Flags().StringVar(&manifestType, "manifest-type", "", "media `type` of --manifest (default: what it says itself, or "+ocispec.MediaTypeImageManifest+")")
	cmd.Flags().IntVar(&want.Concurrent, "max-concurrent-uploaded-layers", 0, "`number` of layers that are pushed at the same time (0: as the daemon is configured)")
	cmd.Flags().BoolVar(&want.Foreign, "allow-non-distributable-blobs", false, "push layers that are not to be distributed, too")
	accepted(cmd, transferred, "local")
	return cmd
}

// What is said of flags that scripts made for ctr have.
const (
	transferred = "the daemon moves images between registries and its stores, whatever ctr calls it"
	synced      = "a layer is synced to disk before its snapshot is committed, always"
)

// manifestOf is a blob of the store as a manifest or index: of this media type or, if that is empty, of the one that it says.
func manifestOf(ctx context.Context, cl *client.Client, d digest.Digest, mediaType string) (ocispec.Descriptor, error) {
	r, err := cl.Content.Info(ctx, &contentapi.InfoRequest{Digest: d.String()})
	if err != nil {
		return ocispec.Descriptor{}, ofBlob(err)
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: r.Info.Size}
	if mediaType != "" {
		return desc, nil
	}
	says, err := archive.MediaType(ctx, cl.Blobs(), desc)
	desc.MediaType = cmp.Or(says, ocispec.MediaTypeImageManifest)
	return desc, err
}
