// Package devmapper stores each snapshot as a thin device of a device-mapper thin pool, with a whole file system in it. The
// pool is the administrator's; devices are in use (active) only while somebody may mount them.
package devmapper

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/internal/dirs"
	"github.com/managerd/managerd/manager/thinpool"
	records "github.com/managerd/managerd/protos/metadata"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// Name is what the snapshotter is called.
const Name = "devmapper"

const (
	sector = 512
	// numbers bounds how many numbers are tried that somebody else has.
	numbers = 64
	// recording begins the name of a record, below the root, that is being written.
	recording = "new-"
)

// number gives one for a new thin device, from the upper half of the 24 bits that there are: others count from 1. A record
// that is left of a crash may name a device that was not made, which must not be somebody else's.
func number() uint32 { return 1<<23 + rand.Uint32N(1<<23) }

// Options is what the snapshotter can be told.
type Options struct {
	Pool        string   // name of the thin pool; "": the snapshotter is left out
	BaseSize    int64    // bytes of a snapshot without a parent
	AsyncRemove bool     // removals are answered before the device is deleted
	Discard     bool     // blocks are discarded when a device is deleted
	FSType      string   // ext4, ext2 or xfs
	FSOptions   []string // of mkfs
}

// Backend implements snapshots.Backend.
type Backend struct {
	dirs *dirs.Dirs
	dm   dmsetup
	cfg  Options
	mkfs string

	deleting   sync.Mutex // held while one device is deleted: a removal and a sweep may mean the same
	suspending sync.Mutex // held while a device is suspended, so that only a crash leaves one
}

// New keeps its records below root. NotImplemented without a pool in the options, device-mapper in the kernel, or dmsetup;
// nothing is made then.
func New(root string, o Options) (*Backend, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("cannot use devmapper: %w", err)
	}
	if o.Pool == "" {
		return nil, fmt.Errorf("devmapper needs pool_name, a thin pool that is there: %w", errdefs.ErrNotImplemented)
	}
	b := &Backend{cfg: o}
	if b.dm.path, err = exec.LookPath("dmsetup"); err != nil {
		return nil, fmt.Errorf("cannot use devmapper: dmsetup is not installed: %w", errdefs.ErrNotImplemented)
	}
	if err := Supported(); err != nil {
		return nil, err
	}
	if o.BaseSize < 1<<20 {
		return nil, fmt.Errorf("cannot use devmapper: base_image_size %d is too small: %w", o.BaseSize, errdefs.ErrInvalidArgument)
	}
	if b.mkfs, err = exec.LookPath("mkfs." + o.FSType); err != nil {
		return nil, fmt.Errorf("cannot use devmapper: mkfs.%s is not installed: %w", o.FSType, errdefs.ErrNotImplemented)
	}
	if _, err := thinpool.Get(o.Pool); err != nil {
		return nil, fmt.Errorf("cannot use devmapper with thin pool %s: %w", o.Pool, err)
	}
	if b.dirs, err = dirs.OpenWith(root, b.delete); err != nil {
		return nil, err
	}
	if err := b.recover(root); err != nil {
		return nil, err
	}
	return b, nil
}

// Supported is NotImplemented where the kernel has no device-mapper.
func Supported() error {
	f, err := os.OpenFile(thinpool.Control, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("cannot use devmapper: this kernel has no device-mapper: %w: %w", err, errdefs.ErrNotImplemented)
	}
	return f.Close()
}

// name is what containerd calls the device of a snapshot.
func (b *Backend) name(id uint64) string { return fmt.Sprintf("%s-snap-%d", b.cfg.Pool, id) }

