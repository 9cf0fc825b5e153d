// Package metadata owns metadata.db: opening it, its schema version, transactions and the layout of its buckets. What
// stands in a bucket belongs to the package of that noun (containers, images, ...); see schema.go for the drawing.
package metadata

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// DB is the open database. Close it when every transaction has ended.
type DB struct {
	bolt  *bolt.DB
	box   *outbox
	group group
}

// Tx is one transaction; it is valid only inside the function it was passed to.
type Tx struct {
	*bolt.Tx
	box  *outbox
	told []told
}

// View runs fn in a read-only transaction on a consistent snapshot.
func (db *DB) View(fn func(*Tx) error) error {
	return db.bolt.View(func(tx *bolt.Tx) error { return fn(&Tx{Tx: tx, box: db.box}) })
}

// Update runs fn, once, in a read-write transaction; it is on disk when Update returns nil, and undone on an error.
// Writers that wait for each other share a commit (see group). fn must not call Update or Batch.
func (db *DB) Update(fn func(*Tx) error) error { return db.group.do(db, fn, true) }

// Batch is Update for an fn that may run again: any number of them share a commit, and when one fails the others are
// repeated without it. So fn must touch nothing but the transaction and variables that it sets anew in each run.
func (db *DB) Batch(fn func(*Tx) error) error { return db.group.do(db, fn, false) }

// MaxKey is the longest key of a bucket, in bytes.
const MaxKey = bolt.MaxKeySize

// Close releases the file.
func (db *DB) Close() error {
	db.box.close()
	return db.bolt.Close()
}

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
func Open(path string) (_ *DB, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("cannot make directory of %s: %w", path, err)
	}
	var b *bolt.DB
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // what lies beyond the end of a short file cannot be read
	defer func() {
		if p := recover(); p != nil { // how bolt reports pages that make no sense
			err = fmt.Errorf("%v: %w", p, errdefs.ErrDataLoss)
		}
		if err == nil {
			return
		}
		if errdefs.IsDataLoss(err) {
			err = fmt.Errorf("it is damaged, restore a copy or move it away: %w", err)
		}
		err = fmt.Errorf("cannot open %s: %w", path, err)
		if b != nil {
			_ = b.Close()
		}
	}()
	b, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, FreelistType: bolt.FreelistMapType})
	var sys *fs.PathError
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("another process has it open: %w", errdefs.ErrUnavailable)
	case errors.As(err, &sys):
		return nil, sys.Err
	case err != nil: // the rest is what bolt says of files that are no databases
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if err := whole(b, path); err != nil {
		return nil, err
	}
	db := &DB{bolt: b, box: newOutbox()}
	if err := db.Update(func(tx *Tx) error { return migrate(tx, Schema, upgrades) }); err != nil {
		return nil, err
	}
	return db, nil
}

// whole checks that the file has all the pages that are in use: to read one that is missing would end the process.
func whole(b *bolt.DB, path string) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	return b.View(func(tx *bolt.Tx) error {
		if fi.Size() < tx.Size() {
			return fmt.Errorf("file has %d bytes, of at least %d: %w", fi.Size(), tx.Size(), errdefs.ErrDataLoss)
		}
		return nil
	})
}
