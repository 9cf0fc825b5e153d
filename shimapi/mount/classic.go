package mount

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/api/types"
	"golang.org/x/sys/unix"
)

// pageLimit is what mount(2) copies of its data argument, with the NUL that ends it.
const pageLimit = 4096

// classic mounts with mount(2).
func classic(m *types.Mount, o *options, at string) error {
	if o.deep != 0 {
		return invalid("recursive options need mount_setattr(2), Linux 5.12")
	}
	if o.ids != nil && m.Type != "overlay" {
		return invalid("IDs cannot be mapped of this mount: it is no bind and no overlay, or has options that mount(2) alone knows")
	}
	if o.bind {
		flags := uintptr(unix.MS_BIND)
		if o.recursive {
			flags |= unix.MS_REC
		}
		if err := unix.Mount(m.Source, at, "", flags, ""); err != nil {
			return os.NewSyscallError("mount (bind)", err)
		}
		if o.set == 0 {
			return nil
		}
		return restrict(at, o.set)
	}
	if m.Type == "overlay" && o.ids != nil {
		return classicMapped(m, o, at)
	}
	if !o.loop {
		return device(m.Source, m.Type, o, at)
	}
	if m.Type == "erofs" { // it takes the file itself (Linux 6.12)
		err := classicData(m.Source, m.Type, at, o.set, o.data)
		if !errors.Is(err, unix.ENOTBLK) {
			return err
		}
	}
	readonly := o.set&unix.MS_RDONLY != 0
	if readonly {
		// While the file is mounted writable, what is in it is to be seen through that device only.
		if used := attached(m.Source); used != "" && device(used, m.Type, o, at) == nil {
			return nil
		}
	}
	dev, err := loop(m.Source, readonly)
	if err != nil {
		return err
	}
	defer func() { _ = dev.Close() }()
	return device(dev.Name(), m.Type, o, at)
}

// restrict gives flags to the mount that was just made at, and to no other one of its file system.
func restrict(at string, flags uintptr) error {
	// at names what lies below the new mount: go through the path anew to reach it.
	path, err := os.Readlink(at)
	if err != nil {
		return err
	}
	if err = unix.Mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|flags, ""); err != nil {
		_ = unix.Unmount(path, unix.MNT_DETACH)
	}
	return os.NewSyscallError("mount (remount of bind)", err)
}

// device mounts what source names. One that is to be read-only and is mounted writable elsewhere, for which the kernel says
// EBUSY, shows the same file system, and this mount alone is read-only.
func device(source, typ string, o *options, at string) error {
	err := classicData(source, typ, at, o.set, o.data)
	if o.set&unix.MS_RDONLY == 0 || !errors.Is(err, unix.EBUSY) || classicData(source, typ, at, o.set&^unix.MS_RDONLY, o.data) != nil {
		return err
	}
	return restrict(at, o.set)
}

// classicMapped is classic for an overlay whose lower layers are shown with other IDs.
func classicMapped(m *types.Mount, o *options, at string) error {
	var dirs, data []string
	for _, opt := range o.data {
		if v, ok := strings.CutPrefix(opt, "lowerdir="); ok {
			dirs = Layers(v)
		} else {
			data = append(data, opt)
		}
	}
	return o.ids.attached(dirs, func(paths []string) error {
		return classicData(m.Source, m.Type, at, o.set, append(data, "lowerdir="+strings.Join(paths, ":")))
	})
}

func classicData(source, typ, at string, flags uintptr, data []string) error {
	if len(strings.Join(data, ",")) >= pageLimit && typ == "overlay" {
		short, closeAll, err := shorten(data)
		if err != nil {
			return err
		}
		defer closeAll()
		data = short
	}
	joined := strings.Join(data, ",")
	if len(joined) >= pageLimit {
		return invalid("options have %d bytes, the kernel takes %d", len(joined), pageLimit-1)
	}
	return os.NewSyscallError("mount", unix.Mount(source, at, typ, flags, joined))
}

// shorten names the layers of an overlay by descriptors, so that hundreds of them fit into one page. The caller calls
// closeAll once they are mounted.
func shorten(data []string) (short []string, closeAll func(), err error) {
	var fds []int
	closeAll = func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}
	for _, opt := range data {
		k, v, _ := strings.Cut(opt, "=")
		if k != "lowerdir" {
			short = append(short, opt)
			continue
		}
		var layers []string
		for _, dir := range Layers(v) {
			fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				closeAll()
				return nil, nil, fmt.Errorf("lowerdir %s: %w", dir, err)
			}
			fds = append(fds, fd)
			layers = append(layers, fdPath(fd))
		}
		short = append(short, "lowerdir="+strings.Join(layers, ":"))
	}
	return short, closeAll, nil
}
