package snapshots

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/metadata"
	records "github.com/managerd/managerd/protos/metadata"
)

// Noter is a Backend that keeps a note beside the storage of each snapshot: the records can be made again from the notes
// when the database is lost. Of others what the database does not know stays unknown.
type Noter interface {
	// Note keeps note, in place of an earlier one. It goes with the storage.
	Note(id uint64, note []byte) error
	// Notes calls fn for everything that is stored, with its note; nil when there is none.
	Notes(fn func(id uint64, note []byte) error) error
}

// noted is a bucket at the top of the database: SNAPSHOTTER → empty, once every snapshot of it has a note.
const noted = "snapshot-notes"

// note keeps a record beside the storage. One that could not be kept is lost with the database only.
func (s *store) note(ns, key string, r *records.Snapshot) {
	n, ok := s.backend.(Noter)
	if !ok {
		return
	}
	data, err := metadata.Seal(&records.SnapshotNote{Version: 1, Namespace: ns, Key: key, Record: r})
	if err == nil {
		err = n.Note(r.Id, data)
	}
	if err != nil {
		slog.Warn("cannot note what a snapshot is", "snapshotter", s.name, "namespace", ns, "key", key, "error", err)
	}
}

// found is a note, and what it stands beside.
type found struct {
	ns, key string
	r       *records.Snapshot
}

// restore makes the records again from the notes, when the database has been lost or is older than they are; when it has
// not, it makes the notes of snapshots that an older version has made without.
func (s *store) restore() error {
	n, ok := s.backend.(Noter)
	if !ok {
		return nil
	}
	part := metadata.PartSnapshots + s.name
	on, err := s.db.Recovering(part)
	if err != nil {
		return err
	}
	if !on {
		return s.noteAll()
	}
	var all []found
	var unknown []uint64
	stored := map[uint64]bool{}
	err = n.Notes(func(id uint64, note []byte) error {
		stored[id] = true
		var sn records.SnapshotNote
		if err := metadata.Unseal(note, &sn); err != nil || sn.Record == nil || sn.Record.Id != id || sn.Key == "" || sn.Namespace == "" {
			unknown = append(unknown, id)
			return nil
		}
		all = append(all, found{sn.Namespace, sn.Key, sn.Record})
		return nil
	})
	if err != nil {
		return err
	}
	var notes []string
	err = s.db.Update(func(tx *metadata.Tx) error {
		made, err := s.reconcile(tx, all, stored)
		notes = made
		return err
	})
	if err != nil {
		return fmt.Errorf("cannot make the records of snapshots again: %w", err)
	}
	known, err := s.have()
	if err != nil {
		slog.Error("a snapshot's record cannot be read", "snapshotter", s.name, "error", err)
	}
	for _, id := range unknown {
		if !known[id] {
			notes = append(notes, fmt.Sprintf("%s snapshot %d is stored, and nobody knows its name; it is kept", s.name, id))
		}
	}
	for _, text := range notes {
		slog.Warn("recovery of snapshots", "what", text)
	}
	return s.db.Recovered(part, notes...)
}

// reconcile makes the records what the notes say, and drops those of which nothing is stored.
func (s *store) reconcile(tx *metadata.Tx, all []found, stored map[uint64]bool) (notes []string, err error) {
	type at struct{ ns, key string }
	have := map[at]*records.Snapshot{}
	if spaces := tx.Bucket(metadata.Path()...); spaces != nil {
		err := spaces.ForEachBucket(func(ns []byte) error {
			return metadata.Each(table{tx, string(ns), s.name}.bucket(), func(key string, r *records.Snapshot) error {
				have[at{string(ns), key}] = r
				return nil
			})
		})
		if err != nil {
			return nil, err
		}
	}
	byNote := map[uint64]at{}
	for _, f := range all {
		byNote[f.r.Id] = at{f.ns, f.key}
	}
	dropped := 0
	for a, r := range have {
		if is, ok := byNote[r.Id]; stored[r.Id] && (!ok || is == a) {
			continue
		}
		if err := (table{tx, a.ns, s.name}).delete(a.key, r); err != nil {
			return nil, err
		}
		delete(have, a)
		dropped++
	}
	if dropped > 0 {
		notes = append(notes, fmt.Sprintf("%d %s snapshots of the database are not stored any more, or are another one by now; their records are gone", dropped, s.name))
	}
	made := 0
	slices.SortFunc(all, func(a, b found) int { return int(int64(b.r.Id) - int64(a.r.Id)) }) // of two of one name the later is right
	for _, f := range all {
		a := at{f.ns, f.key}
		old := have[a]
		if old != nil && old.Id != f.r.Id {
			if byNote[old.Id] == a { // it came first in this loop
				continue
			}
			if err := (table{tx, a.ns, s.name}).delete(a.key, old); err != nil {
				return nil, err
			}
			old = nil
		}
		if old != nil && old.Parent == f.r.Parent && old.Kind == f.r.Kind && maps.Equal(old.Labels, f.r.Labels) {
			continue
		}
		t := table{tx, f.ns, s.name}
		if err := t.put(f.key, f.r); err != nil {
			return nil, err
		}
		if err := t.mark(f.r.Id); err != nil {
			return nil, err
		}
		have[a] = f.r
		made++
	}
	if made > 0 {
		notes = append(notes, fmt.Sprintf("the records of %d %s snapshots were made again", made, s.name))
	}
	return notes, nil
}

