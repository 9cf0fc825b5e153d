// Package blockfile stores each snapshot as a file with a whole file system in it, a copy of its parent's. It is for
// runtimes that give a container a block device; others mount it through a loop device.
package blockfile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/internal/dirs"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// Name is what the snapshotter is called.
const Name = "blockfile"

// scratchName is, below the root, the copy of the scratch file that snapshots without a parent are made from.
const scratchName = "scratch"

// Options is what the snapshotter can be told.
type Options struct {
	Scratch  string   // a file with an empty file system; "": the copy that was made before
	Recreate bool     // copy it again at each start
	FSType   string   // what is in it
	Mount    []string // more options for each mount
}

// Backend implements snapshots.Backend.
type Backend struct {
	dirs.Keeper
	cfg     Options
	scratch string
}

// New stores snapshots below root. NotImplemented when there is no scratch file, which is how the snapshotter is switched
// on; nothing is made then.
func New(root string, o Options) (*Backend, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("cannot use blockfile: %w", err)
	}
	b := &Backend{cfg: o, scratch: filepath.Join(root, scratchName)}
	_, err = os.Stat(b.scratch)
	missing := errors.Is(err, fs.ErrNotExist)
	if missing && o.Scratch == "" {
		return nil, fmt.Errorf("blockfile needs scratch_file, a file with an empty %s (truncate -s 10G FILE; mkfs.%s FILE): %w", o.FSType, o.FSType, errdefs.ErrNotImplemented)
	}
	if b.Dirs, err = dirs.Open(root); err != nil {
		return nil, err
	}
	if missing || o.Recreate && o.Scratch != "" {
		if err := b.takeScratch(); err != nil {
			return nil, fmt.Errorf("cannot use blockfile: %w", err)
		}
	}
	return b, nil
}

func (b *Backend) takeScratch() error {
	if st, err := os.Stat(b.cfg.Scratch); err != nil {
		return fmt.Errorf("scratch_file: %w: %w", err, errdefs.ErrInvalidArgument)
	} else if !st.Mode().IsRegular() {
		return fmt.Errorf("scratch_file %s is no regular file: %w", b.cfg.Scratch, errdefs.ErrInvalidArgument)
	}
	temp := b.scratch + ".new"
	if err := copyFile(temp, b.cfg.Scratch); err != nil {
		return err
	}
	return os.Rename(temp, b.scratch)
}

// Create copies the parent's file, or the scratch; a view of a parent needs none, it shows the parent's.
func (b *Backend) Create(_ context.Context, s snapshots.Snapshot) error {
	path, err := b.Dirs.Place(s.ID)
	if err != nil {
		return err
	}
	switch {
	case len(s.Parents) == 0:
		err = copyFile(path, b.scratch)
	case s.Kind == snapshots.View:
		err = os.WriteFile(path, nil, 0o600)
	default:
		err = copyFile(path, b.Dirs.Path(s.Parents[0].ID))
	}
	failpoint.Hit("blockfile.create.copied")
	if err != nil {
		return errors.Join(err, b.Dirs.Remove(s.ID))
	}
	return nil
}

// Mounts gives one mount through a loop device.
func (b *Backend) Mounts(_ context.Context, s snapshots.Snapshot) ([]*types.Mount, error) {
	id, mode := s.ID, "rw"
	if s.Kind == snapshots.View {
		mode = "ro"
		if len(s.Parents) > 0 {
			id = s.Parents[0].ID
		}
	}
	options := append([]string{mode, "loop"}, b.cfg.Mount...)
	return []*types.Mount{{Type: b.cfg.FSType, Source: b.Dirs.Path(id), Options: options}}, nil
}

// Usage is what the file takes on disk.
func (b *Backend) Usage(_ context.Context, s snapshots.Snapshot) (snapshots.Usage, error) {
	var st unix.Stat_t
	path := b.Dirs.Path(s.ID)
	if err := unix.Stat(path, &st); err != nil {
		return snapshots.Usage{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return snapshots.Usage{Inodes: 1, Size: st.Blocks * 512}, nil
}

// Commit leaves the file where it is.
func (b *Backend) Commit(ctx context.Context, s snapshots.Snapshot, _ snapshots.Ref) (snapshots.Usage, error) {
	f, err := os.Open(b.Dirs.Path(s.ID))
	if err != nil {
		return snapshots.Usage{}, err
	}
	err = errors.Join(f.Sync(), f.Close())
	if err != nil {
		return snapshots.Usage{}, err
	}
	return b.Usage(ctx, s)
}
