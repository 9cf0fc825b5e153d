package cgroups

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/errdefs"
)

// Join moves process pid into the cgroup path, as seen from the root of each hierarchy: on v1 in all those that have it.
// NotFound when there is none.
func Join(path string, pid int) error {
	path = filepath.Join("/", path) // no way out by ".."
	dirs := []string{filepath.Join(Root, path)}
	if cgroups.Mode() != cgroups.Unified {
		var err error
		if dirs, err = filepath.Glob(Root + "/*"); err != nil {
			return err
		}
		for i := range dirs {
			dirs[i] = filepath.Join(dirs[i], path)
		}
	}
	joined := 0
	for _, dir := range dirs {
		f, err := os.OpenFile(filepath.Join(dir, "cgroup.procs"), os.O_WRONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			_, err = f.WriteString(strconv.Itoa(pid))
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			return fmt.Errorf("cannot join cgroup %s: %w", path, err)
		}
		joined++
	}
	if joined == 0 {
		return fmt.Errorf("cannot join cgroup %s: it does not exist: %w", path, errdefs.ErrNotFound)
	}
	return nil
}
