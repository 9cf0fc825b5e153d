package metadata

import (
	"sync"
	"time"
)

// Change says that a transaction wrote or removed the record of an object, or what an object refers to.
type Change struct {
	Namespace string
	Kind      string // Containers, Sandboxes, Images, Leases, Content, Mounts; for a snapshot SnapshotKind of its snapshotter
	Key       string
	Removed   bool
	Expires   time.Time // when it ends by itself; zero: not
}

// SnapshotKind is the Kind of the snapshots of one snapshotter.
func SnapshotKind(snapshotter string) string { return Snapshots + "/" + snapshotter }

// Changed notes a change, for those who watch. Whoever writes a record that refers to others, or is referred to, calls it
// in the same transaction.
func (tx *Tx) Changed(c Change) {
	if tx.changes != nil {
		*tx.changes = append(*tx.changes, c)
	}
}

// Changes gives what was noted in this transaction so far, also by others that share it (see DB.Batch).
func (tx *Tx) Changes() []Change {
	if tx.changes == nil {
		return nil
	}
	return *tx.changes
}

// watchers are told of every commit.
type watchers struct {
	mu  sync.Mutex
	fns map[*func([]Change)]bool
}

// Watch calls fn with the changes of every transaction that is committed from now on, in order, and before the next one
// begins: fn must be quick and must not use the database. The function it returns ends that.
func (db *DB) Watch(fn func([]Change)) (stop func()) {
	w := &db.group.watchers
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fns == nil {
		w.fns = map[*func([]Change)]bool{}
	}
	w.fns[&fn] = true
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.fns, &fn)
	}
}

func (w *watchers) tell(changes []Change) {
	if len(changes) == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for fn := range w.fns {
		(*fn)(changes)
	}
}
