// Package native stores each snapshot as a full copy of its parent, in a plain directory: slow and large, and it works
// on every file system.
package native

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/types"
	continuity "github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/internal/dirs"
)

// Name is what the snapshotter is called.
const Name = "native"

// Backend implements snapshots.Backend.
type Backend struct {
	dirs.Keeper
}

// New stores snapshots below root.
func New(root string) (*Backend, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("cannot open native snapshotter: %w", err)
	}
	d, err := dirs.Open(root)
	if err != nil {
		return nil, err
	}
	return &Backend{Keeper: dirs.Keeper{Dirs: d}}, nil
}

// Create copies the parent; a view needs no copy, it shows the parent itself.
func (b *Backend) Create(_ context.Context, s snapshots.Snapshot) error {
	path, err := b.Dirs.Make(s.ID)
	if err != nil {
		return err
	}
	err = os.Chmod(path, 0o755)
	if err == nil && s.Kind == snapshots.Active && len(s.Parents) > 0 {
		parent := b.Dirs.Path(s.Parents[0].ID)
		if err = copyTree(path, parent); err != nil {
			err = fmt.Errorf("cannot copy %s to %s: %w", parent, path, err)
		}
	}
	if err != nil {
		return errors.Join(err, b.Dirs.Remove(s.ID))
	}
	return nil
}

// copyTree copies a directory. CopyDir leaves directories with the time of the copy, and makes several files of a symbolic
// link, device or FIFO with several names.
func copyTree(dst, src string) error {
	if err := continuity.CopyDir(dst, src); err != nil {
		return err
	}
	type inode struct{ dev, ino uint64 }
	first := map[inode]string{} // name of a file with several, in the copy
	return filepath.WalkDir(src, func(from string, e fs.DirEntry, err error) error {
		if err != nil || e.Type().IsRegular() {
			return err
		}
		to := dst + strings.TrimPrefix(from, src)
		var st unix.Stat_t
		if err := unix.Lstat(from, &st); err != nil {
			return &os.PathError{Op: "stat", Path: from, Err: err}
		}
		if e.IsDir() {
			err := unix.UtimesNanoAt(unix.AT_FDCWD, to, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
			if err != nil {
				return &os.PathError{Op: "utimensat", Path: to, Err: err}
			}
			return nil
		}
		if st.Nlink < 2 {
			return nil
		}
		i := inode{uint64(st.Dev), st.Ino}
		if first[i] == "" {
			first[i] = to
			return nil
		}
		return again(first[i], to)
	})
}

// again makes name, which is there already, one more name of file, and leaves its directory the time that it has.
func again(file, name string) error {
	dir := filepath.Dir(name)
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	if err := errors.Join(os.Remove(name), os.Link(file, name)); err != nil {
		return err
	}
	return os.NewSyscallError("utimensat", unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW))
}

// Mounts gives one bind mount.
func (b *Backend) Mounts(_ context.Context, s snapshots.Snapshot) ([]*types.Mount, error) {
	id, mode := s.ID, "rw"
	if s.Kind == snapshots.View {
		mode = "ro"
		if len(s.Parents) > 0 {
			id = s.Parents[0].ID
		}
	}
	return []*types.Mount{{Type: "bind", Source: b.Dirs.Path(id), Options: []string{"rbind", mode}}}, nil
}

// Usage walks the copy: all of it is this snapshot's own.
func (b *Backend) Usage(ctx context.Context, s snapshots.Snapshot) (snapshots.Usage, error) {
	u, err := continuity.DiskUsage(ctx, b.Dirs.Path(s.ID))
	return snapshots.Usage{Inodes: u.Inodes, Size: u.Size}, err
}

// Commit leaves the directory where it is.
func (b *Backend) Commit(ctx context.Context, s snapshots.Snapshot, _ snapshots.Ref) (snapshots.Usage, error) {
	return b.Usage(ctx, s)
}
