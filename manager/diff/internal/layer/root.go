// Package layer turns layer tars into files and changed files into layer tars. A tar is input of strangers: whatever its
// names, links and attributes say, nothing outside the root is read, written or linked. It must not know of
// compression, digests, mounts or snapshots.
package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// root is the directory that a layer is applied to. The kernel resolves each path with this as its "/": symbolic links,
// absolute or with too many dots, end inside. Files are then made by their last name in an open directory.
type root struct {
	fd   int
	open map[string]int // directories by clean path, so that neighbours share a lookup
	made func(dir string)
}

// maxOpen bounds the descriptors that root keeps.
const maxOpen = 64

func openRoot(dir string) (*root, error) {
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return &root{fd: fd, open: map[string]int{}}, nil
}

func (r *root) close() {
	r.forget()
	_ = unix.Close(r.fd)
}

// forget closes what is kept: a path may lead elsewhere now.
func (r *root) forget() {
	for p, fd := range r.open {
		_ = unix.Close(fd)
		delete(r.open, p)
	}
}

func (r *root) openat(p string, flags int) (int, error) {
	if p == "" {
		p = "."
	}
	for {
		fd, err := unix.Openat2(r.fd, p, &unix.OpenHow{
			Flags:   uint64(flags) | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue // something was renamed meanwhile
		}
		return fd, err
	}
}

// dir gives the directory p ("" is the root), open until the next call of dir or forget. With create, what is missing
// of it is made.
func (r *root) dir(p string, create bool) (int, error) {
	if p == "" {
		return r.fd, nil
	}
	if fd, ok := r.open[p]; ok {
		return fd, nil
	}
	fd, err := r.openat(p, unix.O_DIRECTORY|unix.O_RDONLY)
	if errors.Is(err, unix.ENOENT) && create {
		if err = r.mkdirAll(p, 0); err == nil {
			fd, err = r.openat(p, unix.O_DIRECTORY|unix.O_RDONLY)
		}
	}
	if err != nil {
		return -1, &os.PathError{Op: "open directory", Path: p, Err: err}
	}
	if len(r.open) >= maxOpen {
		r.forget()
	}
	r.open[p] = fd
	return fd, nil
}

// mkdirAll makes the directories that p lacks, also where a symbolic link on the way points to nothing yet.
func (r *root) mkdirAll(p string, links int) error {
	if p == "" || p == "." {
		return nil
	}
	fd, err := r.openat(p, unix.O_DIRECTORY|unix.O_PATH)
	if err == nil {
		return unix.Close(fd)
	}
	if !errors.Is(err, unix.ENOENT) {
		return err
	}
	parent, base := split(p)
	if err := r.mkdirAll(parent, links); err != nil {
		return err
	}
	at, err := r.openat(parent, unix.O_DIRECTORY|unix.O_PATH)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(at) }()
	err = unix.Mkdirat(at, base, 0o755)
	if err == nil {
		if r.made != nil {
			r.made(p)
		}
		return chmodat(at, base, 0o755) // the umask is not ours
	}
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	target, err := readlinkat(at, base)
	if err != nil {
		return unix.ENOTDIR
	}
	if links++; links > 40 {
		return unix.ELOOP
	}
	if !path.IsAbs(target) {
		target = path.Join("/", parent, target)
	}
	return r.mkdirAll(strings.TrimPrefix(path.Clean(target), "/"), links)
}

func readlinkat(at int, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(at, name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// removeAll deletes name in the directory at, and what is in it, following nothing.
func removeAll(at int, name string) error {
	err := unix.Unlinkat(at, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return err
	}
	err = unix.Unlinkat(at, name, unix.AT_REMOVEDIR)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
		return err
	}
	// os.Root keeps the recursion inside, however the tree changes.
	dir, err := os.OpenRoot(fdPath(at))
	if err != nil {
		return err
	}
	return errors.Join(dir.RemoveAll(name), dir.Close())
}

// chmodat follows no link, also should somebody put one there just now (kernels before 6.6 cannot promise that).
func chmodat(at int, name string, mode uint32) error {
	err := unix.Fchmodat(at, name, mode, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		err = unix.Fchmodat(at, name, mode, 0)
	}
	return err
}

// names lists a directory.
func names(at int) ([]string, error) {
	fd, err := unix.Openat(at, ".", unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "directory")
	defer func() { _ = f.Close() }()
	return f.Readdirnames(-1)
}

func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func split(p string) (dir, base string) {
	dir, base = path.Split(p)
	return strings.TrimSuffix(dir, "/"), base
}

// clean makes a name of a tar relative to the root, "" for the root itself. A leading slash is dropped, as every
// unpacker does (images of ko have them); a name that climbs out is refused.
func clean(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", refuse("name %q has a NUL byte", name)
	}
	c := path.Clean(strings.TrimLeft(name, "/"))
	switch {
	case c == ".":
		return "", nil
	case c == "..", strings.HasPrefix(c, "../"):
		return "", refuse("%q leaves the root of the layer", name)
	}
	return c, nil
}

func refuse(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// blame says whose fault an error of the kernel is: one that only the layer's names can cause is InvalidArgument.
func blame(err error) error {
	for _, e := range []error{unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG, unix.EINVAL, unix.EISDIR, fs.ErrNotExist} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	return err
}
