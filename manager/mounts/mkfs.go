package mounts

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/mounts/stack"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// Options of mounts with "mkfs/" before their type.
const (
	mkfsOption = "X-containerd.mkfs."
	mkfsSize   = "size" // of the file, as 1GiB, 100m or in bytes
	mkfsType   = "fs"   // ext4 without it
	mkfsUUID   = "uuid" // of the file system
)

// makers are the programs that make file systems, by type: their options, that which sets the UUID, and who has them.
var makers = map[string]struct {
	options []string
	uuid    func(string) []string
	in      string
}{
	"ext2": {[]string{"-q"}, extUUID, "e2fsprogs"},
	"ext3": {[]string{"-q"}, extUUID, "e2fsprogs"},
	"ext4": {[]string{"-q"}, extUUID, "e2fsprogs"},
	"xfs":  {[]string{"-q"}, func(s string) []string { return []string{"-m", "uuid=" + s} }, "xfsprogs"},
}

func extUUID(s string) []string { return []string{"-U", s} }

// image is a file with a file system in it.
type image struct {
	path, fstype, uuid string
	size               int64
}

// takeImage reads the options of m that say what its source is to be, and takes them away.
func takeImage(m *types.Mount) (image, error) {
	im := image{path: m.Source, fstype: "ext4"}
	wrong := func(format string, args ...any) (image, error) {
		return im, fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
	}
	var rest []string
	for _, o := range m.Options {
		after, ok := strings.CutPrefix(o, mkfsOption)
		if !ok {
			rest = append(rest, o)
			continue
		}
		switch key, value, _ := strings.Cut(after, "="); key {
		case mkfsSize:
			n, err := units.RAMInBytes(value)
			if err != nil || n <= 0 {
				return wrong("%s: it is no size, such as 1GiB", o)
			}
			im.size = n
		case mkfsType:
			if _, ok := makers[value]; !ok {
				return wrong("%s: it must be ext2, ext3, ext4 or xfs", o)
			}
			im.fstype = value
		case mkfsUUID:
			if !isUUID(value) {
				return wrong("%s: it is no UUID", o)
			}
			im.uuid = value
		default:
			return wrong("option %q is not known", o)
		}
	}
	m.Options = rest
	switch {
	case !filepath.IsAbs(im.path):
		return wrong("the file %q to make a file system in has no absolute path", im.path)
	case im.size == 0:
		return wrong("the option %s%s=SIZE is missing", mkfsOption, mkfsSize)
	}
	return im, nil
}

func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range []byte(strings.ToLower(s)) {
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (c == '-') || !dash && (c < '0' || c > '9' && c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// make makes the file, unless it is there: beside it first, so that nobody ever sees one without a file system. The n-th
// mount of the stack in dir is for whom; what is half made is noted there.
func (im image) make(ctx context.Context, dir string, n int) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot make a file system in %s: %w", im.path, err)
		}
	}()
	if there, err := im.there(); err != nil || there {
		return err
	}
	maker := makers[im.fstype]
	program, err := exec.LookPath("mkfs." + im.fstype)
	if err != nil {
		return fmt.Errorf("mkfs.%s (%s) is not installed on this host: %w", im.fstype, maker.in, errdefs.ErrFailedPrecondition)
	}
	temp := filepath.Join(filepath.Dir(im.path), ".managerd-mkfs-"+rand.Text())
	if err := stack.Note(dir, n, temp); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stack.Drop(dir, n)) }()
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o640)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("it has no directory: %w", errdefs.ErrNotFound)
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if err := f.Truncate(im.size); err != nil {
		return err
	}
	args := maker.options
	if im.uuid != "" {
		args = append(args[:len(args):len(args)], maker.uuid(im.uuid)...)
	}
	if out, err := exec.CommandContext(ctx, program, append(args[:len(args):len(args)], temp)...).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.%s: %w: %s", im.fstype, err, strings.TrimSpace(string(out)))
	}
	failpoint.Hit("mounts.file.made")
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Link(temp, im.path); errors.Is(err, fs.ErrExist) {
		_, err = im.there() // somebody was faster
		return err
	} else if err != nil {
		return err
	}
	failpoint.Hit("mounts.file.placed")
	return syncDir(filepath.Dir(im.path))
}

func (im image) there() (bool, error) {
	fi, err := os.Lstat(im.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err == nil && !fi.Mode().IsRegular():
		err = fmt.Errorf("it is there, and no regular file: %w", errdefs.ErrFailedPrecondition)
	}
	return err == nil, err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, unix.EINVAL) { // the file system cannot
		err = nil
	}
	return errors.Join(err, d.Close())
}
