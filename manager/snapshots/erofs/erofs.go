// Package erofs stores each committed snapshot as one read-only EROFS image, and active ones as the upper layer of an
// overlay of them. The images are mounted where the layers of the overlayfs snapshotter are, so that whoever mounts gets an
// overlay of directories, as from that.
package erofs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/api/types"
	continuity "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/internal/dirs"
	"github.com/managerd/managerd/manager/snapshots/internal/overlay"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/mount"
)

// Name is what the snapshotter is called.
const Name = "erofs"

// What is in the directory of a snapshot, as containerd has it: fs is the upper layer of an active one, and where the
// image of a committed one is mounted; work is the kernel's scratch.
const (
	upper = "fs"
	work  = "work"
	layer = "layer.erofs"
	spent = "spent" // the upper layer of which the image was made
)

// Options is what the snapshotter can be told.
type Options struct {
	OverlayMount []string // more options for each overlay
}

// Backend implements snapshots.Backend.
type Backend struct {
	dirs.Keeper
	mkfs    string
	options []string

	mu sync.Mutex // held while images are mounted
}

// New stores snapshots below root. NotImplemented where the kernel has no EROFS or mkfs.erofs is not installed; nothing is
// made then.
func New(root string, o Options) (*Backend, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("cannot use erofs: %w", err)
	}
	b := &Backend{options: append(overlay.Needed(), o.OverlayMount...)}
	for _, fstype := range []string{"erofs", "overlay"} {
		fd, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC) // it loads the module
		if err != nil {
			return nil, fmt.Errorf("cannot use erofs: this kernel has no %s: %w: %w", fstype, err, errdefs.ErrNotImplemented)
		}
		_ = unix.Close(fd)
	}
	if b.mkfs, err = findMkfs(); err != nil {
		return nil, fmt.Errorf("cannot use erofs: %w", err)
	}
	if b.Dirs, err = dirs.OpenWith(root, remove); err != nil {
		return nil, err
	}
	return b, nil
}

// flags are those that every image is made with.
var flags = []string{"--quiet", "--preserve-mtime"}

// findMkfs finds the program that makes images. NotImplemented where there is none that takes our flags.
func findMkfs() (string, error) {
	path, err := exec.LookPath("mkfs.erofs")
	if err != nil {
		return "", fmt.Errorf("mkfs.erofs (erofs-utils) is not installed: %w", errdefs.ErrNotImplemented)
	}
	help, err := exec.Command(path, "--help").CombinedOutput() // its exit status differs between versions
	var ended *exec.ExitError
	if err != nil && !errors.As(err, &ended) {
		return "", fmt.Errorf("cannot run %s: %w", path, err)
	}
	for _, flag := range flags {
		if !strings.Contains(string(help), flag) {
			return "", fmt.Errorf("%s is too old: it has no %s (erofs-utils 1.5 does): %w", path, flag, errdefs.ErrNotImplemented)
		}
	}
	return path, nil
}

// remove deletes a snapshot's directory. Overlays that have the image as a layer go on having it.
func remove(path string) error {
	if err := mount.Unmount(filepath.Join(path, upper)); err != nil {
		return err
	}
	return os.RemoveAll(path)
}

func (b *Backend) path(id uint64, name string) string { return filepath.Join(b.Dirs.Path(id), name) }

// Create makes the upper layer, whose attributes are those of the root directory that will be seen.
func (b *Backend) Create(_ context.Context, s snapshots.Snapshot) error {
	mode, uid, gid := uint32(0o755), 0, 0
	if len(s.Parents) > 0 {
		root, err := b.mounted(s.Parents[0].ID)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Stat(root, &st); err != nil {
			return &os.PathError{Op: "stat", Path: root, Err: err}
		}
		mode, uid, gid = st.Mode&0o7777, int(st.Uid), int(st.Gid)
	}
	dir, err := b.Dirs.Make(s.ID)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, upper)
	err = errors.Join(os.Mkdir(path, 0o755), os.Mkdir(filepath.Join(dir, work), 0o711))
	if err == nil {
		err = errors.Join(os.Lchown(path, uid, gid), unix.Chmod(path, mode))
	}
	if err != nil {
		return errors.Join(err, b.Dirs.Remove(s.ID))
	}
	return nil
}

