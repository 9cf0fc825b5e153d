// Package metadata owns metadata.db: opening it, its schema version, transactions and the layout of its buckets. What
// stands in a bucket belongs to the package of that noun (containers, images, ...); see schema.go for the drawing.
package metadata

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// DB is the open database. Close it when every transaction has ended.
type DB struct {
	bolt  *bolt.DB
	group group
}

// Tx is one transaction; it is valid only inside the function it was passed to.
type Tx struct {
	*bolt.Tx
}

// View runs fn in a read-only transaction on a consistent snapshot.
func (db *DB) View(fn func(*Tx) error) error {
	return db.bolt.View(func(tx *bolt.Tx) error { return fn(&Tx{tx}) })
}

// Update runs fn, once, in a read-write transaction; it is on disk when Update returns nil, and undone on an error.
// Writers that wait for each other share a commit (see group). fn must not call Update or Batch.
func (db *DB) Update(fn func(*Tx) error) error { return db.group.do(db.bolt, fn, true) }

// Batch is Update for an fn that may run again: any number of them share a commit, and when one fails the others are
// repeated without it. So fn must touch nothing but the transaction and variables that it sets anew in each run.
func (db *DB) Batch(fn func(*Tx) error) error { return db.group.do(db.bolt, fn, false) }

// Close releases the file.
func (db *DB) Close() error { return db.bolt.Close() }

// Bucket finds the bucket at path (see schema.go), nil when it is not there. Use the path builders, not literals.
func (tx *Tx) Bucket(path ...string) *bolt.Bucket {
	if len(path) == 0 {
		return nil
	}
	b := tx.Tx.Bucket([]byte(path[0]))
	for _, p := range path[1:] {
		if b == nil {
			return nil
		}
		b = b.Bucket([]byte(p))
	}
	return b
}

// MakeBucket finds or makes the bucket at path.
func (tx *Tx) MakeBucket(path ...string) (*bolt.Bucket, error) {
	b, err := tx.CreateBucketIfNotExists([]byte(path[0]))
	for _, p := range path[1:] {
		if err != nil {
			break
		}
		b, err = b.CreateBucketIfNotExists([]byte(p))
	}
	if err != nil {
		return nil, fmt.Errorf("cannot make bucket %q: %w", path, err)
	}
	return b, nil
}

// Open opens or makes the database at path. A database of a newer schema is refused with FailedPrecondition, one that
// another process holds with Unavailable, a damaged one with DataLoss.
func Open(path string) (db *DB, err error) {
	defer func() {
		if p := recover(); p != nil { // how bolt reports pages that make no sense
			db, err = nil, fmt.Errorf("cannot open %s: %v: %w", path, p, errdefs.ErrDataLoss)
		}
	}()
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("cannot make directory of %s: %w", path, err)
	}
	b, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 5 * time.Second, FreelistType: bolt.FreelistMapType})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("cannot open %s: another process has it open: %w", path, errdefs.ErrUnavailable)
	}
	if errors.Is(err, bolterrors.ErrInvalid) || errors.Is(err, bolterrors.ErrChecksum) || errors.Is(err, bolterrors.ErrVersionMismatch) {
		return nil, fmt.Errorf("cannot open %s: %w: %w", path, err, errdefs.ErrDataLoss)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	db = &DB{bolt: b}
	if err := db.Update(migrate); err != nil {
		_ = b.Close()
		return nil, fmt.Errorf("cannot use %s: %w", path, err)
	}
	return db, nil
}
