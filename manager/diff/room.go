package diff

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/types"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/thinpool"
	"github.com/managerd/managerd/shimapi/mount"
)

// noRoom adds to the error of a disk that is full where that is. A file or a thin device that is mounted, and for whose blocks
// there is no room, fails with EIO.
func noRoom(m *types.Mount, err error) error {
	full := errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
	at := m.Source
	fi, serr := os.Stat(m.Source)
	switch {
	case m.Type == "overlay":
		at = mount.Layers(mount.Option(m, "upperdir"))[0]
	case serr == nil && fi.Mode()&os.ModeDevice != 0:
		if full || broken(err) {
			if perr := thinpool.Full(m.Source); perr != nil {
				return fmt.Errorf("%w: %w", perr, err)
			}
		}
		if dir := mountedOn(m.Source); dir != "" {
			at = fmt.Sprintf("%s (%s)", dir, m.Source)
		}
	case serr == nil && fi.Mode().IsRegular() && !full:
		var fs unix.Statfs_t
		if unix.Statfs(filepath.Dir(m.Source), &fs) == nil && fs.Bavail*uint64(fs.Bsize) < 1<<20 && broken(err) {
			full, err = true, fmt.Errorf("%w: %w", unix.ENOSPC, err)
		}
	}
	if !full {
		return err
	}
	return fmt.Errorf("%s is full: %w", at, err)
}

// broken tells whether a file system has given up.
func broken(err error) bool { return errors.Is(err, unix.EIO) || errors.Is(err, unix.EROFS) }

// mountedOn is where a device is mounted, "" for nowhere.
func mountedOn(device string) string {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(mounts)) {
		left, right, _ := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if len(l) > 4 && len(r) > 1 && r[1] == device {
			return l[4]
		}
	}
	return ""
}
