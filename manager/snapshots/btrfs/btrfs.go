// Package btrfs stores each snapshot as a subvolume, which shares with its parent what it has not changed.
package btrfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/types"
	continuity "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/internal/dirs"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// Name is what the snapshotter is called.
const Name = "btrfs"

// Backend implements snapshots.Backend.
type Backend struct {
	dirs.Keeper
	device string // that the file system is mounted from
}

// New stores snapshots below root. NotImplemented when that is not on btrfs; nothing is made there then.
func New(root string) (*Backend, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("cannot use btrfs: %w", err)
	}
	there := root
	var st unix.Statfs_t
	for err = unix.Statfs(there, &st); errors.Is(err, unix.ENOENT); err = unix.Statfs(there, &st) {
		there = filepath.Dir(there)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot use btrfs: %w", &os.PathError{Op: "statfs", Path: there, Err: err})
	}
	if st.Type != unix.BTRFS_SUPER_MAGIC {
		return nil, fmt.Errorf("%s is not on a btrfs file system: %w", root, errdefs.ErrNotImplemented)
	}
	d, err := dirs.OpenWith(root, destroy)
	if err != nil {
		return nil, err
	}
	b := &Backend{Keeper: dirs.Keeper{Dirs: d}}
	if b.device, err = device(root); err != nil {
		return nil, fmt.Errorf("cannot use btrfs: %w", err)
	}
	return b, nil
}

// device finds what the file system of path is mounted from: the mount that is nearest above it (proc_pid_mountinfo(5)).
func device(path string) (string, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	found, nearest := "", -1
	for lines := bufio.NewScanner(f); lines.Scan(); {
		mount, fsys, _ := strings.Cut(lines.Text(), " - ")
		m, s := strings.Fields(mount), strings.Fields(fsys)
		if len(m) < 5 || len(s) < 2 || s[0] != Name {
			continue
		}
		at := unescape.Replace(m[4])
		if (path == at || at == "/" || strings.HasPrefix(path, at+"/")) && len(at) >= nearest {
			found, nearest = unescape.Replace(s[1]), len(at)
		}
	}
	if found == "" {
		return "", fmt.Errorf("no mount of a btrfs file system is known above %s: %w", path, errdefs.ErrNotFound)
	}
	return found, nil
}

// Create makes a subvolume; that of a view cannot be written.
func (b *Backend) Create(_ context.Context, s snapshots.Snapshot) error {
	path, err := b.Dirs.Place(s.ID)
	if err != nil {
		return err
	}
	view := s.Kind == snapshots.View
	if len(s.Parents) > 0 {
		err = snapshot(path, b.Dirs.Path(s.Parents[0].ID), view)
	} else if err = create(path); err == nil {
		if err = os.Chmod(path, 0o755); err == nil && view {
			err = setReadOnly(path, true)
		}
	}
	if err != nil {
		return errors.Join(err, b.Dirs.Remove(s.ID))
	}
	return nil
}

// Mounts gives a mount of the subvolume by its number.
func (b *Backend) Mounts(_ context.Context, s snapshots.Snapshot) ([]*types.Mount, error) {
	path := b.Dirs.Path(s.ID)
	if s.Kind == snapshots.Active { // a commit that was not recorded has frozen it
		if err := setReadOnly(path, false); err != nil {
			return nil, err
		}
	}
	id, err := subvolID(path)
	if err != nil {
		return nil, err
	}
	options := []string{fmt.Sprint("subvolid=", id)}
	if s.Kind == snapshots.View {
		options = append(options, "ro")
	}
	return []*types.Mount{{Type: Name, Source: b.device, Options: options}}, nil
}

// Usage walks the subvolume and its parent: what is in both counts for the parent.
func (b *Backend) Usage(ctx context.Context, s snapshots.Snapshot) (snapshots.Usage, error) {
	var u continuity.Usage
	var err error
	if len(s.Parents) > 0 {
		u, err = continuity.DiffUsage(ctx, b.Dirs.Path(s.Parents[0].ID), b.Dirs.Path(s.ID))
	} else {
		u, err = continuity.DiskUsage(ctx, b.Dirs.Path(s.ID))
	}
	return snapshots.Usage{Inodes: u.Inodes, Size: u.Size}, err
}

// Commit makes the subvolume read-only.
func (b *Backend) Commit(ctx context.Context, s snapshots.Snapshot, _ snapshots.Ref) (snapshots.Usage, error) {
	u, err := b.Usage(ctx, s)
	if err != nil {
		return u, err
	}
	err = setReadOnly(b.Dirs.Path(s.ID), true)
	failpoint.Hit("btrfs.commit.frozen")
	return u, err
}
