package command

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/metadata"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/shimapi/mount"
)

func (c *cli) imagesMount() *cobra.Command {
	var rw bool
	var snapshotter, platform string
	var kept time.Duration
	cmd := &cobra.Command{
		Use: "mount [flags] NAME TARGET", Short: "Mount the files of an image", Args: args(2, 2),
		Long: `Mounts an image's files on TARGET, a directory, to be looked at or, with --rw, written to: in a snapshot that is called
TARGET, and that a lease of the same name keeps. "mctl images unmount --rm" takes both away.`,
		RunE: func(cmd *cobra.Command, given []string) error {
			target, err := filepath.Abs(given[1])
			if err != nil {
				return err
			}
			want := platforms.DefaultSpec()
			if platform != "" {
				list, err := parsePlatforms(cmd, []string{platform})
				if err != nil {
					return err
				}
				want = list[0]
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				name, err := cl.DefaultSnapshotter(ctx, c.namespace, snapshotter)
				if err != nil {
					return err
				}
				i, err := cl.Image(ctx, given[0])
				if err != nil {
					return err
				}
				if err := mountImage(ctx, cl, name, i, want, target, rw, kept); err != nil {
					return fmt.Errorf("cannot mount %s: %w", i.Name, err)
				}
				_, err = fmt.Fprintln(c.out, target)
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&rw, "rw", false, "let it be written to")
	cmd.Flags().DurationVarP(&kept, "expiration", "x", 24*time.Hour, "`time` for which its snapshot is kept")
	cmd.Flags().StringVar(&platform, "platform", "", "`OS/ARCH` whose image is mounted (default: this machine's)")
	cmd.Flags().StringVar(&snapshotter, "snapshotter", "", "`name` of the snapshotter")
	accepted(cmd, synced, "sync-fs")
	accepted(cmd, "no registry is asked, nor does ctr ask one", flagsOfRegistry...)
	accepted(cmd, "no label is set, nor does ctr set one", "label=")
	return cmd
}

func mountImage(ctx context.Context, cl *client.Client, snapshotter string, i archive.Image, want ocispec.Platform, target string, rw bool, kept time.Duration) (err error) {
	expire := time.Now().Add(kept).UTC().Format(time.RFC3339)
	_, err = cl.Leases.Create(ctx, &leasesapi.CreateRequest{ID: target, Labels: map[string]string{
		"containerd.io/gc.expire": expire, "containerd.io/gc.ref.snapshot." + snapshotter: target,
	}})
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	made := err == nil
	leased := metadata.AppendToOutgoingContext(ctx, "containerd-lease", target)
	prepared := false
	defer func() {
		if err == nil {
			return
		}
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleaning)
		defer cancel()
		if prepared {
			_, rerr := cl.Snapshots.Remove(end, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: target})
			err = errors.Join(err, rerr)
		}
		if made {
			_, lerr := cl.Leases.Delete(end, &leasesapi.DeleteRequest{ID: target})
			err = errors.Join(err, lerr)
		}
	}()
	chain, err := archive.UnpackPlatform(leased, cl.Blobs(), cl.Snapshotter(snapshotter), i.Target, want)
	if err != nil {
		return err
	}
	var mounts []*types.Mount
	if rw {
		r, perr := cl.Snapshots.Prepare(leased, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: snapshotter, Key: target, Parent: chain})
		mounts, err = r.GetMounts(), perr
	} else {
		r, verr := cl.Snapshots.View(leased, &snapshotsapi.ViewSnapshotRequest{Snapshotter: snapshotter, Key: target, Parent: chain})
		mounts, err = r.GetMounts(), verr
	}
	if errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("%w; `mctl images unmount --rm %s` takes it away", err, target)
	}
	if err != nil {
		return err
	}
	prepared = true
	return mount.Mount(mounts, target)
}

func (c *cli) imagesUnmount() *cobra.Command {
	var rm bool
	var snapshotter string
	cmd := &cobra.Command{
		Use: "unmount [flags] TARGET", Short: "Unmount the files of an image", Args: args(1, 1),
		RunE: func(cmd *cobra.Command, given []string) error {
			target, err := filepath.Abs(given[0])
			if err != nil {
				return err
			}
			if err := mount.Unmount(target); err != nil {
				return err
			}
			if !rm {
				_, err := fmt.Fprintln(c.out, target)
				return err
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				name, err := cl.DefaultSnapshotter(ctx, c.namespace, snapshotter)
				if err != nil {
					return err
				}
				_, err = cl.Snapshots.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: name, Key: target})
				if err != nil && !errdefs.IsNotFound(err) {
					return fmt.Errorf("cannot remove the snapshot of %s: %w", target, err)
				}
				if _, err := cl.Leases.Delete(ctx, &leasesapi.DeleteRequest{ID: target}); err != nil && !errdefs.IsNotFound(err) {
					return fmt.Errorf("cannot end the lease of %s: %w", target, err)
				}
				_, err = fmt.Fprintln(c.out, target)
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&rm, "rm", false, "remove its snapshot, with what was written")
	cmd.Flags().StringVar(&snapshotter, "snapshotter", "", "`name` of the snapshotter")
	accepted(cmd, "no registry is asked, nor does ctr ask one", flagsOfRegistry...)
	accepted(cmd, "no label is set, nor does ctr set one", "label=")
	return cmd
}