func (b *Backend) record(path string) (*records.ThinDevice, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &records.ThinDevice{}
	if err := metadata.Unseal(data, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

func (b *Backend) save(path string, r *records.ThinDevice) error {
	data, err := metadata.Seal(r)
	if err != nil {
		return err
	}
	temp := filepath.Join(filepath.Dir(filepath.Dir(path)), recording+filepath.Base(path))
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Create makes a device: an empty one with a new file system, or one that shares its parent's blocks.
func (b *Backend) Create(ctx context.Context, s snapshots.Snapshot) error {
	before, err := thinpool.Get(b.cfg.Pool)
	if err != nil {
		return err
	}
	if err := before.Usable(); err != nil {
		return err
	}
	path, err := b.dirs.Place(s.ID)
	if err != nil {
		return err
	}
	if err := b.make(ctx, s, path); err != nil {
		if now, perr := thinpool.Get(b.cfg.Pool); perr == nil {
			err = errors.Join(now.Usable(), err)
		}
		return errors.Join(err, b.dirs.Remove(s.ID))
	}
	return nil
}

func (b *Backend) make(ctx context.Context, s snapshots.Snapshot, path string) error {
	r := &records.ThinDevice{Version: 1, Sectors: uint64(b.cfg.BaseSize) / sector}
	create, origin := "create_thin %d", ""
	if len(s.Parents) > 0 {
		parent, err := b.record(b.dirs.Path(s.Parents[0].ID))
		if err != nil {
			return err
		}
		r.Sectors = parent.Sectors
		create, origin = fmt.Sprintf("create_snap %%d %d", parent.Device), b.name(s.Parents[0].ID)
	}
	if err := b.take(path, r, create, origin); err != nil {
		return err
	}
	failpoint.Hit("devmapper.create.made")
	name := b.name(s.ID)
	if err := b.dm.create(ctx, name, b.cfg.Pool, r.Device, r.Sectors); err != nil {
		return err
	}
	if len(s.Parents) == 0 {
		return b.format(ctx, thinpool.Node(name))
	}
	var err error
	if r.Shared, err = thinpool.Mapped(name); err != nil {
		return err
	}
	return b.save(path, r)
}

// take makes a thin device under a number that is free, which it puts into the record first. origin is the device that it is a
// snapshot of, "" for none.
func (b *Backend) take(path string, r *records.ThinDevice, create, origin string) error {
	for try := 0; ; try++ {
		r.Device = number()
		if err := b.save(path, r); err != nil {
			return err
		}
		failpoint.Hit("devmapper.create.noted")
		made := false
		err := b.still(origin, func() error {
			err := thinpool.Message(b.cfg.Pool, fmt.Sprintf(create, r.Device))
			made = err == nil
			return err
		})
		if made {
			return err
		}
		if !errors.Is(err, unix.EEXIST) || try == numbers {
			return errors.Join(err, os.Remove(path)) // the device, should there be one, is not ours to delete
		}
	}
}

// format makes the file system. A thin device reads as zeros, so nothing of it need be cleared.
func (b *Backend) format(ctx context.Context, device string) error {
	tries := [][]string{b.cfg.FSOptions}
	if len(b.cfg.FSOptions) == 0 {
		switch b.cfg.FSType {
		case "ext4", "ext2":
			tries = [][]string{{"-E", "nodiscard,assume_storage_prezeroed=1"}, {"-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"}}
		case "xfs":
			tries = [][]string{{"-K"}}
		}
	}
	var err error
	for _, options := range tries {
		var out []byte
		if out, err = exec.CommandContext(ctx, b.mkfs, append(append([]string{"-q"}, options...), device)...).CombinedOutput(); err == nil {
			failpoint.Hit("devmapper.create.formatted")
			return nil
		}
		err = fmt.Errorf("mkfs.%s %s: %w: %s", b.cfg.FSType, device, err, strings.TrimSpace(string(out)))
	}
	return err
}

// activate makes the device seen, as after a reboot.
func (b *Backend) activate(ctx context.Context, id uint64) (*records.ThinDevice, error) {
	r, err := b.record(b.dirs.Path(id))
	if err != nil {
		return nil, err
	}
	is, err := thinpool.Active(b.name(id))
	if err != nil || is {
		return r, err
	}
	err = b.dm.create(ctx, b.name(id), b.cfg.Pool, r.Device, r.Sectors)
	if is, _ := thinpool.Active(b.name(id)); is { // somebody else was faster
		return r, nil
	}
	return r, err
}

// Mounts gives the mount of the device.
func (b *Backend) Mounts(ctx context.Context, s snapshots.Snapshot) ([]*types.Mount, error) {
	if _, err := b.activate(ctx, s.ID); err != nil {
		return nil, err
	}
	mode := "rw"
	if s.Kind == snapshots.View {
		mode = "ro"
	}
	options := []string{mode}
	if b.cfg.FSType == "xfs" {
		options = append(options, "nouuid") // every snapshot has its parent's
	}
	return []*types.Mount{{Type: b.cfg.FSType, Source: thinpool.Node(b.name(s.ID)), Options: options}}, nil
}

// Usage is how many bytes the device has blocks for that it has not from its parent.
func (b *Backend) Usage(ctx context.Context, s snapshots.Snapshot) (snapshots.Usage, error) {
	r, err := b.activate(ctx, s.ID)
	if err != nil {
		return snapshots.Usage{}, err
	}
	mapped, err := thinpool.Mapped(b.name(s.ID))
	if err != nil {
		return snapshots.Usage{}, err
	}
	return snapshots.Usage{Inodes: 1, Size: int64(mapped-min(mapped, r.Shared)) * sector}, nil
}

// Commit lets go of the device, unless it is still mounted. In a pool that is full there is no commit: of what was written to
// the device some may have been lost, and nobody been told.
func (b *Backend) Commit(ctx context.Context, s snapshots.Snapshot, _ snapshots.Ref) (snapshots.Usage, error) {
	p, err := thinpool.Get(b.cfg.Pool)
	if err == nil {
		err = p.Usable()
	}
	if err != nil {
		return snapshots.Usage{}, err
	}
	u, err := b.Usage(ctx, s)
	if err != nil {
		return u, err
	}
	dev, err := os.Open(thinpool.Node(b.name(s.ID)))
	if err != nil {
		return u, err
	}
	if err := errors.Join(dev.Sync(), dev.Close()); err != nil {
		return u, err
	}
	if err := b.dm.remove(ctx, b.name(s.ID)); err != nil && !errors.Is(err, unix.EBUSY) {
		return u, err
	}
	failpoint.Hit("devmapper.commit.deactivated")
	return u, nil
}

// Defers says whether clients do not wait for devices to be deleted.
func (b *Backend) Defers() bool { return b.cfg.AsyncRemove }

// Remove deletes the device; it fails while that is mounted.
func (b *Backend) Remove(_ context.Context, s snapshots.Snapshot) error { return b.dirs.Remove(s.ID) }

// delete deletes what a record stands for, and then that.
func (b *Backend) delete(path string) error {
	b.deleting.Lock()
	defer b.deleting.Unlock()
	ctx := context.Background()
	r, err := b.record(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	base := filepath.Base(path)
	name := b.cfg.Pool + "-snap-" + base[strings.LastIndexByte(base, '-')+1:]
	if b.cfg.Discard {
		err = b.discard(ctx, name, r)
	}
	if err == nil {
		err = b.dm.remove(ctx, name)
	}
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("device %s is in use, it may be mounted: %w", name, err)
	}
	if err != nil {
		return err
	}
	if err := thinpool.Message(b.cfg.Pool, fmt.Sprint("delete ", r.Device)); err != nil && !errors.Is(err, unix.ENODATA) {
		return err
	}
	failpoint.Hit("devmapper.delete.deleted")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// discard gives the blocks back to whatever the pool stands on.
func (b *Backend) discard(ctx context.Context, name string, r *records.ThinDevice) error {
	is, err := thinpool.Active(name)
	if err == nil && !is {
		err = b.dm.create(ctx, name, b.cfg.Pool, r.Device, r.Sectors)
	}
	if errors.Is(err, unix.ENODATA) {
		return nil // it is deleted already
	}
	if err != nil {
		return err
	}
	dev, err := os.OpenFile(thinpool.Node(name), os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return err
	}
	err = discardAll(int(dev.Fd()), r.Sectors*sector)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = nil
	}
	return errors.Join(err, dev.Close())
}

// Sweep deletes the devices that nobody keeps.
func (b *Backend) Sweep(ctx context.Context, keep func(id uint64) bool) error {
	return b.dirs.Sweep(ctx, keep)
}

// Note keeps a note beside the record, see snapshots.Noter.
func (b *Backend) Note(id uint64, note []byte) error { return b.dirs.Note(id, note) }

// Notes gives the devices that there are, and what was noted of them.
func (b *Backend) Notes(fn func(id uint64, note []byte) error) error { return b.dirs.Notes(fn) }

// Close leaves the devices as they are: containers may stand on them.
func (b *Backend) Close() error { return nil }
