package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Names that the image spec gives a meaning.
const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
	meta     = ".wh..wh." // of aufs; all but opaque are ignored
)

// Limits bound what a layer may become; 0 is no limit.
type Limits struct {
	Bytes   int64 // of its files, holes included
	Entries int64
}

// Apply unpacks a layer into dir, on top of what is there: whiteouts delete. It reads tar until the archive's end and
// no further. Owners, modes, times, extended attributes, hard links and device nodes are as the layer has them.
// InvalidArgument for a layer that is malformed, cut short, or would leave dir, ResourceExhausted for one that is beyond
// its limits; what was unpacked until then stays, and is the caller's to throw away.
func Apply(ctx context.Context, dir string, r io.Reader, limits Limits) error {
	rt, err := openRoot(dir)
	if err != nil {
		return err
	}
	a := &applier{ctx: ctx, root: rt, seed: maphash.MakeSeed(), seen: map[uint64]struct{}{}, touched: map[string]struct{}{}, buf: make([]byte, 256<<10)}
	rt.made = a.note
	defer rt.close()

	in := tar.NewReader(r)
	var bytes, entries int64
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return a.finish()
		}
		if err != nil {
			return malformed(err)
		}
		if entries++; limits.Entries > 0 && entries > limits.Entries {
			return fmt.Errorf("the layer has more than %d entries, the maximum (max_layer_entries): %w", limits.Entries, errdefs.ErrResourceExhausted)
		}
		// A header may claim all there is.
		size := h.Size
		if h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeGNUSparse && h.Typeflag != tar.TypeCont {
			size = 0
		}
		if limits.Bytes > 0 && size > limits.Bytes-bytes {
			return fmt.Errorf("layer entry %q: the files of the layer have more than %d bytes, the maximum (max_layer_bytes): %w", h.Name, limits.Bytes, errdefs.ErrResourceExhausted)
		}
		bytes += size
		if err := a.entry(h, in); err != nil {
			return fmt.Errorf("layer entry %q: %w", h.Name, err)
		}
	}
}

