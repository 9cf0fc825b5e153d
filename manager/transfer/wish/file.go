package wish

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// File is an Import of a regular file; false for any other.
func File(f *os.File) (*Import, bool) {
	path, err := filepath.Abs(f.Name())
	if err != nil {
		return nil, false
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, false
	}
	return &Import{Path: path, Device: st.Dev, Inode: st.Ino}, true
}

// Open opens the file, if it is that which the client has found; NotImplemented for any other. The caller closes it.
func (i *Import) Open() (*os.File, error) {
	var st unix.Stat_t
	fd, err := unix.Open(i.Path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("the daemon has no file %s that it can read: %w: %w", i.Path, err, errdefs.ErrNotImplemented)
	}
	f := os.NewFile(uintptr(fd), i.Path)
	if err := unix.Fstat(fd, &st); err != nil || st.Dev != i.Device || st.Ino != i.Inode || st.Mode&unix.S_IFMT != unix.S_IFREG {
		_ = f.Close()
		return nil, fmt.Errorf("the daemon has another file %s: %w", i.Path, errdefs.ErrNotImplemented)
	}
	return f, nil
}
