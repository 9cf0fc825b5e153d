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
)

// DB is the open database. Close it when every transaction has ended.
type DB struct {
	bolt *bolt.DB
}

// Tx is one transaction; it is valid only inside the function it was passed to.
type Tx struct {
	*bolt.Tx
}

// View runs fn in a read-only transaction on a consistent snapshot.
func (db *DB) View(fn func(*Tx) error) error {
	return db.bolt.View(func(tx *bolt.Tx) error { return fn(&Tx{tx}) })
}

// Update runs fn in the one read-write transaction; it is on disk when Update returns nil, and undone on an error.
func (db *DB) Update(fn func(*Tx) error) error {
	return db.bolt.Update(func(tx *bolt.Tx) error { return fn(&Tx{tx}) })
}

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
// another process holds with Unavailable.
func Open(path string) (*DB, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("cannot make directory of %s: %w", path, err)
	}
	b, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 5 * time.Second, FreelistType: bolt.FreelistMapType})
	if errors.Is(err, bolt.ErrTimeout) {
		return nil, fmt.Errorf("cannot open %s: another process has it open: %w", path, errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	db := &DB{bolt: b}
	if err := db.Update(migrate); err != nil {
		_ = b.Close()
		return nil, fmt.Errorf("cannot use %s: %w", path, err)
	}
	return db, nil
}
