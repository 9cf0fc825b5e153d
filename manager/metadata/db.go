// Package metadata owns metadata.db: opening it, its schema version, transactions and the layout of its buckets. What
// stands in a bucket belongs to the package of that noun (containers, images, ...); see schema.go for the drawing.
package metadata

import (
	"errors"
	"fmt"
	"runtime/debug"

	bolt "go.etcd.io/bbolt"
)

// DB is the open database. Close it when every transaction has ended.
type DB struct {
	bolt  *bolt.DB
	group group
	stamp *stamp
	older string // why it is not the database that was last open here; empty: it is
}

// Tx is one transaction; it is valid only inside the function it was passed to.
type Tx struct {
	*bolt.Tx
	changes *[]Change // nil in a transaction that only reads
}

// View runs fn in a read-only transaction on a consistent snapshot. A page that cannot be read makes it fail with DataLoss.
func (db *DB) View(fn func(*Tx) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		p := recover()
		switch {
		case p == nil:
		case fromBolt(p):
			err = damageOf(p)
		default:
			panic(p)
		}
	}()
	return db.bolt.View(func(tx *bolt.Tx) error { return fn(&Tx{Tx: tx}) })
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
	err := db.bolt.Close()
	if db.stamp != nil {
		err = errors.Join(err, db.stamp.file.Close())
	}
	return err
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
