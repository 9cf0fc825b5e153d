package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Trees are what Diff compares.
type Trees struct {
	Lower string // the older tree
	Upper string // the newer one
	// Hint, if not empty, is the upper directory of the overlay of which Upper is the mount and Lower what is below:
	// where it has nothing, nothing has changed.
	Hint string
	// Latest, if not zero, is the time that files which are newer get.
	Latest time.Time
}

// Diff writes, as a layer tar, what makes Lower into Upper. Names come in order, parents before children, and with
// times cut to seconds, so the same change gives the same bytes. A directory of which only the time is another one has
// not changed. Sockets are left out. The archive is ended, w is not closed.
func Diff(ctx context.Context, t Trees, w io.Writer) error {
	d := &differ{
		ctx: ctx, out: tar.NewWriter(w), latest: t.Latest, links: map[inode]string{}, same: map[inode][]string{}, buf: make([]byte, 256<<10),
	}
	var fds [3]int
	for i, dir := range []string{t.Lower, t.Upper, t.Hint} {
		if fds[i] = none; dir == "" {
			continue
		}
		fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: dir, Err: err}
		}
		defer func() { _ = unix.Close(fd) }()
		fds[i] = fd
	}
	if err := d.dir(dirs{fds[0], fds[1], fds[2]}, "", func() error { return nil }); err != nil {
		return err
	}
	return d.out.Close()
}

type differ struct {
	ctx    context.Context
	out    *tar.Writer
	latest time.Time
	links  map[inode]string   // files with many names → the first that was written
	same   map[inode][]string // such files → names that have not changed
	buf    []byte
}

type inode struct{ dev, ino uint64 }

func inodeOf(st *unix.Stat_t) inode { return inode{uint64(st.Dev), st.Ino} }

const none = -1

// dirs are descriptors of the same directory in the three trees, or none.
type dirs struct{ lower, upper, hint int }

// dir compares one directory. announce writes the headers of the directories on the way to it, if they are not written
// yet: whoever applies the layer shall find them with their attributes.
func (d *differ) dir(at dirs, p string, announce func() error) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	list, err := at.names()
	if err != nil {
		return fmt.Errorf("cannot read directory /%s: %w", p, err)
	}
	for _, name := range list {
		if err := d.entry(at, path.Join(p, name), name, announce); err != nil {
			return err
		}
	}
	return nil
}

