package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	mountsapi "github.com/containerd/containerd/api/services/mounts/v1"
	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
	"github.com/managerd/managerd/manager/archive"
)

// mountRow is a mount as ctr shows it.
type mountRow struct {
	Type, Source string
	Target       string `json:",omitempty"`
	Options      []string
}

// printMounts prints mounts as JSON, or the commands that mount them on target.
func (c *cli) printMounts(mounts []*types.Mount, target string, asJSON bool) error {
	if asJSON || c.format() == table.JSON {
		return table.PrintJSON(c.out, mountRows(mounts))
	}
	if target == "" {
		return nil
	}
	for _, m := range mounts {
		if _, err := fmt.Fprintf(c.out, "mount -t %s %s %s -o %s\n", m.Type, m.Source, filepath.Join(target, m.Target), strings.Join(m.Options, ",")); err != nil {
			return err
		}
	}
	return nil
}

// withSnapshotter calls f with the name of the snapshotter that is meant.
func (c *cli) withSnapshotter(cmd *cobra.Command, named string, f func(ctx context.Context, cl *client.Client, snapshotter string) error) error {
	return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
		snapshotter, err := cl.DefaultSnapshotter(ctx, c.namespace, named)
		if err != nil {
			return err
		}
		return f(ctx, cl, snapshotter)
	})
}

func (c *cli) snapshotsPrepare(name *string) *cobra.Command {
	return c.makeSnapshot("prepare", "Make a snapshot that can be written to", name, func(ctx context.Context, cl *client.Client, snapshotter, key, parent string) ([]*types.Mount, error) {
		r, err := cl.Snapshots.Prepare(ctx, &api.PrepareSnapshotRequest{Snapshotter: snapshotter, Key: key, Parent: parent, Labels: rooted(map[string]string{})})
		return r.GetMounts(), err
	})
}

func (c *cli) snapshotsView(name *string) *cobra.Command {
	return c.makeSnapshot("view", "Make a snapshot that can only be read", name, func(ctx context.Context, cl *client.Client, snapshotter, key, parent string) ([]*types.Mount, error) {
		r, err := cl.Snapshots.View(ctx, &api.ViewSnapshotRequest{Snapshotter: snapshotter, Key: key, Parent: parent, Labels: rooted(map[string]string{})})
		return r.GetMounts(), err
	})
}