// mounted gives the directory that shows a committed snapshot. Its upper layer is given up now: had the commit not been
// recorded, nobody could ask for it.
func (b *Backend) mounted(id uint64) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	at := b.path(id, upper)
	var st unix.Statfs_t
	err := unix.Statfs(at, &st)
	if err == nil && st.Type == unix.EROFS_SUPER_MAGIC_V1 {
		return at, nil
	}
	if err == nil {
		err = os.Rename(at, b.path(id, spent))
		if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) { // by a crash: what stands there now is the empty mount point
			err = os.Remove(at)
		}
	} else if errors.Is(err, unix.ENOENT) {
		err = nil
	}
	failpoint.Hit("erofs.mount.spent")
	if err == nil {
		err = os.Mkdir(at, 0o755)
	}
	if err == nil {
		err = mount.Mount([]*types.Mount{b.image(id)}, at)
	}
	if err == nil {
		err = os.RemoveAll(b.path(id, spent))
	}
	if err != nil {
		return "", fmt.Errorf("cannot show the layer of snapshot %d: %w", id, err)
	}
	return at, nil
}

// image is the mount of a committed snapshot alone. The kernel takes the file itself (Linux 6.12), or a loop device.
func (b *Backend) image(id uint64) *types.Mount {
	return &types.Mount{Type: "erofs", Source: b.path(id, layer), Options: []string{"ro", "loop"}}
}

// Mounts gives one mount: a bind where there is only one layer to see, an image if it is that of a parent, else an overlay.
func (b *Backend) Mounts(_ context.Context, s snapshots.Snapshot) ([]*types.Mount, error) {
	view := s.Kind == snapshots.View
	bind := func(mode string) []*types.Mount {
		return []*types.Mount{{Type: "bind", Source: b.path(s.ID, upper), Options: []string{mode, "rbind"}}}
	}
	switch {
	case len(s.Parents) == 0 && view:
		return bind("ro"), nil
	case len(s.Parents) == 0:
		return bind("rw"), nil
	case len(s.Parents) == 1 && view:
		return []*types.Mount{b.image(s.Parents[0].ID)}, nil
	}
	lower := make([]string, 0, len(s.Parents))
	for _, p := range s.Parents {
		at, err := b.mounted(p.ID)
		if err != nil {
			return nil, err
		}
		lower = append(lower, mount.Escape(at))
	}
	joined := strings.Join(lower, ":")
	if view {
		return []*types.Mount{overlay.Mount(b.options, "", "", joined)}, nil
	}
	return []*types.Mount{overlay.Mount(b.options, b.path(s.ID, work), b.path(s.ID, upper), joined)}, nil
}

// Usage walks the upper layer.
func (b *Backend) Usage(ctx context.Context, s snapshots.Snapshot) (snapshots.Usage, error) {
	u, err := continuity.DiskUsage(ctx, b.path(s.ID, upper))
	return snapshots.Usage{Inodes: u.Inodes, Size: u.Size}, err
}

// Commit makes an image of the upper layer, which is kept until the image is used: a commit that is not recorded is none.
func (b *Backend) Commit(ctx context.Context, s snapshots.Snapshot, _ snapshots.Ref) (snapshots.Usage, error) {
	u, err := b.Usage(ctx, s)
	if err != nil {
		return u, err
	}
	temp, path := b.path(s.ID, layer+".new"), b.path(s.ID, layer)
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return u, err
	}
	if out, err := exec.CommandContext(ctx, b.mkfs, append(slices.Clone(flags), temp, b.path(s.ID, upper))...).CombinedOutput(); err != nil {
		if strings.Contains(string(out), "No space left on device") {
			err = unix.ENOSPC
		}
		return u, errors.Join(fmt.Errorf("mkfs.erofs: cannot write %s: %w: %s", temp, err, strings.TrimSpace(string(out))), os.Remove(temp))
	}
	f, err := os.Open(temp)
	if err != nil {
		return u, err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return u, err
	}
	failpoint.Hit("erofs.commit.made")
	if err := os.Rename(temp, path); err != nil {
		return u, err
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return u, err
	}
	failpoint.Hit("erofs.commit.placed")
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return u, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	u.Size = st.Blocks * 512
	return u, nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Close leaves the images mounted: containers may stand on them.
func (b *Backend) Close() error { return nil }
