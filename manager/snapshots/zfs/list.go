package zfs

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// IDs lists what is stored, in order. File systems whose names are no numbers are somebody else's.
func (b *Backend) IDs(ctx context.Context) ([]uint64, error) {
	out, err := b.run(ctx, "list", "-H", "-r", "-d", "1", "-t", "filesystem", "-o", "name", b.dataset)
	if err != nil {
		return nil, err
	}
	var ids []uint64
	for line := range strings.Lines(out) {
		name, ok := strings.CutPrefix(strings.TrimSpace(line), b.dataset+"/")
		if id, err := strconv.ParseUint(name, 10, 64); ok && err == nil {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

func (b *Backend) note(id uint64) string { return filepath.Join(b.notes, strconv.FormatUint(id, 10)) }

// Note keeps a note of a snapshot in the dataset of the root, see snapshots.Noter.
func (b *Backend) Note(id uint64, note []byte) error { return os.WriteFile(b.note(id), note, 0o600) }

// Notes gives the snapshots that there are, and what was noted of them.
func (b *Backend) Notes(fn func(id uint64, note []byte) error) error {
	ids, err := b.IDs(context.Background())
	if err != nil {
		return err
	}
	for _, id := range ids {
		note, err := os.ReadFile(b.note(id))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := fn(id, note); err != nil {
			return err
		}
	}
	return nil
}
