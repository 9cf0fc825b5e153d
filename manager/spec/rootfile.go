package spec

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
)

const (
	// maxTable is the most of a passwd or group file that is read, in bytes: an image may hold anything.
	maxTable = 16 << 20
	maxLinks = 40 // as the kernel
)

// table gives the lines of a colon-separated file in root, split into fields; comments and empty lines are left out.
// A file that is missing is nil and no error: many images have none. Always non-nil if it is there.
func table(root *os.Root, name string) ([][]string, error) {
	f, err := openIn(root, name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("cannot open /%s of the root file system: %w", name, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxTable+1))
	if err != nil {
		return nil, fmt.Errorf("cannot read /%s of the root file system: %w", name, err)
	}
	if len(data) > maxTable {
		return nil, fmt.Errorf("/%s of the root file system is larger than %d bytes: %w", name, maxTable, errdefs.ErrInvalidArgument)
	}
	lines := [][]string{}
	for line := range strings.Lines(string(data)) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			lines = append(lines, strings.Split(line, ":"))
		}
	}
	return lines, nil
}

// openIn opens the regular file name for reading as a process in root would see it: a link's absolute target, and
// ".." at the top, stay below root. os.Root alone refuses those two, and images have them. It is still os.Root that
// opens, so whoever changes links meanwhile gets an error and not a file of the host. The caller closes the file.
func openIn(root *os.Root, name string) (*os.File, error) {
	at, links := ".", 0
	for rest := strings.Split(name, "/"); len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at) // "." stays "."
			continue
		}
		next := path.Join(at, part)
		info, err := root.Lstat(next)
		if err != nil {
			return nil, err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			// Opening a device may do something, and a FIFO waits.
			if len(rest) == 0 && !info.Mode().IsRegular() {
				return nil, fmt.Errorf("%s is not a regular file: %w", next, errdefs.ErrInvalidArgument)
			}
			at = next
			continue
		}
		if links++; links > maxLinks {
			return nil, fmt.Errorf("%s: %w: %w", next, syscall.ELOOP, errdefs.ErrInvalidArgument)
		}
		target, err := root.Readlink(next)
		if err != nil {
			return nil, err
		}
		if path.IsAbs(target) {
			at = "."
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	// Between Lstat and here it may have become a FIFO: do not wait, and look again.
	f, err := root.OpenFile(at, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file: %w", at, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