func (at dirs) names() ([]string, error) {
	var all []string
	for _, fd := range []int{at.lower, at.upper} {
		if at.hint != none {
			fd = at.hint
		}
		if fd == none {
			continue
		}
		n, err := names(fd)
		if err != nil {
			return nil, err
		}
		all = append(all, n...)
		if at.hint != none {
			break
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

func (d *differ) entry(at dirs, p, name string, announce func() error) error {
	lower, err := stat(at.lower, name)
	if err != nil {
		return fmt.Errorf("cannot stat /%s: %w", p, err)
	}
	upper, err := stat(at.upper, name)
	if err != nil {
		return fmt.Errorf("cannot stat /%s: %w", p, err)
	}
	lower, upper = noSocket(lower), noSocket(upper)
	switch {
	case upper == nil && lower == nil:
		return nil // a whiteout of nothing, or gone while we looked
	case upper == nil:
		if err := announce(); err != nil {
			return err
		}
		return d.out.WriteHeader(&tar.Header{
			Typeflag: tar.TypeReg, Name: path.Join(path.Dir(p), whiteout+name), ModTime: time.Unix(0, 0), Format: tar.FormatPAX,
		})
	}
	changed := lower == nil
	if !changed {
		if changed, err = d.changed(at, name, lower, upper); err != nil {
			return fmt.Errorf("cannot compare /%s: %w", p, err)
		}
	}
	if upper.Mode&unix.S_IFMT != unix.S_IFDIR {
		if !changed {
			return d.unchanged(p, upper)
		}
		if err := announce(); err != nil {
			return err
		}
		return d.write(at.upper, name, p, upper)
	}

	written := false
	self := func() error {
		if written {
			return nil
		}
		if err := announce(); err != nil {
			return err
		}
		written = true
		return d.write(at.upper, name, p, upper)
	}
	if changed {
		if err := self(); err != nil {
			return err
		}
	}
	below, err := at.below(name, lower)
	if err != nil {
		return fmt.Errorf("cannot open directory /%s: %w", p, err)
	}
	defer below.close()
	return d.dir(below, p, self)
}

// unchanged keeps the names of a file together: when one of them is new, the file is written under that one, and the
// others become links to it. Their directories are there already.
func (d *differ) unchanged(p string, st *unix.Stat_t) error {
	if st.Nlink < 2 {
		return nil
	}
	i := inodeOf(st)
	if first, ok := d.links[i]; ok {
		return d.link(p, first, st)
	}
	d.same[i] = append(d.same[i], p)
	return nil
}

func (d *differ) link(p, first string, st *unix.Stat_t) error {
	h := d.header(p, st)
	h.Typeflag, h.Linkname = tar.TypeLink, first
	if err := d.out.WriteHeader(h); err != nil {
		return fmt.Errorf("cannot write header of /%s: %w", p, err)
	}
	return nil
}

func (d *differ) header(p string, st *unix.Stat_t) *tar.Header {
	h := &tar.Header{
		Name: p, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Sec, 0), Format: tar.FormatPAX,
	}
	if !d.latest.IsZero() && h.ModTime.After(d.latest) {
		h.ModTime = d.latest.Truncate(time.Second)
	}
	return h
}

// noSocket is nil for a socket, which means nothing without its process.
func noSocket(st *unix.Stat_t) *unix.Stat_t {
	if st != nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		return nil
	}
	return st
}

// below opens the directory name in each tree that has it.
func (at dirs) below(name string, lower *unix.Stat_t) (b dirs, err error) {
	b = dirs{none, none, none}
	open := func(dir int) int {
		if err != nil || dir == none {
			return none
		}
		fd, oerr := unix.Openat(dir, name, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if oerr != nil {
			err = oerr
			return none
		}
		return fd
	}
	b.upper = open(at.upper)
	if lower != nil && lower.Mode&unix.S_IFMT == unix.S_IFDIR {
		b.lower = open(at.lower)
	}
	if at.hint != none && b.lower != none {
		// Opaque, or renamed: what is merged into it is not what has its name below.
		if b.hint = open(at.hint); b.hint != none && odd(b.hint) {
			_ = unix.Close(b.hint)
			b.hint = none
		}
	}
	if err != nil {
		b.close()
	}
	return b, err
}

func (at dirs) close() {
	for _, fd := range []int{at.lower, at.upper, at.hint} {
		if fd != none {
			_ = unix.Close(fd)
		}
	}
}

func odd(fd int) bool {
	for _, name := range []string{"opaque", "redirect"} {
		for _, class := range []string{"trusted", "user"} {
			if n, err := unix.Fgetxattr(fd, class+".overlay."+name, nil); err == nil && n > 0 {
				return true
			}
		}
	}
	return false
}

// stat gives nil for what is not there.
func stat(at int, name string) (*unix.Stat_t, error) {
	if at == none {
		return nil, nil
	}
	var st unix.Stat_t
	err := unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	return &st, err
}

func (d *differ) changed(at dirs, name string, a, b *unix.Stat_t) (bool, error) {
	if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Rdev != b.Rdev {
		return true, nil
	}
	xa, err := xattrs(at.lower, name)
	if err != nil {
		return false, err
	}
	xb, err := xattrs(at.upper, name)
	if err != nil {
		return false, err
	}
	if !maps.Equal(xa, xb) {
		return true, nil
	}
	switch b.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return false, nil // its time changes with its children, which are compared
	case unix.S_IFLNK:
		la, err := readlinkat(at.lower, name)
		if err != nil {
			return false, err
		}
		lb, err := readlinkat(at.upper, name)
		return la != lb, err
	}
	if a.Size != b.Size || a.Mtim.Sec != b.Mtim.Sec {
		return true, nil
	}
	if a.Mtim.Nsec == b.Mtim.Nsec && a.Mtim.Nsec != 0 || b.Mode&unix.S_IFMT != unix.S_IFREG {
		return a.Mtim.Nsec != b.Mtim.Nsec, nil
	}
	if a.Mtim.Nsec != 0 && b.Mtim.Nsec != 0 {
		return true, nil
	}
	// A time of whole seconds comes from a layer, and may be made up: only the content tells.
	same, err := d.sameContent(at, name)
	return !same, err
}

func (d *differ) sameContent(at dirs, name string) (bool, error) {
	a, err := openFile(at.lower, name)
	if err != nil {
		return false, err
	}
	defer func() { _ = a.Close() }()
	b, err := openFile(at.upper, name)
	if err != nil {
		return false, err
	}
	defer func() { _ = b.Close() }()
	half := len(d.buf) / 2
	x, y := d.buf[:half], d.buf[half:]
	for {
		n, errA := io.ReadFull(a, x)
		m, errB := io.ReadFull(b, y)
		if n != m || !bytes.Equal(x[:n], y[:m]) {
			return false, nil
		}
		for _, err := range []error{errA, errB} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return false, err
			}
		}
		if errA != nil || errB != nil {
			return errA != nil && errB != nil, nil
		}
	}
}

