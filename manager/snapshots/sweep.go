package snapshots

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/metadata"
)

// ids gives out IDs and remembers for which of them storage may be there without a record yet.
type ids struct {
	mu      sync.Mutex
	last    uint64
	pending map[uint64]bool
}

func (i *ids) take() uint64 {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.pending == nil {
		i.pending = map[uint64]bool{}
	}
	i.last++
	i.pending[i.last] = true
	return i.last
}

func (i *ids) done(id uint64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.pending, id)
}

func (i *ids) now() (last uint64, pending map[uint64]bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.last, maps.Clone(i.pending)
}

// gap is how many IDs are passed over at the start of a snapshotter whose storage is not looked at before it is used: so
// many snapshots may have been under way when the daemon died.
const gap = 1000

// open finds out where IDs continue and sweeps what has no record. A record that cannot be read stops the sweep, not
// the snapshotter.
func (s *store) open(ctx context.Context) error {
	if err := s.restore(); err != nil {
		return err
	}
	var have map[uint64]bool
	err := s.db.View(func(tx *metadata.Tx) (err error) {
		s.ids.last = highest(tx.Bucket(marks), s.name)
		have, err = used(tx, s.name)
		return err
	})
	keepAll := err != nil
	if keepAll {
		slog.Error("a snapshot's record cannot be read; unused storage is not freed", "snapshotter", s.name, "error", err)
	}
	for id := range have {
		s.ids.last = max(s.ids.last, id)
	}
	if r, err := s.db.Recovery(); err != nil || r != nil {
		keepAll = true // what has no record may be what the record was lost of
	}
	if _, remote := s.backend.(Remote); remote {
		s.ids.last += gap
		if !keepAll {
			s.later.do(func() {
				if err := s.sweep(context.Background()); err != nil {
					slog.Warn("unused storage of a snapshotter is not freed; cleanup tries again", "snapshotter", s.name, "error", err)
				}
			})
		}
		return nil
	}
	return s.backend.Sweep(ctx, func(id uint64) bool {
		s.ids.last = max(s.ids.last, id)
		return keepAll || have[id]
	})
}

// Cleanup works beside requests: storage that is being made has an ID that is pending, or later than the sweep.
func (s *store) Cleanup(ctx context.Context) error {
	if r, err := s.db.Recovery(); err != nil {
		return fmt.Errorf("cannot clean up snapshotter %s: %w", s.name, err)
	} else if r != nil {
		return fmt.Errorf("cannot clean up snapshotter %s: the database is being recovered, `mctl fsck` says how; storage without a record may be in use: %w", s.name, errdefs.ErrFailedPrecondition)
	}
	s.later.wait()
	return s.sweep(ctx)
}

// sweep frees what has no record.
func (s *store) sweep(ctx context.Context) error {
	last, pending := s.ids.now() // before the records are read: what is not pending any more has its record
	var have map[uint64]bool
	err := s.db.View(func(tx *metadata.Tx) (err error) {
		have, err = used(tx, s.name)
		return err
	})
	if err != nil {
		return fmt.Errorf("cannot clean up snapshotter %s: %w", s.name, err)
	}
	err = s.backend.Sweep(ctx, func(id uint64) bool { return id > last || pending[id] || have[id] })
	if err != nil {
		return fmt.Errorf("cannot clean up snapshotter %s: %w", s.name, err)
	}
	return nil
}
