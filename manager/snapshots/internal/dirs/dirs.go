// Package dirs keeps one directory (or whatever a snapshotter puts there) per snapshot, ROOT/snapshots/ID, and beside it what the store wants to be noted of each, ROOT/notes/ID. It must not know what is in them.
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
	root, notes string
	delete      func(path string) error
}

// Open makes ROOT/snapshots if it is not there. Only root may look into it.
func Open(root string) (*Dirs, error) { return OpenWith(root, os.RemoveAll) }

// OpenWith is Open for things that are deleted by other means; delete gets the path of one, and none there is no error.
func OpenWith(root string, delete func(path string) error) (*Dirs, error) {
	d := &Dirs{delete: delete, root: filepath.Join(root, "snapshots"), notes: filepath.Join(root, "notes")}
	for _, dir := range []string{d.root, d.notes} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("cannot make directory of snapshots: %w", err)
		}
	}
	return d, nil
}

// Path is where the snapshot's directory is.
func (d *Dirs) Path(id uint64) string { return filepath.Join(d.root, strconv.FormatUint(id, 10)) }

// Make makes the directory.
func (d *Dirs) Make(id uint64) (string, error) {
	path, err := d.Place(id)
	if err != nil {
		return "", err
	}
	return path, os.Mkdir(path, 0o700)
}

// Place gives the path of something to be made: what may be there with this id is left of a crash and has no owner.
func (d *Dirs) Place(id uint64) (string, error) {
	path := d.Path(id)
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return path, nil
	}
	return path, d.Remove(id)
}

// Remove deletes it; none there is no error.
func (d *Dirs) Remove(id uint64) error {
	if err := os.Remove(d.note(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	doomed := filepath.Join(d.root, removed+strconv.FormatUint(id, 10))
	if _, err := os.Lstat(doomed); err == nil {
		if err := d.delete(doomed); err != nil {
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
	return d.delete(doomed)
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
			errs = append(errs, d.delete(filepath.Join(d.root, e.Name())))
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

func (d *Dirs) note(id uint64) string { return filepath.Join(d.notes, strconv.FormatUint(id, 10)) }

// Note keeps a note of a snapshot, over an earlier one. It is not synced: a power cut may leave none, or a part.
func (d *Dirs) Note(id uint64, note []byte) error { return os.WriteFile(d.note(id), note, 0o600) }

// Notes calls fn for every directory, with what was noted of it; nil for nothing.
func (d *Dirs) Notes(fn func(id uint64, note []byte) error) error {
	entries, err := os.ReadDir(d.root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		id, err := strconv.ParseUint(e.Name(), 10, 64)
		if err != nil || strconv.FormatUint(id, 10) != e.Name() {
			continue
		}
		note, err := os.ReadFile(d.note(id))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := fn(id, note); err != nil {
			return err
		}
	}
	return nil
}
