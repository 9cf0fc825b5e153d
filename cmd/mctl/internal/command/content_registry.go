package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/registry"
)

// contentFetch is images pull --no-unpack, or less.
func (c *cli) contentFetch() *cobra.Command {
	cmd := c.imagesPull()
	cmd.Use, cmd.Short = "fetch [flags] REF...", "Pull images from a registry, and do not unpack them"
	cmd.Long = "As images pull does: the daemon fetches, from where its configuration says."
	cmd.Example = "  mctl content fetch --all-platforms docker.io/library/busybox:latest"
	for name, value := range map[string]string{"no-unpack": "true", "snapshotter": "", "print-chainid": "false"} {
		f := cmd.Flags().Lookup(name)
		f.Hidden = true
		_ = f.Value.Set(value) // a bool and a string take these
	}
	cmd.Flags().Lookup("all-platforms").Usage = "pull for all platforms"
	cmd.Flags().Lookup("metadata-only").Hidden = false
	return cmd
}

// ofRegistry is what is said of the commands by which mctl talks to a registry itself.
const ofRegistry = "mctl talks to the registry itself, as the flags say: mirrors and credentials of the daemon's configuration are not used."

// fetch copies what a repository's reference stands for to standard output; as one of this media type, if it is not empty.
func (c *cli) fetch(ctx context.Context, p *registry.Repository, mediaType string) error {
	desc, err := p.Resolve(ctx)
	if err != nil {
		return err
	}
	desc.MediaType = cmp.Or(mediaType, desc.MediaType)
	r, err := p.Fetch(ctx, desc, 0)
	if err != nil {
		return err
	}
	if _, err = io.Copy(c.out, r); err != nil {
		err = fmt.Errorf("cannot copy %s: %w", desc.Digest, err)
	}
	return errors.Join(err, r.Close())
}

func (c *cli) contentFetchObject() *cobra.Command {
	var f registryFlags
	cmd := &cobra.Command{
		Use: "fetch-object [flags] REF", Short: "Write what a registry has as REF, a manifest or an index, to standard output", Args: args(1, 1),
		Long: "Writes the manifest or index REF to standard output, verified by its digest; nothing is stored.\n" + ofRegistry,
		RunE: func(cmd *cobra.Command, given []string) error {
			ref, err := parseReference(cmd, given[0])
			if err != nil {
				return err
			}
			return c.within(cmd, func(ctx context.Context) error {
				return f.withRepository(cmd, c, ref, func(p *registry.Repository) error { return c.fetch(ctx, p, "") })
			})
		},
	}
	f.add(cmd)
	return cmd
}

func (c *cli) contentFetchBlob() *cobra.Command {
	var f registryFlags
	var mediaType string
	cmd := &cobra.Command{
		Use: "fetch-blob [flags] REF DIGEST...", Short: "Write blobs of a registry's repository to standard output", Args: args(2, -1),
		Long: "Writes blobs of REF's repository to standard output, one after the other and verified by their digests; nothing is stored.\n" + ofRegistry,
		RunE: func(cmd *cobra.Command, given []string) error {
			ref, err := parseReference(cmd, given[0])
			if err != nil {
				return err
			}
			var blobs []reference.Named
			for _, g := range given[1:] {
				d, err := parseDigest(cmd, g)
				if err != nil {
					return err
				}
				blob, err := reference.WithDigest(reference.TrimNamed(ref), d)
				if err != nil {
					return misused(cmd, "%w", err)
				}
				blobs = append(blobs, blob)
			}
			if mediaType != "" {
				f.headers = append(f.headers, "Accept: "+mediaType)
			}
			return c.within(cmd, func(ctx context.Context) error {
				for _, b := range blobs {
					if err := f.withRepository(cmd, c, b, func(p *registry.Repository) error { return c.fetch(ctx, p, mediaType) }); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&mediaType, "media-type", "", "media `type` to ask for, and of what is fetched: a manifest's when it is one")
	return cmd
}

func (c *cli) contentPushObject() *cobra.Command {
	var f registryFlags
	cmd := &cobra.Command{
		Use: "push-object [flags] REF DIGEST TYPE", Short: "Push a blob of the store to a registry, as one of a media type", Args: args(3, 3),
		Long: `Pushes a blob to REF's repository; one of a manifest's or index's media type as REF, what it refers to must be there already.
` + ofRegistry,
		RunE: func(cmd *cobra.Command, given []string) error {
			ref, err := parseReference(cmd, given[0])
			if err != nil {
				return err
			}
			d, err := parseDigest(cmd, given[1])
			if err != nil {
				return err
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.Content.Info(ctx, &api.InfoRequest{Digest: d.String()})
				if err != nil {
					return ofBlob(err)
				}
				desc := ocispec.Descriptor{MediaType: given[2], Digest: d, Size: r.Info.Size}
				err = f.withRepository(cmd, c, ref, func(p *registry.Repository) error {
					return p.Push(ctx, desc, &blobAt{ctx: ctx, api: cl.Content, digest: d, size: desc.Size})
				})
				if err != nil {
					return err
				}
				if c.format() == table.JSON {
					return table.PrintJSON(c.out, desc)
				}
				_, err = fmt.Fprintf(c.out, "Pushed %s %s\n", desc.Digest, desc.MediaType)
				return err
			})
		},
	}
	f.add(cmd)
	return cmd
}

// ahead is how much of a blob is asked for at once, in bytes.
const ahead = 4 << 20

// blobAt reads a blob of the store from anywhere.
type blobAt struct {
	ctx    context.Context
	api    api.ContentClient
	digest digest.Digest
	size   int64 // bytes

	mu    sync.Mutex
	start int64  // guarded by mu
	data  []byte // what there is from start on, guarded by mu
}

func (b *blobAt) ReadAt(p []byte, off int64) (n int, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for n < len(p) {
		at := off + int64(n)
		if at >= b.size {
			return n, io.EOF
		}
		if at < b.start || at >= b.start+int64(len(b.data)) {
			if err := b.fillLocked(at); err != nil {
				return n, err
			}
		}
		n += copy(p[n:], b.data[at-b.start:])
	}
	return n, nil
}

func (b *blobAt) fillLocked(at int64) error {
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	b.start, b.data = at, b.data[:0]
	s, err := b.api.Read(ctx, &api.ReadContentRequest{Digest: b.digest.String(), Offset: at, Size: min(ahead, b.size-at)})
	for err == nil {
		var m *api.ReadContentResponse
		if m, err = s.Recv(); err == nil {
			b.data = append(b.data, m.Data...)
		}
	}
	switch {
	case !errors.Is(err, io.EOF):
		return errgrpc.ToNative(err)
	case len(b.data) == 0:
		return io.ErrUnexpectedEOF
	}
	return nil
}
