// Package zfs stores each snapshot as a ZFS file system, a clone of its parent's.
package zfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// Name is what the snapshotter is called.
const Name = "zfs"

// frozen is the ZFS snapshot that a commit makes of a file system, as containerd names it.
const frozen = "@snapshot"

// Backend implements snapshots.Backend.
type Backend struct {
	cli     string
	dataset string // that is mounted on the root
	notes   string // directory
}

// busy is how long a removal waits for the kernel to let go of a file system that nobody has mounted any more: it does so
// behind the end of the last process that saw it.
const busy = 5 * time.Second

// New stores snapshots below the dataset that is mounted on root. NotImplemented where zfs is not installed, or root is no
// mount point of ZFS; nothing is made then.
func New(root string) (*Backend, error) {
	b := &Backend{}
	var err error
	if b.cli, err = exec.LookPath("zfs"); err != nil {
		return nil, fmt.Errorf("cannot use zfs: the command zfs is not installed: %w", errdefs.ErrNotImplemented)
	}
	if root, err = filepath.Abs(root); err != nil {
		return nil, fmt.Errorf("cannot use zfs: %w", err)
	}
	table, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("cannot use zfs: %w", err)
	}
	defer func() { _ = table.Close() }()
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for lines := bufio.NewScanner(table); lines.Scan(); { // proc_pid_mountinfo(5)
		mount, fsys, _ := strings.Cut(lines.Text(), " - ")
		m, s := strings.Fields(mount), strings.Fields(fsys)
		if len(m) > 4 && len(s) > 1 && s[0] == Name && unescape.Replace(m[4]) == root {
			b.dataset = unescape.Replace(s[1])
		}
	}
	if b.dataset == "" {
		return nil, fmt.Errorf("cannot use zfs: no ZFS dataset is mounted on %s: %w", root, errdefs.ErrNotImplemented)
	}
	b.notes = filepath.Join(root, "notes")
	if err := os.MkdirAll(b.notes, 0o700); err != nil {
		return nil, fmt.Errorf("cannot use zfs: %w", err)
	}
	return b, nil
}

// run runs zfs(8).
func (b *Backend) run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, b.cli, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err == nil {
		return string(out), nil
	}
	said := strings.TrimSpace(stderr.String())
	err = fmt.Errorf("zfs %s: %w: %s", strings.Join(args, " "), err, said)
	switch {
	case strings.Contains(said, "does not exist"), strings.Contains(said, "could not find any snapshots"):
		err = errors.Join(err, errdefs.ErrNotFound)
	case strings.Contains(said, "already exists"):
		err = errors.Join(err, errdefs.ErrAlreadyExists)
	case strings.Contains(said, "out of space"):
		err = errors.Join(err, errdefs.ErrResourceExhausted)
	case strings.Contains(said, "is busy"):
		err = errors.Join(err, unix.EBUSY)
	}
	return "", err
}

func (b *Backend) name(id uint64) string { return b.dataset + "/" + strconv.FormatUint(id, 10) }

// Create makes an empty file system, or a clone.
func (b *Backend) Create(ctx context.Context, s snapshots.Snapshot) error {
	args := []string{"create", "-o", "mountpoint=legacy"}
	if len(s.Parents) > 0 {
		args = []string{"clone", "-o", "mountpoint=legacy", b.name(s.Parents[0].ID) + frozen}
	}
	err := b.anew(ctx, append(args, b.name(s.ID)), "-r", b.name(s.ID))
	if err != nil {
		return errors.Join(err, b.Remove(context.WithoutCancel(ctx), s))
	}
	return nil
}

// anew runs what makes something, and once more when a crash has left it there, which is destroyed first.
func (b *Backend) anew(ctx context.Context, args []string, left ...string) error {
	_, err := b.run(ctx, args...)
	if !errdefs.IsAlreadyExists(err) {
		return err
	}
	if _, err := b.run(ctx, append([]string{"destroy"}, left...)...); err != nil {
		return err
	}
	_, err = b.run(ctx, args...)
	return err
}

// Mounts gives the mount of the file system.
func (b *Backend) Mounts(_ context.Context, s snapshots.Snapshot) ([]*types.Mount, error) {
	mode := "rw"
	if s.Kind == snapshots.View {
		mode = "ro"
	}
	return []*types.Mount{{Type: Name, Source: b.name(s.ID), Options: []string{mode}}}, nil
}

// Usage is what the file system takes by itself.
func (b *Backend) Usage(ctx context.Context, s snapshots.Snapshot) (snapshots.Usage, error) {
	out, err := b.run(ctx, "get", "-H", "-p", "-o", "value", "used", b.name(s.ID))
	if err != nil {
		return snapshots.Usage{}, err
	}
	size, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	return snapshots.Usage{Inodes: 1, Size: size}, err
}

// Commit makes a ZFS snapshot, of which children are clones, in place of one that was not recorded.
func (b *Backend) Commit(ctx context.Context, s snapshots.Snapshot, _ snapshots.Ref) (snapshots.Usage, error) {
	snapshot := b.name(s.ID) + frozen
	if err := b.anew(ctx, []string{"snapshot", snapshot}, snapshot); err != nil {
		return snapshots.Usage{}, err
	}
	failpoint.Hit("zfs.commit.frozen")
	return b.Usage(ctx, s)
}

// Remove destroys the file system and the ZFS snapshot of it. It fails while that is mounted.
func (b *Backend) Remove(ctx context.Context, s snapshots.Snapshot) error {
	if err := os.Remove(b.note(s.ID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for deadline := time.Now().Add(busy); ; time.Sleep(20 * time.Millisecond) {
		_, err := b.run(ctx, "destroy", "-r", b.name(s.ID))
		switch {
		case err == nil, errdefs.IsNotFound(err):
			return nil
		case !errors.Is(err, unix.EBUSY), ctx.Err() != nil, time.Now().After(deadline):
			return err
		}
	}
}

// Sweep destroys the file systems that nobody keeps, clones before what they are of.
func (b *Backend) Sweep(ctx context.Context, keep func(id uint64) bool) error {
	ids, err := b.IDs(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for i := len(ids) - 1; i >= 0; i-- { // a child has a higher ID
		if !keep(ids[i]) {
			errs = append(errs, b.Remove(ctx, snapshots.Snapshot{Ref: snapshots.Ref{ID: ids[i]}}))
		}
	}
	return errors.Join(errs...)
}

// Close has nothing to do.
func (b *Backend) Close() error { return nil }
