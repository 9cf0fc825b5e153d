// Package dirs keeps one directory per snapshot, ROOT/snapshots/ID, for the snapshotters whose storage is that. It must
// not know what is in them.
package dirs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// removed marks a directory whose deletion has begun: whatever happens, it is never taken for a snapshot again.
const removed = "removed-"

// Dirs is the directory of snapshots.
type Dirs struct {
	root string
}

// Open makes ROOT/snapshots if it is not there. Only root may look into it.
func Open(root string) (*Dirs, error) {
	d := &Dirs{root: filepath.Join(root, "snapshots")}
	if err := os.MkdirAll(d.root, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make directory of snapshots: %w", err)
	}
	return d, nil
}

// Path is where the snapshot's directory is.
func (d *Dirs) Path(id uint64) string { return filepath.Join(d.root, strconv.FormatUint(id, 10)) }

// Make makes the directory; what may be there with this id is left of a crash and has no owner.
func (d *Dirs) Make(id uint64) (string, error) {
	path := d.Path(id)
	err := os.Mkdir(path, 0o700)
	if errors.Is(err, fs.ErrExist) {
		if err := d.Remove(id); err != nil {
			return "", err
		}
		err = os.Mkdir(path, 0o700)
	}
	return path, err
}

// Remove deletes it; none there is no error.
func (d *Dirs) Remove(id uint64) error {
	doomed := filepath.Join(d.root, removed+strconv.FormatUint(id, 10))
	if _, err := os.Lstat(doomed); err == nil {
		if err := os.RemoveAll(doomed); err != nil {
			return err
		}
	}
	err := os.Rename(d.Path(id), doomed)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.RemoveAll(doomed)
}

// Sweep removes what keep does not want. Names that are not of ours are left alone.
func (d *Dirs) Sweep(ctx context.Context, keep func(id uint64) bool) error {
	entries, err := os.ReadDir(d.root)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if strings.HasPrefix(e.Name(), removed) {
			errs = append(errs, os.RemoveAll(filepath.Join(d.root, e.Name())))
			continue
		}
		id, err := strconv.ParseUint(e.Name(), 10, 64)
		if err != nil || strconv.FormatUint(id, 10) != e.Name() {
			slog.Warn("something that is no snapshot stands among them", "path", filepath.Join(d.root, e.Name()))
			continue
		}
		if !keep(id) {
			errs = append(errs, d.Remove(id))
		}
	}
	return errors.Join(errs...)
}
