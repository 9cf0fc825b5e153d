// Package mount makes the mounts that containerd's API describes (types.Mount): the shim for a task's rootfs, the daemon
// to apply and compare layers. It knows mount(2) and its successors, and nothing of snapshots. It imports little,
// because a shim's start waits for it.
package mount

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Mount makes mounts one after the other on target, which must exist. A mount's own Target is a path below it, resolved
// inside target whatever symbolic links stand there. When one fails, those before it are undone. The error names
// source, type and options; it wraps InvalidArgument for options that make no sense, else the kernel's errno.
func Mount(mounts []*types.Mount, target string) error {
	for i, m := range mounts {
		err := one(m, target)
		if err == nil {
			continue
		}
		for j := i - 1; j >= 0; j-- {
			if uerr := undo(mounts[j], target); uerr != nil {
				err = errors.Join(err, uerr)
			}
		}
		return err
	}
	return nil
}

func one(m *types.Mount, target string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot mount %s on %s: %w", describe(m), target, err)
		}
	}()
	o, err := parse(m)
	if err != nil {
		return err
	}
	at, err := openTarget(m, target)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(at) }()

	fd, err := detached(m, o)
	switch {
	case err == nil:
		err = unix.MoveMount(fd, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
		_ = unix.Close(fd)
		if err != nil {
			return os.NewSyscallError("move_mount", err)
		}
	case errors.Is(err, errClassic):
		if err := classic(m, o, fdPath(at)); err != nil {
			return err
		}
	default:
		return err
	}
	if o.propagation == 0 {
		return nil
	}
	// Only once it is in place: a mount that joins a shared parent becomes shared.
	err = propagate(m, o, target)
	if err != nil {
		_ = undo(m, target)
	}
	return err
}

func propagate(m *types.Mount, o *options, target string) error {
	at, err := openTarget(m, target)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(at) }()
	return os.NewSyscallError("mount (propagation)", unix.Mount("", fdPath(at), "", o.propagation, ""))
}

// openTarget gives an O_PATH descriptor of where m goes: the top of what is mounted there by now.
func openTarget(m *types.Mount, target string) (int, error) {
	root, err := unix.Open(target, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: target, Err: err}
	}
	if m.Target == "" {
		return root, nil
	}
	defer func() { _ = unix.Close(root) }()
	fd, err := unix.Openat2(root, m.Target, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return -1, &os.PathError{Op: "open target", Path: m.Target, Err: err}
	}
	return fd, nil
}

// undo takes the topmost mount away from where m was put.
func undo(m *types.Mount, target string) error {
	at, err := openTarget(m, target)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(at) }()
	if err := unix.Unmount(fdPath(at), unix.MNT_DETACH); err != nil {
		return fmt.Errorf("cannot unmount %s: %w", describe(m), err)
	}
	return nil
}

// Unmount detaches everything that is mounted on target, top first, with all that is mounted below. Nothing mounted, or
// no such path, is no error.
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

// WithTemp makes mounts where nobody else sees them, calls fn with the root and takes it all away again. root is valid
// in this process, and only until fn returns; it may be a symbolic link, so a walk must start at root + "/". Where the
// kernel can, the mount is attached nowhere: it ends with this process, whatever happens to that. The option volatile is
// left out: who mounts for a moment wants what he writes to last.
func WithTemp(mounts []*types.Mount, fn func(root string) error) error {
	mounts = lasting(mounts)
	if len(mounts) == 1 && mounts[0].Target == "" {
		o, err := parse(mounts[0])
		if err != nil {
			return fmt.Errorf("cannot mount %s: %w", describe(mounts[0]), err)
		}
		fd, err := detached(mounts[0], o)
		if err == nil {
			defer func() { _ = unix.Close(fd) }()
			return fn(fdPath(fd))
		}
		if !errors.Is(err, errClassic) {
			return fmt.Errorf("cannot mount %s: %w", describe(mounts[0]), err)
		}
	}
	return withDir(mounts, fn)
}

func withDir(mounts []*types.Mount, fn func(root string) error) (err error) {
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

func lasting(mounts []*types.Mount) []*types.Mount {
	out := make([]*types.Mount, len(mounts))
	for i, m := range mounts {
		out[i] = m
		if slices.Contains(m.Options, volatile) {
			out[i] = &types.Mount{Type: m.Type, Source: m.Source, Target: m.Target,
				Options: slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == volatile })}
		}
	}
	return out
}

// volatile is overlayfs's option not to sync anything, ever.
const volatile = "volatile"

// ReadOnly says whether writing below m must fail.
func ReadOnly(m *types.Mount) bool {
	ro := false
	for _, o := range m.Options {
		switch o {
		case "ro", "rro":
			ro = true
		case "rw":
			ro = false
		}
	}
	if m.Type == "overlay" && Option(m, "upperdir") == "" {
		return true
	}
	return ro
}

// Option finds the value of the option NAME=value, empty when m has none.
func Option(m *types.Mount, name string) string {
	for _, o := range m.Options {
		if k, v, ok := strings.Cut(o, "="); ok && k == name {
			return v
		}
	}
	return ""
}

func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// describe is m for people, kept short: overlays of many layers have kilobytes of options.
func describe(m *types.Mount) string {
	const most = 512
	s := strings.Join(m.Options, ",")
	if len(s) > most {
		s = s[:most] + "..."
	}
	return fmt.Sprintf("%q (type %q, options %q)", m.Source, m.Type, s)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}
