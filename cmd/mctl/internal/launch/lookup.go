package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/shimapi/mount"
)

// lookIn calls f with a directory where the snapshot chain is mounted, read-only: users have names there.
func lookIn(ctx context.Context, c *client.Client, snapshotter, chain string, f func(root string) error) error {
	return c.Leased(ctx, func(ctx context.Context) (err error) {
		key := fmt.Sprintf("mctl-lookup-%d-%d", os.Getpid(), time.Now().UnixNano())
		view, err := c.Snapshots.View(ctx, &snapshotsapi.ViewSnapshotRequest{Snapshotter: snapshotter, Key: key, Parent: chain})
		if err != nil {
			return err
		}
		defer func() {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleaning)
			defer cancel()
			_, rerr := c.Snapshots.Remove(undo, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: key})
			err = errors.Join(err, rerr)
		}()
		return mounted(view.Mounts, f)
	})
}

// mounted calls f where mounts are seen by f alone: in a mount namespace that ends with its thread, so that nothing stays
// mounted whatever happens.
func mounted(mounts []*types.Mount, f func(root string) error) (err error) {
	dir, err := os.MkdirTemp("", "mctl-root-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("cannot look up the user in the image: %w; run mctl as root, or name the user as UID:GID", os.NewSyscallError("unshare", err))
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return os.NewSyscallError("mount", err)
			}
			if err := mount.Mount(mounts, dir); err != nil {
				return fmt.Errorf("cannot look up the user in the image: %w", err)
			}
			return errors.Join(f(dir), mount.Unmount(dir))
		}()
	}()
	return <-done
}
