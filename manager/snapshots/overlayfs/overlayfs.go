// Package overlayfs stores snapshots as layers of an overlay: a directory per snapshot, in which fs holds what that
// snapshot changed (deletions as overlayfs marks them) and work is the kernel's scratch. Nothing is copied or mounted
// to make one.
package overlayfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/api/types"
	continuity "github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/internal/dirs"
	"github.com/managerd/managerd/manager/snapshots/internal/overlay"
	"github.com/managerd/managerd/shimapi/mount"
)

// Name is what the snapshotter is called.
const Name = "overlayfs"

const upper, work = "fs", "work"

// Backend implements snapshots.Backend.
type Backend struct {
	dirs.Keeper
	cfg      Options
	options  []string // that every overlay mount gets
	volatile bool     // active ones that is added to
	remaps   bool     // the kernel shows layers with other IDs
	boot     string   // the file with the ID of this boot

	probing sync.WaitGroup // ends of mounts that were only tried
}

// New stores snapshots below root. NotImplemented when overlayfs does not work there, InvalidArgument when it does not
// with the options asked for; root is then left as it was.
func New(root string, o Options) (*Backend, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("cannot use overlayfs: %w", err)
	}
	if err := o.checked(); err != nil {
		return nil, fmt.Errorf("cannot use overlayfs: %w", err)
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("cannot use overlayfs: %w", err)
	}
	b := &Backend{cfg: o, boot: bootID}
	if err := b.probe(root, overlay.Needed()); err != nil {
		b.probing.Wait()
		return nil, err
	}
	if b.Dirs, err = dirs.Open(root); err != nil {
		return nil, err
	}
	return b, nil
}

// Close waits for the end of what New has tried.
func (b *Backend) Close() error {
	b.probing.Wait()
	return b.Keeper.Close()
}

func (b *Backend) fs(id uint64) string { return filepath.Join(b.Dirs.Path(id), upper) }

// Create makes fs, whose attributes are those of the root directory that will be seen, and work.
func (b *Backend) Create(_ context.Context, s snapshots.Snapshot) error {
	mode, uid, gid := uint32(0o755), 0, 0
	if len(s.Parents) > 0 {
		var st unix.Stat_t
		if err := unix.Stat(b.fs(s.Parents[0].ID), &st); err != nil {
			return &os.PathError{Op: "stat", Path: b.fs(s.Parents[0].ID), Err: err}
		}
		mode, uid, gid = st.Mode&0o7777, int(st.Uid), int(st.Gid)
	}
	if s.Kind == snapshots.Active && len(s.Parents) > 0 { // without parents it is a bind, of which all is mapped
		var err error
		if uid, gid, err = b.remapped(s, uid, gid); err != nil {
			return err
		}
	}
	dir, err := b.Dirs.Make(s.ID)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, upper)
	err = os.Mkdir(path, 0o755)
	if err == nil && uid|gid != 0 {
		err = os.Lchown(path, uid, gid)
	}
	if err == nil {
		err = unix.Chmod(path, mode) // the umask is not ours
	}
	if err == nil && s.Kind == snapshots.Active {
		err = os.Mkdir(filepath.Join(dir, work), 0o711)
	}
	if err != nil {
		return errors.Join(err, b.Dirs.Remove(s.ID))
	}
	return nil
}

// Mounts gives one mount: a bind where there is only one layer to see, else an overlay.
func (b *Backend) Mounts(_ context.Context, s snapshots.Snapshot) ([]*types.Mount, error) {
	remap := b.remapOptions(s.Labels)
	bind := func(id uint64, mode string) []*types.Mount {
		return []*types.Mount{{Type: "bind", Source: b.fs(id), Options: append([]string{mode, "rbind"}, remap...)}}
	}
	view := s.Kind == snapshots.View
	switch {
	case len(s.Parents) == 0 && view:
		return bind(s.ID, "ro"), nil
	case len(s.Parents) == 0:
		return bind(s.ID, "rw"), nil
	case len(s.Parents) == 1 && view:
		return bind(s.Parents[0].ID, "ro"), nil
	}
	lower := make([]string, 0, len(s.Parents))
	for _, p := range s.Parents {
		lower = append(lower, mount.Escape(b.fs(p.ID)))
	}
	options, joined := append(slices.Clone(b.options), remap...), strings.Join(lower, ":")
	if view {
		return []*types.Mount{overlay.Mount(options, "", "", joined)}, nil
	}
	if err := b.fresh(s.ID); err != nil {
		return nil, err
	}
	if b.volatile {
		options = append(options, volatile)
	}
	return []*types.Mount{overlay.Mount(options, filepath.Join(b.Dirs.Path(s.ID), work), b.fs(s.ID), joined)}, nil
}

// Labels tells where the snapshot's own files are, if that is asked for.
func (b *Backend) Labels(id uint64) map[string]string {
	if !b.cfg.UpperdirLabel {
		return nil
	}
	return map[string]string{LabelUpper: b.fs(id)}
}

// Defers says that clients do not wait for files to be deleted.
func (b *Backend) Defers() bool { return !b.cfg.SyncRemove }

// Usage walks fs.
func (b *Backend) Usage(ctx context.Context, s snapshots.Snapshot) (snapshots.Usage, error) {
	u, err := continuity.DiskUsage(ctx, b.fs(s.ID))
	return snapshots.Usage{Inodes: u.Inodes, Size: u.Size}, err
}

// Commit has nothing to move: a directory becomes a lower one by being mounted so.
func (b *Backend) Commit(ctx context.Context, s snapshots.Snapshot, _ snapshots.Ref) (snapshots.Usage, error) {
	return b.Usage(ctx, s)
}
