// Package mount makes the mounts that containerd's API describes (types.Mount): the shim for a task's rootfs, the daemon
// to apply and compare layers. It knows mount(2) and its successors, and nothing of snapshots.
package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mount"
	"golang.org/x/sys/unix"
)

// pageLimit is what mount(2) copies of its data argument; longer options go through fsconfig(2).
const pageLimit = 4096

// Mount makes mounts one after the other on target, which must exist. A mount's own Target is a path below it. When
// one fails, those before it are undone.
func Mount(mounts []*types.Mount, target string) error {
	for i, m := range mounts {
		at := target
		if m.Target != "" {
			at = filepath.Join(target, filepath.Join("/", m.Target))
		}
		if err := one(m, at); err != nil {
			if i > 0 {
				_ = Unmount(target)
			}
			return fmt.Errorf("cannot mount %s (type %s, options %s) on %s: %w", m.Source, m.Type, clip(strings.Join(m.Options, ",")), at, err)
		}
	}
	return nil
}

func one(m *types.Mount, at string) error {
	if m.Type == "" {
		return fmt.Errorf("mount has no type: %w", errdefs.ErrInvalidArgument)
	}
	options := m.Options
	if m.Type == "bind" && !has(options, "bind") && !has(options, "rbind") {
		options = append([]string{"bind"}, options...)
	}
	if joined := strings.Join(options, ","); m.Type != "overlay" || len(joined) < pageLimit {
		return mount.Mount(m.Source, at, m.Type, joined)
	}
	return overlay(options, at)
}

// overlay mounts an overlay whose options exceed one page, a layer at a time (fsconfig(2), lowerdir+ since Linux 6.5).
func overlay(options []string, at string) error {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("fsopen", err)
	}
	defer func() { _ = unix.Close(fs) }()
	attr := 0
	for _, o := range options {
		k, v, valued := strings.Cut(o, "=")
		switch {
		case k == "lowerdir":
			for _, dir := range strings.Split(v, ":") {
				if err := unix.FsconfigSetString(fs, "lowerdir+", dir); err != nil {
					return fmt.Errorf("fsconfig lowerdir+=%s: %w", dir, err)
				}
			}
		case valued:
			if err := unix.FsconfigSetString(fs, k, v); err != nil {
				return fmt.Errorf("fsconfig %s: %w", o, err)
			}
		case k == "ro":
			attr |= unix.MOUNT_ATTR_RDONLY
		case k == "rw":
		default:
			if err := unix.FsconfigSetFlag(fs, k); err != nil {
				return fmt.Errorf("fsconfig %s: %w", o, err)
			}
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return os.NewSyscallError("fsconfig create", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return os.NewSyscallError("fsmount", err)
	}
	defer func() { _ = unix.Close(fd) }()
	return os.NewSyscallError("move_mount", unix.MoveMount(fd, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH))
}

// Unmount detaches everything that is mounted on target, top first. Nothing mounted, or no such path, is no error.
func Unmount(target string) error {
	for {
		err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil, errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
			return nil
		default:
			return fmt.Errorf("cannot unmount %s: %w", target, err)
		}
	}
}

// WithTemp mounts on a temporary directory, calls fn with it, and takes it all away again.
func WithTemp(mounts []*types.Mount, fn func(root string) error) (err error) {
	root, err := os.MkdirTemp("", "managerd-mount-")
	if err != nil {
		return fmt.Errorf("cannot make a mount point: %w", err)
	}
	defer func() {
		// Never RemoveAll: should the unmount have failed, it would empty what is mounted.
		if uerr := Unmount(root); uerr != nil {
			err = errors.Join(err, uerr)
			return
		}
		if rerr := os.Remove(root); rerr != nil {
			err = errors.Join(err, rerr)
		}
	}()
	if err := Mount(mounts, root); err != nil {
		return err
	}
	return fn(root)
}

func has(options []string, want string) bool {
	for _, o := range options {
		if o == want {
			return true
		}
	}
	return false
}

func clip(s string) string {
	const most = 512
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}
