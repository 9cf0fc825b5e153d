package mount

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/containerd/containerd/api/types"
	"golang.org/x/sys/unix"
)

// errClassic says that this mount, or this kernel, needs mount(2).
var errClassic = errors.New("needs mount(2)")

// superFlags belong to a superblock, not to a mount: rare enough to leave to mount(2).
const superFlags = unix.MS_SYNCHRONOUS | unix.MS_MANDLOCK | unix.MS_DIRSYNC

// detached makes the mount without attaching it anywhere; the caller closes the descriptor. For binds that means that a
// read-only one is never there writable; for overlays that layers go over one by one, without the one page that
// mount(2) has for options, and that the kernel says in words what it did not like.
func detached(m *types.Mount, o *options) (int, error) {
	switch {
	case o.set&superFlags != 0:
		return -1, errClassic
	case o.bind:
		return cloned(m, o)
	case m.Type == "overlay":
		return overlay(m, o)
	default:
		return -1, errClassic
	}
}

// old tells whether err may mean that the kernel, or a seccomp filter, does not know the call.
func old(err error) bool {
	return errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP)
}

func cloned(m *types.Mount, o *options) (int, error) {
	how := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if o.recursive {
		how |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, m.Source, how)
	if old(err) && o.ids == nil {
		return -1, errClassic
	}
	if err != nil {
		return -1, fmt.Errorf("open_tree %s: %w", m.Source, err)
	}
	if err = setAttrs(fd, o); err == nil && o.ids != nil {
		err = mapped(fd, o.ids)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func mapped(fd int, ids *idmap) error {
	userns, err := ids.namespace()
	if err != nil {
		return err
	}
	defer func() { _ = userns.Close() }()
	return ids.apply(fd, userns)
}

func setAttrs(fd int, o *options) error {
	set := func(flags uint, a unix.MountAttr) error {
		err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|flags, &a)
		if errors.Is(err, unix.ENOSYS) && o.deep == 0 {
			return errClassic
		}
		return os.NewSyscallError("mount_setattr", err)
	}
	if a := o.attrs(); a != (unix.MountAttr{}) {
		if err := set(0, a); err != nil {
			return err
		}
	}
	if o.deep != 0 {
		return set(unix.AT_RECURSIVE, unix.MountAttr{Attr_set: o.deep})
	}
	return nil
}

// takesAll says that this kernel's overlayfs takes every key and looks at none before the file system is made (before
// Linux 6.5): lowerdir+, which it does not know, would be refused only then.
var takesAll = sync.OnceValue(func() bool {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fs) }()
	return unix.FsconfigSetFlag(fs, "no-such-key-of-overlayfs") == nil
})

// overlay gives each layer to the kernel by itself (lowerdir+, Linux 6.5).
func overlay(m *types.Mount, o *options) (int, error) {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if old(err) {
		return -1, errClassic
	}
	if err != nil {
		return -1, os.NewSyscallError("fsopen overlay", err)
	}
	defer func() { _ = unix.Close(fs) }()
	if takesAll() {
		return -1, errClassic // such a kernel does not know lowerdir+, and takes neither commas here nor more than a page
	}
	source := m.Source
	if source == "" {
		source = "overlay"
	}
	if err := unix.FsconfigSetString(fs, "source", source); err != nil {
		return -1, explain(fs, "source", err)
	}
	for _, opt := range o.data {
		k, v, valued := strings.Cut(opt, "=")
		switch {
		case k == "lowerdir" && strings.Contains(v, "::"):
			return -1, errClassic // data-only layers have a key of their own, in newer kernels
		case k == "lowerdir":
			dirs, closeAll, err := lowers(Layers(v), o.ids)
			if err != nil {
				return -1, err
			}
			defer closeAll()
			for i, dir := range dirs {
				err := unix.FsconfigSetString(fs, "lowerdir+", dir)
				if i == 0 && errors.Is(err, unix.EINVAL) {
					return -1, errClassic // the key is not known
				}
				if err != nil {
					return -1, explain(fs, "lowerdir "+dir, err)
				}
			}
		case valued:
			if err := unix.FsconfigSetString(fs, k, v); err != nil {
				return -1, explain(fs, opt, err)
			}
		default:
			if err := unix.FsconfigSetFlag(fs, k); err != nil {
				return -1, explain(fs, opt, err)
			}
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		if errors.Is(err, unix.EINVAL) && o.ids != nil {
			return -1, errClassic
		}
		return -1, explain(fs, "create", err)
	}
	attr := o.attrs()
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, int(attr.Attr_set))
	if err != nil {
		return -1, explain(fs, "fsmount", err)
	}
	if o.deep != 0 {
		if err := setAttrs(fd, &options{deep: o.deep}); err != nil {
			_ = unix.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}

// lowers gives the paths of layers, with their IDs mapped. The caller calls closeAll when they are mounted.
func lowers(dirs []string, ids *idmap) (paths []string, closeAll func(), err error) {
	if ids == nil {
		return dirs, func() {}, nil
	}
	var fds []int
	closeAll = func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}
	userns, err := ids.namespace()
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = userns.Close() }()
	for _, dir := range dirs {
		fd, err := ids.clone(dir, userns)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		fds = append(fds, fd)
		paths = append(paths, fdPath(fd))
	}
	return paths, closeAll, nil
}

// explain adds what the kernel wrote into the file system context: "e overlay: ..." lines.
func explain(fs int, what string, err error) error {
	var words []string
	buf := make([]byte, 512)
	for range 8 {
		n, rerr := unix.Read(fs, buf)
		if rerr != nil || n <= 0 {
			break
		}
		s := strings.TrimSpace(string(buf[:n]))
		for _, level := range []string{"e ", "w ", "i "} {
			s = strings.TrimPrefix(s, level)
		}
		words = append(words, s)
	}
	if len(words) == 0 {
		return fmt.Errorf("%s: %w", what, err)
	}
	return fmt.Errorf("%s: %s: %w", what, strings.Join(words, "; "), err)
}

// Layers splits the value of an overlay's lowerdir (or of its upperdir, which is one path) at the colons and undoes
// Escape.
func Layers(s string) []string {
	var out []string
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		case s[i] == ':':
			out = append(out, b.String())
			b.Reset()
		default:
			b.WriteByte(s[i])
		}
	}
	return append(out, b.String())
}

// Escape makes a path fit for the value of an overlay's option: a backslash keeps a colon from ending a layer and a comma
// from ending the option.
func Escape(path string) string {
	if !strings.ContainsAny(path, `\:,`) {
		return path
	}
	return strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`).Replace(path)
}