func (c *cli) makeSnapshot(use, short string, name *string, f func(ctx context.Context, cl *client.Client, snapshotter, key, parent string) ([]*types.Mount, error)) *cobra.Command {
	var target string
	var asJSON bool
	cmd := &cobra.Command{
		Use: use + " [flags] KEY [PARENT]", Short: short + ", on a committed one or on nothing", Args: args(1, 2),
		Long: short + `, on top of the committed snapshot PARENT or, without it, empty. It is kept until it is removed, or its label
containerd.io/gc.root is cleared.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			parent := ""
			if len(given) > 1 {
				parent = given[1]
			}
			return c.withSnapshotter(cmd, *name, func(ctx context.Context, cl *client.Client, snapshotter string) error {
				mounts, err := f(ctx, cl, snapshotter, given[0], parent)
				if err != nil {
					return ofSnapshot(err)
				}
				return c.printMounts(mounts, target, asJSON)
			})
		},
	}
	cmd.Flags().StringVarP(&target, "target", "t", "", "print the commands that mount it on `directory`")
	cmd.Flags().BoolVar(&asJSON, "mounts", false, "print its mounts as JSON")
	return cmd
}

func (c *cli) snapshotsCommit(name *string) *cobra.Command {
	return &cobra.Command{
		Use: "commit NAME KEY", Short: "Freeze the snapshot KEY as NAME, on which others can stand", Args: args(2, 2),
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.withSnapshotter(cmd, *name, func(ctx context.Context, cl *client.Client, snapshotter string) error {
				_, err := cl.Snapshots.Commit(ctx, &api.CommitSnapshotRequest{
					Snapshotter: snapshotter, Name: given[0], Key: given[1], Labels: rooted(map[string]string{}),
				})
				return ofSnapshot(err)
			})
		},
	}
}

func (c *cli) snapshotsMounts(name *string) *cobra.Command {
	var temp bool
	cmd := &cobra.Command{
		Use: "mounts [flags] TARGET KEY", Aliases: []string{"m", "mount"}, Short: "Print the commands that mount a snapshot on TARGET", Args: args(2, 2),
		Long: `Prints the commands that mount a snapshot on TARGET. What a client cannot mount by itself, and with --temp all of it, the
daemon mounts: "mctl snapshots unmount KEY" has it take that away again.`,
		Example: `  mctl snapshots mounts /mnt KEY | sh`,
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.withSnapshotter(cmd, *name, func(ctx context.Context, cl *client.Client, snapshotter string) error {
				r, err := cl.Snapshots.Mounts(ctx, &api.MountsRequest{Snapshotter: snapshotter, Key: given[1]})
				if err != nil {
					return ofSnapshot(err)
				}
				mounts, err := activate(ctx, cl, given[1], r.Mounts, temp)
				if err != nil {
					return err
				}
				return c.printMounts(mounts, given[0], false)
			})
		},
	}
	cmd.Flags().BoolVar(&temp, "temp", false, "have the daemon mount it, and print the command that binds that to TARGET")
	return cmd
}

// activation is what the daemon calls what it has mounted of a snapshot for us.
func activation(key string) string { return "mctl-snapshot-" + key }

// activate has the daemon mount what it must of mounts, or with temp all, and gives what is left.
func activate(ctx context.Context, cl *client.Client, key string, mounts []*types.Mount, temp bool) ([]*types.Mount, error) {
	service := mountsapi.NewMountsClient(cl.Conn)
	r, err := service.Activate(ctx, &mountsapi.ActivateRequest{Name: activation(key), Mounts: mounts, Temporary: temp})
	switch {
	case errdefs.IsNotImplemented(err): // there is nothing that the client could not do
		return mounts, nil
	case errdefs.IsAlreadyExists(err):
		r, err := service.Info(ctx, &mountsapi.InfoRequest{Name: activation(key)})
		return r.GetInfo().GetSystem(), err
	}
	return r.GetInfo().GetSystem(), err
}

func (c *cli) snapshotsUnmount() *cobra.Command {
	return &cobra.Command{
		Use: "unmount KEY", Short: "Take away what the daemon has mounted for snapshots mounts", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				_, err := mountsapi.NewMountsClient(cl.Conn).Deactivate(ctx, &mountsapi.DeactivateRequest{Name: activation(given[0])})
				if errdefs.IsNotFound(err) {
					return fmt.Errorf("nothing is mounted of %s: %w", given[0], err)
				}
				return err
			})
		},
	}
}

func (c *cli) snapshotsLabel(name *string) *cobra.Command {
	return &cobra.Command{
		Use: "label KEY [KEY=VALUE...]", Short: "Set labels of a snapshot, or clear those given as KEY=, and print all", Args: args(1, -1),
		RunE: func(cmd *cobra.Command, given []string) error {
			labels, paths, err := labelArgs(given[1:])
			if err != nil {
				return misused(cmd, "%w", err)
			}
			return c.withSnapshotter(cmd, *name, func(ctx context.Context, cl *client.Client, snapshotter string) error {
				if len(paths) == 0 {
					r, err := cl.Snapshots.Stat(ctx, &api.StatSnapshotRequest{Snapshotter: snapshotter, Key: given[0]})
					if err != nil {
						return ofSnapshot(err)
					}
					return c.printLabels(r.Info.Labels)
				}
				r, err := cl.Snapshots.Update(ctx, &api.UpdateSnapshotRequest{
					Snapshotter: snapshotter, Info: &api.Info{Name: given[0], Labels: labels}, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
				})
				if err != nil {
					return ofSnapshot(err)
				}
				return c.printLabels(r.Info.Labels)
			})
		},
	}
}

// unpackedRow is an image that was unpacked.
type unpackedRow struct {
	Name  string `json:"name"`
	Chain string `json:"chain_id"` // the key of the topmost snapshot; empty for an image without layers
}

func (c *cli) snapshotsUnpack(name *string) *cobra.Command {
	cmd := &cobra.Command{
		Use: "unpack DIGEST|NAME", Short: "Unpack an image into snapshots, and print the topmost one's key", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			return c.withSnapshotter(cmd, *name, func(ctx context.Context, cl *client.Client, snapshotter string) error {
				i, err := imageOf(ctx, cl, given[0])
				if err != nil {
					return err
				}
				return cl.Leased(ctx, func(ctx context.Context) error {
					chain, err := archive.Unpack(ctx, cl.Blobs(), cl.Snapshotter(snapshotter), i.Target)
					if err != nil {
						return err
					}
					if c.format() == table.JSON {
						return table.PrintJSON(c.out, unpackedRow{i.Name, chain})
					}
					_, err = fmt.Fprintln(c.out, chain)
					return err
				})
			})
		},
	}
	accepted(cmd, synced, "sync-fs")
	return cmd
}

// imageOf finds an image by its name or by the digest of its target.
func imageOf(ctx context.Context, cl *client.Client, given string) (archive.Image, error) {
	d, err := digest.Parse(given)
	if err != nil {
		return cl.Image(ctx, given)
	}
	r, err := cl.Images.List(ctx, &imagesapi.ListImagesRequest{Filters: []string{"target.digest==" + d.String()}})
	if err != nil {
		return archive.Image{}, err
	}
	if len(r.Images) == 0 {
		return archive.Image{}, ofImage(fmt.Errorf("no image stands for %s: %w", d, errdefs.ErrNotFound))
	}
	return archive.Image{Name: r.Images[0].Name, Target: client.Descriptor(r.Images[0].Target)}, nil
}

func (c *cli) snapshotsDiff(name *string) *cobra.Command {
	var mediaType, ref string
	var keep bool
	var given []string
	cmd := &cobra.Command{
		Use: "diff [flags] KEY [KEY]", Short: "Write what a snapshot adds to its parent, or what makes one into another, as a layer", Args: args(1, 2),
		Long: `Writes a layer to standard output: what KEY adds to its parent or, with two, what makes the first into the second. With
-o json it prints the layer's descriptor instead; with --keep the layer stays in the store. The environment variable
SOURCE_DATE_EPOCH, in seconds, is the time that files which are newer get.`,
		RunE: func(cmd *cobra.Command, keys []string) error {
			labels, _, err := labelArgs(given)
			if err != nil {
				return misused(cmd, "%w", err)
			}
			latest, err := sourceDate()
			if err != nil {
				return err
			}
			if keep {
				rooted(labels)
			}
			return c.withSnapshotter(cmd, *name, func(ctx context.Context, cl *client.Client, snapshotter string) error {
				return cl.Leased(ctx, func(ctx context.Context) error {
					req := &diffapi.DiffRequest{MediaType: mediaType, Ref: ref, Labels: labels, SourceDateEpoch: latest}
					d, err := diffOf(ctx, cl, snapshotter, keys, req)
					if err != nil {
						return err
					}
					if c.format() == table.JSON {
						return table.PrintJSON(c.out, d)
					}
					r, err := cl.Blobs().Open(ctx, d)
					if err != nil {
						return ofBlob(err)
					}
					if _, err = io.Copy(c.out, r); err != nil {
						err = fmt.Errorf("cannot copy %s: %w", d.Digest, err)
					}
					return errors.Join(err, r.Close())
				})
			})
		},
	}
	cmd.Flags().StringVar(&mediaType, "media-type", ocispec.MediaTypeImageLayerGzip, "media `type` of the layer")
	cmd.Flags().StringVar(&ref, "ref", "", "`name` of the write to the store (default: made up)")
	cmd.Flags().BoolVar(&keep, "keep", false, "keep the layer in the store, until it is removed")
	cmd.Flags().StringArrayVar(&given, "label", nil, "`KEY=VALUE` for the layer; may be repeated")
	return cmd
}

// sourceDate is the time of SOURCE_DATE_EPOCH (reproducible-builds.org/docs/source-date-epoch), nil where it is not set.
func sourceDate() (*timestamppb.Timestamp, error) {
	v := os.Getenv("SOURCE_DATE_EPOCH")
	if v == "" {
		return nil, nil
	}
	seconds, err := strconv.ParseInt(v, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("SOURCE_DATE_EPOCH=%q is no number of seconds", v)
	}
	return &timestamppb.Timestamp{Seconds: seconds}, nil
}

// diffOf makes a layer of two snapshots, or of one and its parent.
func diffOf(ctx context.Context, cl *client.Client, snapshotter string, keys []string, req *diffapi.DiffRequest) (_ ocispec.Descriptor, err error) {
	lower, upper := keys[0], keys[len(keys)-1]
	if len(keys) == 1 {
		r, err := cl.Snapshots.Stat(ctx, &api.StatSnapshotRequest{Snapshotter: snapshotter, Key: upper})
		if err != nil {
			return ocispec.Descriptor{}, ofSnapshot(err)
		}
		lower = r.Info.Parent
	}
	for _, side := range []struct {
		key    string
		mounts *[]*types.Mount
	}{{lower, &req.Left}, {upper, &req.Right}} {
		if side.key == "" {
			continue // the parent of one that stands on nothing
		}
		mounts, done, merr := seen(ctx, cl, snapshotter, side.key)
		if merr != nil {
			return ocispec.Descriptor{}, ofSnapshot(merr)
		}
		defer func() { err = errors.Join(err, done()) }()
		*side.mounts = mounts
	}
	r, err := diffapi.NewDiffClient(cl.Conn).Diff(ctx, req)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return client.Descriptor(r.Diff), nil
}

// seen gives the mounts of a snapshot: of a committed one through a view, which done removes.
func seen(ctx context.Context, cl *client.Client, snapshotter, key string) (mounts []*types.Mount, done func() error, err error) {
	r, err := cl.Snapshots.Stat(ctx, &api.StatSnapshotRequest{Snapshotter: snapshotter, Key: key})
	if err != nil {
		return nil, nil, err
	}
	if r.Info.Kind != api.Kind_COMMITTED {
		m, err := cl.Snapshots.Mounts(ctx, &api.MountsRequest{Snapshotter: snapshotter, Key: key})
		return m.GetMounts(), func() error { return nil }, err
	}
	view := fmt.Sprintf("mctl-view-%d-%d %s", os.Getpid(), time.Now().UnixNano(), key)
	v, err := cl.Snapshots.View(ctx, &api.ViewSnapshotRequest{Snapshotter: snapshotter, Key: view, Parent: key})
	return v.GetMounts(), func() error {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleaning)
		defer cancel()
		_, err := cl.Snapshots.Remove(end, &api.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: view})
		return err
	}, err
}