// malformed tells a tar that makes no sense from a source that cannot be read.
func malformed(err error) error {
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("the layer is cut short: %w: %w", err, errdefs.ErrInvalidArgument)
	case errors.Is(err, tar.ErrHeader), errors.Is(err, tar.ErrFieldTooLong), errors.Is(err, tar.ErrInsecurePath):
		return fmt.Errorf("the layer is no tar archive: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

type applier struct {
	ctx  context.Context
	root *root
	buf  []byte

	// seen has (hashes of) the paths that this layer made: its whiteouts do not speak of them.
	seed maphash.Seed
	seen map[uint64]struct{}

	// dirs get their times when nothing is made in them any more: those of the layer, and before them those in which
	// it makes or deletes something without having a time for them (touched has both).
	dirs    []dirTimes
	kept    []dirTimes
	touched map[string]struct{}
}

func (a *applier) note(p string)       { a.seen[maphash.String(a.seed, p)] = struct{}{} }
func (a *applier) noted(p string) bool { _, ok := a.seen[maphash.String(a.seed, p)]; return ok }

func (a *applier) entry(h *tar.Header, body io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	p, err := clean(h.Name)
	if err != nil {
		return err
	}
	parent, base := split(p)
	if strings.HasPrefix(base, whiteout) {
		return blame(a.whiteout(parent, base))
	}
	if p == "" {
		if h.Typeflag != tar.TypeDir {
			return refuse("the root of a layer must be a directory")
		}
		return a.attributes(h, a.root.fd, ".", "")
	}
	a.keep(parent, h.ModTime)
	a.note(p)
	for d := parent; d != "" && !a.noted(d); d, _ = split(d) {
		a.note(d)
	}
	at, err := a.root.dir(parent, true)
	if err != nil {
		return blame(err)
	}
	if err := a.create(h, body, at, base, p); err != nil {
		return blame(err)
	}
	return nil
}

// create makes what h describes as base in the directory at, in the place of what is there; only directories are kept.
func (a *applier) create(h *tar.Header, body io.Reader, at int, base, p string) error {
	err := a.node(h, body, at, base)
	if errors.Is(err, unix.EEXIST) {
		var kept bool
		if kept, err = a.giveWay(h, p); err != nil {
			return err
		}
		// at may have been closed meanwhile.
		if at, err = a.root.dir(parentOf(p), true); err != nil {
			return err
		}
		if !kept {
			err = a.node(h, body, at, base)
		}
	}
	if err != nil || h.Typeflag == tar.TypeLink {
		return err
	}
	return a.attributes(h, at, base, p)
}

// giveWay removes what stands at p. It is kept when h only adds to it: a directory, or the very file that a hard link
// points to.
func (a *applier) giveWay(h *tar.Header, p string) (kept bool, err error) {
	parent, base := split(p)
	var st unix.Stat_t
	stat := func() (int, error) {
		at, err := a.root.dir(parent, true)
		if err == nil {
			err = os.NewSyscallError("stat", unix.Fstatat(at, base, &st, unix.AT_SYMLINK_NOFOLLOW))
		}
		return at, err
	}
	if _, err := stat(); err != nil {
		return false, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR && h.Typeflag == tar.TypeDir {
		return true, nil
	}
	if h.Typeflag == tar.TypeLink {
		if same, err := a.sameFile(h.Linkname, &st); err != nil || same {
			return same, err
		}
	}
	at, err := stat()
	if err != nil {
		return false, err
	}
	defer a.root.forget() // a path through it leads elsewhere now
	return false, removeAll(at, base)
}

func parentOf(p string) string { d, _ := split(p); return d }

// node makes the file itself, EEXIST when there is one.
func (a *applier) node(h *tar.Header, body io.Reader, at int, base string) error {
	switch h.Typeflag {
	case tar.TypeDir:
		return os.NewSyscallError("mkdir", unix.Mkdirat(at, base, 0o700))
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		return a.file(h, body, at, base)
	case tar.TypeSymlink:
		if h.Linkname == "" {
			return refuse("the symbolic link has no target")
		}
		return os.NewSyscallError("symlink", unix.Symlinkat(h.Linkname, at, base))
	case tar.TypeLink:
		return a.link(h.Linkname, at, base)
	case tar.TypeChar:
		return os.NewSyscallError("mknod", unix.Mknodat(at, base, unix.S_IFCHR|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))))
	case tar.TypeBlock:
		return os.NewSyscallError("mknod", unix.Mknodat(at, base, unix.S_IFBLK|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))))
	case tar.TypeFifo:
		return os.NewSyscallError("mkfifo", unix.Mknodat(at, base, unix.S_IFIFO|0o600, 0))
	}
	return refuse("type %q of the entry is not known", h.Typeflag)
}

