package dirs

import (
	"context"

	"github.com/managerd/managerd/manager/snapshots"
)

// Keeper is the part of a snapshots.Backend that is about its directories only. Backends embed it.
type Keeper struct{ Dirs *Dirs }

// Remove deletes what there is of a snapshot.
func (k Keeper) Remove(_ context.Context, s snapshots.Snapshot) error { return k.Dirs.Remove(s.ID) }

// Sweep deletes what nobody keeps.
func (k Keeper) Sweep(ctx context.Context, keep func(id uint64) bool) error {
	return k.Dirs.Sweep(ctx, keep)
}

// Note keeps a note beside a snapshot, see snapshots.Noter.
func (k Keeper) Note(id uint64, note []byte) error { return k.Dirs.Note(id, note) }

// Notes gives the snapshots that there are, and what was noted of them.
func (k Keeper) Notes(fn func(id uint64, note []byte) error) error { return k.Dirs.Notes(fn) }

// Close has nothing to do.
func (k Keeper) Close() error { return nil }