func openFile(at int, name string) (*os.File, error) {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// write adds one file of the upper tree to the layer.
func (d *differ) write(at int, name, p string, st *unix.Stat_t) error {
	kind := st.Mode & unix.S_IFMT
	linked := st.Nlink > 1 && kind != unix.S_IFDIR
	if first, ok := d.links[inodeOf(st)]; linked && ok {
		return d.link(p, first, st)
	}
	h := d.header(p, st)
	var body *os.File
	switch kind {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, p+"/"
	case unix.S_IFREG:
		f, err := openFile(at, name)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot read /%s: %w", p, err)
		}
		defer func() { _ = f.Close() }()
		var now unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &now); err != nil {
			return fmt.Errorf("cannot read /%s: %w", p, err)
		}
		h.Typeflag, h.Size, body = tar.TypeReg, now.Size, f
	case unix.S_IFLNK:
		target, err := readlinkat(at, name)
		if err != nil {
			return fmt.Errorf("cannot read link /%s: %w", p, err)
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if kind == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(uint64(st.Rdev))), int64(unix.Minor(uint64(st.Rdev)))
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return nil // of a kind that no layer has
	}
	x, err := xattrs(at, name)
	if err != nil {
		return fmt.Errorf("cannot read attributes of /%s: %w", p, err)
	}
	for k, v := range x {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrPrefix+k] = v
	}
	if err := d.out.WriteHeader(h); err != nil {
		return fmt.Errorf("cannot write header of /%s: %w", p, err)
	}
	if body != nil {
		if err := d.copy(body, h.Size); err != nil {
			return fmt.Errorf("cannot write /%s: %w", p, err)
		}
	}
	if !linked {
		return nil
	}
	i := inodeOf(st)
	d.links[i] = p
	for _, other := range d.same[i] {
		if err := d.link(other, p, st); err != nil {
			return err
		}
	}
	delete(d.same, i)
	return nil
}

// copy writes the content of a file of which size bytes were promised; it may have shrunk since.
func (d *differ) copy(body io.Reader, size int64) error {
	n, err := io.CopyBuffer(onlyWriter{d.out}, io.LimitReader(onlyReader{body}, size), d.buf)
	if err == nil && n < size {
		_, err = io.CopyN(d.out, zeros{}, size-n)
	}
	return err
}

// These hide methods that would make io.CopyBuffer leave the buffer unused.
type (
	onlyWriter struct{ io.Writer }
	onlyReader struct{ io.Reader }
)

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// xattrs gives the attributes that belong in a layer: capabilities and the user's own.
func xattrs(at int, name string) (map[string]string, error) {
	p := fdPath(at) + "/" + name
	buf := make([]byte, 1024)
	n, err := unix.Llistxattr(p, buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 64<<10) // XATTR_LIST_MAX
		n, err = unix.Llistxattr(p, buf)
	}
	if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, os.NewSyscallError("listxattr", err)
	}
	var out map[string]string
	for k := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if k != "security.capability" && (!strings.HasPrefix(k, "user.") || strings.HasPrefix(k, "user.overlay.")) {
			continue
		}
		v := make([]byte, 64<<10) // XATTR_SIZE_MAX
		m, err := unix.Lgetxattr(p, k, v)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("getxattr "+k, err)
		}
		if out == nil {
			out = map[string]string{}
		}
		out[k] = string(v[:m])
	}
	return out, nil
}
