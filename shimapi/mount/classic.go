package mount

import (
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
		// at names what lies below the new mount: go through the path anew to reach it.
		path, err := os.Readlink(at)
		if err != nil {
			return err
		}
		if err = unix.Mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|o.set, ""); err != nil {
			_ = unix.Unmount(path, unix.MNT_DETACH)
		}
		return os.NewSyscallError("mount (remount of bind)", err)
	}
	data := o.data
	if len(strings.Join(data, ",")) >= pageLimit && m.Type == "overlay" {
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
	return os.NewSyscallError("mount", unix.Mount(m.Source, at, m.Type, o.set, joined))
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
