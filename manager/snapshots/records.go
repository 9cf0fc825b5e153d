package snapshots

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/managerd/managerd/manager/metadata"
	records "github.com/managerd/managerd/protos/metadata"
)

const (
	// children indexes who stands on whom, beside the snapshots: SNAPSHOTTER/PARENT NUL CHILD → empty.
	children = "snapshot-children"
	// marks is a bucket at the top of the database: SNAPSHOTTER → the highest ID that was given out, big endian.
	marks = "snapshot-ids"
)

// table is the bucket of one snapshotter in one namespace, inside one transaction.
type table struct {
	tx       *metadata.Tx
	ns, name string
}

func (t table) bucket() *bolt.Bucket {
	return t.tx.Bucket(metadata.Path(t.ns, metadata.Snapshots, t.name)...)
}

func (t table) get(key string) (*records.Snapshot, error) {
	r := &records.Snapshot{}
	if err := metadata.Get(t.bucket(), key, r); err != nil {
		return nil, fmt.Errorf("%s snapshot %w", t.name, err)
	}
	return r, nil
}

// absent is an error when key is taken.
func (t table) absent(key string) error {
	if b := t.bucket(); b != nil && b.Get([]byte(key)) != nil {
		return fmt.Errorf("%s snapshot %q: %w", t.name, key, errdefs.ErrAlreadyExists)
	}
	return nil
}

// put writes a record and its place in the index.
func (t table) put(key string, r *records.Snapshot) error {
	b, err := t.tx.MakeBucket(metadata.Path(t.ns, metadata.Snapshots, t.name)...)
	if err != nil {
		return err
	}
	if r.Parent != "" {
		idx, err := t.tx.MakeBucket(metadata.Path(t.ns, children, t.name)...)
		if err != nil {
			return err
		}
		if err := idx.Put(childKey(r.Parent, key), []byte{}); err != nil {
			return err
		}
	}
	t.tx.Changed(metadata.Change{Namespace: t.ns, Kind: metadata.SnapshotKind(t.name), Key: key})
	return metadata.Put(b, key, r)
}

// delete removes both, and the buckets when they are empty: a namespace without snapshots must look like one.
func (t table) delete(key string, r *records.Snapshot) error {
	if err := t.bucket().Delete([]byte(key)); err != nil {
		return err
	}
	t.tx.Changed(metadata.Change{Namespace: t.ns, Kind: metadata.SnapshotKind(t.name), Key: key, Removed: true})
	if err := t.prune(metadata.Snapshots); err != nil || r.Parent == "" {
		return err
	}
	if idx := t.tx.Bucket(metadata.Path(t.ns, children, t.name)...); idx != nil {
		if err := idx.Delete(childKey(r.Parent, key)); err != nil {
			return err
		}
	}
	return t.prune(children)
}

// forget deletes a snapshot that has no children, and gives what its storage goes by.
func (t table) forget(key string) (Snapshot, error) {
	r, err := t.get(key)
	if err != nil {
		return Snapshot{}, err
	}
	if child, ok := t.child(key); ok {
		return Snapshot{}, fmt.Errorf("snapshot %q stands on it: %w", child, errdefs.ErrFailedPrecondition)
	}
	snap, err := t.snapshot(key, r)
	if err != nil {
		// A parent whose record is damaged must not keep this one for ever.
		snap = Snapshot{Ref: Ref{ID: r.Id, Namespace: t.ns, Key: key}, Kind: Kind(r.Kind)}
	}
	return snap, t.delete(key, r)
}

func (t table) prune(kind string) error {
	all := t.tx.Bucket(metadata.Path(t.ns, kind)...)
	if all == nil {
		return nil
	}
	if b := all.Bucket([]byte(t.name)); b != nil {
		if k, _ := b.Cursor().First(); k == nil {
			return all.DeleteBucket([]byte(t.name))
		}
	}
	return nil
}

func childKey(parent, child string) []byte { return []byte(parent + "\x00" + child) }

// child gives one of those that stand on key.
func (t table) child(key string) (string, bool) {
	idx := t.tx.Bucket(metadata.Path(t.ns, children, t.name)...)
	if idx == nil {
		return "", false
	}
	prefix := childKey(key, "")
	k, _ := idx.Cursor().Seek(prefix)
	if !bytes.HasPrefix(k, prefix) {
		return "", false
	}
	return string(k[len(prefix):]), true
}

// snapshot is what the backend is told of key.
func (t table) snapshot(key string, r *records.Snapshot) (Snapshot, error) {
	s := Snapshot{
		Ref:  Ref{ID: r.Id, Namespace: t.ns, Key: key},
		Kind: Kind(r.Kind), Labels: maps.Clone(r.Labels),
	}
	var err error
	s.Parents, err = t.parents(r.Parent)
	return s, err
}

// parents gives the chain that begins with key.
func (t table) parents(key string) ([]Ref, error) {
	var out []Ref
	for key != "" {
		r, err := t.get(key)
		if err != nil {
			return nil, fmt.Errorf("parent: %w", err)
		}
		if Kind(r.Kind) != Committed {
			return nil, fmt.Errorf("parent %s snapshot %q is %s, not committed: %w", t.name, key, r.Kind, errdefs.ErrInvalidArgument)
		}
		out = append(out, Ref{ID: r.Id, Namespace: t.ns, Key: key})
		key = r.Parent
	}
	return out, nil
}

// mark notes that id was given out.
func (t table) mark(id uint64) error {
	b, err := t.tx.MakeBucket(marks)
	if err != nil {
		return err
	}
	if highest(b, t.name) >= id {
		return nil
	}
	return b.Put([]byte(t.name), binary.BigEndian.AppendUint64(nil, id))
}

func highest(b *bolt.Bucket, name string) uint64 {
	if b == nil {
		return 0
	}
	if v := b.Get([]byte(name)); len(v) == 8 {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

// used finds the IDs of every namespace. DataLoss when a record cannot be read: then nothing may be swept.
func used(tx *metadata.Tx, name string) (map[uint64]bool, error) {
	out := map[uint64]bool{}
	spaces := tx.Bucket(metadata.Path()...)
	if spaces == nil {
		return out, nil
	}
	err := spaces.ForEachBucket(func(ns []byte) error {
		b := tx.Bucket(metadata.Path(string(ns), metadata.Snapshots, name)...)
		return metadata.EachStrict(b, func(_ string, r *records.Snapshot) error {
			out[r.Id] = true
			return nil
		})
	})
	return out, err
}

func info(key string, r *records.Snapshot) Info {
	return Info{
		Kind: Kind(r.Kind), Name: key, Parent: r.Parent, Labels: r.Labels,
		Created: metadata.Time(r.CreatedAt), Updated: metadata.Time(r.UpdatedAt),
	}
}