// noteAll notes what every snapshot is, once.
func (s *store) noteAll() error {
	var all []found
	done := false
	err := s.db.View(func(tx *metadata.Tx) error {
		if b := tx.Bucket(noted); b != nil && b.Get([]byte(s.name)) != nil {
			done = true
			return nil
		}
		var err error
		all, err = s.all(tx)
		return err
	})
	if err != nil || done {
		return err
	}
	for _, f := range all {
		s.note(f.ns, f.key, f.r)
	}
	return s.db.Update(func(tx *metadata.Tx) error {
		b, err := tx.MakeBucket(noted)
		if err != nil {
			return err
		}
		return b.Put([]byte(s.name), []byte{})
	})
}

// Stored is something that a snapshotter stores.
type Stored struct {
	ID             uint64
	Namespace, Key string // as it was noted; empty: nobody knows
}

// Unknown gives what a snapshotter stores without a record; nil for a snapshotter that keeps no notes. What is being made
// is not in it.
func (s *Store) Unknown(name string) ([]Stored, error) {
	st := s.find(name)
	if st == nil {
		return nil, nil
	}
	n, ok := st.backend.(Noter)
	if !ok {
		return nil, nil
	}
	st.later.wait() // what is being removed is nobody's, and not unknown
	last, pending := st.ids.now()
	have, err := st.have()
	if err != nil {
		return nil, err
	}
	var out []Stored
	err = n.Notes(func(id uint64, note []byte) error {
		if have[id] || pending[id] || id > last {
			return nil
		}
		u := Stored{ID: id}
		var sn records.SnapshotNote
		if metadata.Unseal(note, &sn) == nil {
			u.Namespace, u.Key = sn.Namespace, sn.Key
		}
		out = append(out, u)
		return nil
	})
	return out, err
}

// Missing gives the namespaces and keys of the records of which nothing is stored.
func (s *Store) Missing(name string) ([]Stored, error) {
	st := s.find(name)
	if st == nil {
		return nil, nil
	}
	n, ok := st.backend.(Noter)
	if !ok {
		return nil, nil
	}
	var records []found
	if err := s.db.View(func(tx *metadata.Tx) (err error) { records, err = st.all(tx); return err }); err != nil {
		return nil, err
	}
	stored := map[uint64]bool{} // behind the records: storage is made first
	if err := n.Notes(func(id uint64, _ []byte) error { stored[id] = true; return nil }); err != nil {
		return nil, err
	}
	var out []Stored
	for _, f := range records {
		if !stored[f.r.Id] {
			out = append(out, Stored{f.r.Id, f.ns, f.key})
		}
	}
	return out, nil
}

// Free removes what is stored without a record. FailedPrecondition when it has one by now.
func (s *Store) Free(ctx context.Context, name string, id uint64) error {
	unknown, err := s.Unknown(name)
	if err != nil {
		return err
	}
	for _, u := range unknown {
		if u.ID == id {
			return s.find(name).backend.Remove(ctx, Snapshot{Ref: Ref{ID: id, Namespace: u.Namespace, Key: u.Key}})
		}
	}
	return fmt.Errorf("%s snapshot %d is not stored, or has a record: %w", name, id, errdefs.ErrFailedPrecondition)
}

func (s *store) have() (have map[uint64]bool, err error) {
	err = s.db.View(func(tx *metadata.Tx) (err error) { have, err = used(tx, s.name); return err })
	return have, err
}

// all gives every record of the snapshotter that can be read.
func (s *store) all(tx *metadata.Tx) (out []found, err error) {
	err = tx.Bucket(metadata.Path()...).ForEachBucket(func(ns []byte) error {
		return metadata.Each(table{tx, string(ns), s.name}.bucket(), func(key string, r *records.Snapshot) error {
			out = append(out, found{string(ns), key, r})
			return nil
		})
	})
	return out, err
}
