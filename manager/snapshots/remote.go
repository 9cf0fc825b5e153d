package snapshots

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/leases"
	records "github.com/managerd/managerd/protos/metadata"
)

// Remote is a Backend whose storage is another program's: nothing waits for it at the start or at the end.
type Remote interface {
	Remote()
}

// ErrStored is what Create of a Remote may answer when LabelRef is set: the target is stored already, committed, under the
// Ref of the snapshot with that name for its Key, and nothing else was made.
var ErrStored = errors.New("the target is stored")

// adopt records the target that a Remote has stored by itself, and answers as when it had been there: AlreadyExists.
func (s *store) adopt(ctx context.Context, snap Snapshot, parent string) error {
	key, name := snap.Key, snap.Labels[LabelRef]
	snap.Key, snap.Kind = name, Committed
	usage, err := s.backend.Usage(ctx, snap)
	if err == nil {
		err = s.update(ctx, func(t table) error {
			if err := t.absent(name); err != nil {
				return err
			}
			if _, err := t.parents(parent); err != nil {
				return err
			}
			now := time.Now().UnixNano()
			r := &records.Snapshot{
				Id: snap.ID, Kind: string(Committed), Parent: parent, Labels: snap.Labels, CreatedAt: now, UpdatedAt: now,
				Inodes: usage.Inodes, Size_: usage.Size,
			}
			if err := t.put(name, r); err != nil {
				return err
			}
			if err := t.mark(snap.ID); err != nil {
				return err
			}
			if err := leases.Attach(ctx, t.tx, t.ns, leases.Resource{ID: name, Type: leases.Snapshots + s.name}); err != nil {
				return err
			}
			return s.publish(ctx, t, "/snapshot/commit", &events.SnapshotCommit{Key: key, Name: name, Snapshotter: s.name})
		})
	}
	if err != nil {
		s.free(snap)
		return err
	}
	return fmt.Errorf("target: %s snapshot %q: %w", s.name, name, errdefs.ErrAlreadyExists)
}
