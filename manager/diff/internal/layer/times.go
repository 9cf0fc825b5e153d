package layer

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

type dirTimes struct {
	path         string
	atime, mtime time.Time
	inode        inode // of a directory that was there before
}

// keep remembers the times of a directory in which something is about to change. One that is not there yet, nor in the
// layer, gets the time of what is made in it first.
func (a *applier) keep(p string, made time.Time) {
	for {
		if _, ok := a.touched[p]; ok {
			return
		}
		fd, err := a.root.dir(p, false)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return // making something there fails, too
		}
		a.touched[p] = struct{}{}
		if err == nil {
			var st unix.Stat_t
			if unix.Fstat(fd, &st) == nil {
				a.kept = append(a.kept, dirTimes{p, time.Unix(st.Atim.Unix()), time.Unix(st.Mtim.Unix()), inodeOf(&st)})
			}
			return
		}
		a.kept = append(a.kept, dirTimes{path: p, atime: made, mtime: made})
		p = parentOf(p)
	}
}

func setTimes(at int, base string, atime, mtime time.Time) error {
	ts := []unix.Timespec{{Sec: atime.Unix(), Nsec: int64(atime.Nanosecond())}, {Sec: mtime.Unix(), Nsec: int64(mtime.Nanosecond())}}
	return os.NewSyscallError("utimensat", unix.UtimesNanoAt(at, base, ts, unix.AT_SYMLINK_NOFOLLOW))
}

// finish sets the times of directories, which making files in them has changed.
func (a *applier) finish() error {
	for _, d := range slices.Backward(a.kept) { // by two names, a directory has the times that were seen first
		if err := a.restore(d); err != nil {
			return fmt.Errorf("directory %q: %w", d.path, err)
		}
	}
	for i := len(a.dirs) - 1; i >= 0; i-- {
		d := a.dirs[i]
		parent, base := split(d.path)
		if base == "" {
			base = "."
		}
		at, err := a.root.dir(parent, false)
		if err == nil {
			var st unix.Stat_t
			if err = unix.Fstatat(at, base, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
				err = setTimes(at, base, d.atime, d.mtime)
			}
		}
		if err != nil && !gone(err) {
			return fmt.Errorf("layer entry %q: %w", d.path, err)
		}
	}
	return nil
}

// restore sets the times of a directory that is not in the layer, unless another one stands there by now.
func (a *applier) restore(d dirTimes) error {
	fd, err := a.root.dir(d.path, false)
	if err != nil {
		if gone(err) {
			return nil
		}
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("stat", err)
	}
	if d.inode != (inode{}) && d.inode != inodeOf(&st) {
		return nil
	}
	return setTimes(fd, ".", d.atime, d.mtime)
}

// gone tells whether a later entry has taken a directory away.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}