func (a *applier) file(h *tar.Header, body io.Reader, at int, base string) error {
	fd, err := unix.Openat(at, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	f := os.NewFile(uintptr(fd), base)
	err = a.fill(f, body, sparse(h))
	if err == nil && sparse(h) {
		err = f.Truncate(h.Size)
	}
	return errors.Join(err, f.Close())
}

// fill copies the content. Of a sparse file the holes stay holes: a few bytes of tar may stand for terabytes of them.
func (a *applier) fill(f *os.File, body io.Reader, holes bool) error {
	for {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		n, rerr := body.Read(a.buf)
		var err error
		if holes && allZero(a.buf[:n]) {
			_, err = f.Seek(int64(n), io.SeekCurrent)
		} else {
			_, err = f.Write(a.buf[:n])
		}
		if err != nil {
			return err
		}
		if errors.Is(rerr, io.EOF) {
			return nil
		}
		if rerr != nil {
			return malformed(rerr)
		}
	}
}

func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// target opens what a hard link points to: the file of that name in the root, even when it is a symbolic link itself.
func (a *applier) target(name string) (int, error) {
	p, err := clean(name)
	if err != nil {
		return -1, err
	}
	fd := -1
	if p != "" {
		parent, base := split(p)
		var at int
		if at, err = a.root.dir(parent, false); err == nil {
			fd, err = unix.Openat(at, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		}
	} else {
		err = unix.EISDIR
	}
	if err != nil {
		return -1, refuse("the target %q of the hard link: %w", name, err)
	}
	return fd, nil
}

func (a *applier) link(name string, at int, base string) error {
	// target may close what is kept open, so at is held by a descriptor of our own.
	at, err := unix.FcntlInt(uintptr(at), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	defer func() { _ = unix.Close(at) }()
	fd, err := a.target(name)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("stat", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return refuse("the hard link points to the directory %q", name)
	}
	err = unix.Linkat(fd, "", at, base, unix.AT_EMPTY_PATH)
	if errors.Is(err, unix.ENOENT) { // without CAP_DAC_READ_SEARCH
		err = unix.Linkat(unix.AT_FDCWD, fdPath(fd), at, base, unix.AT_SYMLINK_FOLLOW)
	}
	return os.NewSyscallError("link", err)
}

func (a *applier) sameFile(name string, st *unix.Stat_t) (bool, error) {
	fd, err := a.target(name)
	if err != nil {
		return false, err
	}
	defer func() { _ = unix.Close(fd) }()
	var other unix.Stat_t
	if err := unix.Fstat(fd, &other); err != nil {
		return false, os.NewSyscallError("stat", err)
	}
	return st.Dev == other.Dev && st.Ino == other.Ino, nil
}

// attributes come in an order that matters: chown drops set-user-id bits and capabilities, times change last.
func (a *applier) attributes(h *tar.Header, at int, base, p string) error {
	if err := unix.Fchownat(at, base, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return os.NewSyscallError("chown", err)
	}
	if err := setXattrs(h, at, base); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeSymlink {
		if err := chmodat(at, base, uint32(h.Mode)&0o7777); err != nil {
			return os.NewSyscallError("chmod", err)
		}
	}
	mtime := h.ModTime
	atime := h.AccessTime
	if atime.IsZero() {
		atime = mtime
	}
	if h.Typeflag == tar.TypeDir {
		a.touched[p] = struct{}{}
		a.dirs = append(a.dirs, dirTimes{path: p, atime: atime, mtime: mtime})
		return nil
	}
	return setTimes(at, base, atime, mtime)
}

const xattrPrefix = "SCHILY.xattr."

func setXattrs(h *tar.Header, at int, base string) error {
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, xattrPrefix)
		if !ok || name == "" {
			continue
		}
		// What overlayfs keeps for itself would make a lower layer show files that are not this layer's.
		if strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue
		}
		err := unix.Lsetxattr(fdPath(at)+"/"+base, name, []byte(v), 0)
		switch {
		case err == nil:
		case errors.Is(err, unix.ENOTSUP):
			// The file system, or this kind of file, has none of that class.
		case errors.Is(err, unix.EPERM) && h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir && strings.HasPrefix(name, "user."):
			// user.* is for files and directories only.
		default:
			return fmt.Errorf("setxattr %s: %w", name, err)
		}
	}
	return nil
}

// whiteout deletes what lower layers have, or everything of theirs in the directory when it is opaque.
func (a *applier) whiteout(parent, base string) error {
	if base != opaque && strings.HasPrefix(base, meta) {
		return nil
	}
	name := strings.TrimPrefix(base, whiteout)
	if name == "" || name == "." || name == ".." {
		return refuse("a whiteout must name something")
	}
	at, err := a.root.dir(parent, false)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil // nothing there to delete
	}
	if err != nil {
		return err
	}
	if base == opaque {
		return a.clear(at, parent)
	}
	a.keep(parent, time.Time{})
	return a.hide(at, parent, name)
}

// clear hides every child of a directory.
func (a *applier) clear(at int, p string) error {
	a.keep(p, time.Time{})
	at, err := unix.FcntlInt(uintptr(at), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	defer func() { _ = unix.Close(at) }()
	children, err := names(at)
	if err != nil {
		return err
	}
	for _, name := range children {
		if err := a.hide(at, p, name); err != nil {
			return err
		}
	}
	return nil
}

// hide removes name of the directory at, but not what this layer has put there or below.
func (a *applier) hide(at int, parent, name string) error {
	p := path.Join(parent, name)
	if !a.noted(p) {
		defer a.root.forget() // a path through it leads nowhere now
		return removeAll(at, name)
	}
	fd, err := unix.Openat(at, name, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	return a.clear(fd, p)
}
