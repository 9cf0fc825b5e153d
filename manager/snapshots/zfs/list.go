package zfs

import (
	"context"
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
