package overlayfs

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots/internal/overlay"
	"github.com/managerd/managerd/shimapi/mount"
)

// probe finds out with which options overlays can be mounted below root.
func (b *Backend) probe(root string, needed []string) error {
	left, _ := filepath.Glob(filepath.Join(root, "probe-*")) // of a daemon that was killed meanwhile; the pattern is right
	for _, dir := range left {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("cannot use overlayfs: %w", err)
		}
	}
	b.options = needed
	works, err := b.try(root, b.options)
	if err != nil {
		return fmt.Errorf("cannot use overlayfs: %w", err)
	}
	if works != nil {
		return fmt.Errorf("cannot use overlayfs in %s: %w: %w", root, works, errdefs.ErrNotImplemented)
	}
	if len(b.cfg.Mount) > 0 {
		b.options, b.volatile = join(needed, b.cfg.Mount)
		if works, err = b.try(root, b.options); err != nil {
			return fmt.Errorf("cannot use overlayfs: %w", err)
		}
		if works != nil {
			return fmt.Errorf("cannot use overlayfs with mount_options %q: %w: %w", b.cfg.Mount, works, errdefs.ErrInvalidArgument)
		}
	}
	// To be root in the mount the IDs of this process must be mapped, too.
	works, err = b.try(root, append(slices.Clone(b.options), "uidmap=0:0:4294967295", "gidmap=0:0:4294967295"))
	if err != nil {
		return fmt.Errorf("cannot use overlayfs: %w", err)
	}
	b.remaps = works == nil
	return nil
}

// try mounts an overlay below root; works is why that cannot be done. Nobody waits for the unmount, which may have the file system
// write to its disk, and for what follows that.
func (b *Backend) try(root string, options []string) (works, err error) {
	m, use, done, err := trial(root, options)
	if err != nil {
		return nil, err
	}
	result := make(chan error, 2)
	b.probing.Go(func() {
		defer done()
		result <- mount.WithTemp([]*types.Mount{m}, func(root string) error {
			err := use(root)
			result <- err
			return err
		})
	})
	return <-result, nil
}

// room is what a trial that writes needs of the disk, in bytes.
const room = 64 << 10

// trial gives an overlay below root, how to use it when it is mounted, and what takes away what it needs. On a disk that is full
// nothing is written: what is there must be to be had, not least to be removed.
func trial(root string, options []string) (m *types.Mount, use func(root string) error, done func(), err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(root, &fs); err != nil {
		return nil, nil, nil, &os.PathError{Op: "statfs", Path: root, Err: err}
	}
	lowers := func(dir string, names ...string) (lower string) {
		for i, name := range names {
			if i > 0 {
				lower += ":"
			}
			lower += mount.Escape(filepath.Join(dir, name))
		}
		return lower
	}
	have := []string{"snapshots", "notes"}
	if full := fs.Bavail*uint64(fs.Bsize) < room; full && isDir(root, have...) {
		return overlay.Mount(options, "", "", lowers(root, have...)), func(string) error { return nil }, func() {}, nil
	}
	dir, err := os.MkdirTemp(root, "probe-")
	if err != nil {
		return nil, nil, nil, err
	}
	done = func() { _ = os.RemoveAll(dir) }
	for _, d := range []string{"a", "b", upper, work} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			done()
			return nil, nil, nil, err
		}
	}
	m = overlay.Mount(options, filepath.Join(dir, work), filepath.Join(dir, upper), lowers(dir, "a", "b"))
	return m, func(root string) error { return os.WriteFile(filepath.Join(root, "f"), nil, 0o600) }, done, nil
}

func isDir(dir string, names ...string) bool {
	for _, name := range names {
		if fi, err := os.Stat(filepath.Join(dir, name)); err != nil || !fi.IsDir() {
			return false
		}
	}
	return true
}
