package metadata

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// Schema is the version that this code writes. Version n reads n and n-1, and a newer one that says so.
//
//	schema/version                  uint32, little endian
//	schema/readable-by              uint32, little endian: the oldest version that may read and write the database as it is
//	identity/id                     16 bytes that no other database has
//	recovery/record                 metadata.Recovery: what was damaged and is to be made again, see recovery.go
//	v1/
//	  NAMESPACE/
//	    labels/                     KEY → value: the namespace's own labels
//	    containers/                 ID → metadata.Container
//	    images/                     NAME → metadata.Image
//	    sandboxes/                  ID → metadata.Sandbox
//	    leases/                     ID → metadata.Lease
//	    lease-resources/LEASE/      TYPE NUL ID → empty: what the lease keeps
//	    content/                    DIGEST → metadata.Blob
//	    snapshots/SNAPSHOTTER/      KEY → metadata.Snapshot
//	    snapshot-children/SNAPSHOTTER/
//	                                PARENT NUL CHILD → empty: who stands on whom
//	outbox/                         uint64, big endian → eventlog.Event: of a change, not handed on yet or just now
//	snapshot-ids/                   SNAPSHOTTER → uint64, big endian: the highest id that was given out
const Schema = 1

// readableBy is the oldest version that may work with what this code writes. Raise it with a change that an older version
// would misread or destroy; a version behind it then refuses the database instead.
const readableBy = 1

const root = "v1"

var (
	schemaBucket, schemaKey, readableKey = []byte("schema"), []byte("version"), []byte("readable-by")
	outboxBucket                         = []byte("outbox")
)

// The kinds of object kept per namespace.
const (
	Labels     = "labels"
	Containers = "containers"
	Sandboxes  = "sandboxes"
	Images     = "images"
	Leases     = "leases"
	Content    = "content"
	Snapshots  = "snapshots"

	// Mounts has no records here: those of activations of mounts are in the daemon's state directory.
	Mounts = "mounts"

	// LeaseResources has one bucket per lease.
	LeaseResources = "lease-resources"
)

// Path is the path of a namespace's bucket of one kind; Path() is where the namespaces stand, Path(ns) one of them.
func Path(parts ...string) []string {
	return append([]string{root}, parts...)
}

// upgrades lead from a version to the next one. All that are needed run in one transaction, when the database is opened.
var upgrades = map[uint32]func(*Tx) error{}

// migrate makes the buckets of a new database, or brings an old one to version schema.
func migrate(tx *Tx, schema uint32, upgrades map[uint32]func(*Tx) error) error {
	b, err := tx.CreateBucketIfNotExists(schemaBucket)
	if err != nil {
		return err
	}
	v := b.Get(schemaKey)
	if v == nil {
		if _, err := tx.MakeBucket(Path()...); err != nil {
			return err
		}
		return setSchemaVersion(b, schema)
	}
	if len(v) != 4 {
		return fmt.Errorf("schema version has %d bytes, must be 4: %w", len(v), errdefs.ErrDataLoss)
	}
	found := binary.LittleEndian.Uint32(v)
	if found > schema && minReader(b) > schema {
		return tooNew(found, schema)
	}
	for n := found; n < schema; n++ {
		up := upgrades[n]
		if up == nil {
			return tooNew(found, schema)
		}
		if err := up(tx); err != nil {
			return fmt.Errorf("cannot bring schema version %d to %d: %w", n, n+1, err)
		}
	}
	if tx.Bucket(Path()...) == nil {
		return fmt.Errorf("bucket %q is missing: %w", root, errdefs.ErrDataLoss)
	}
	if found > schema || found == schema && b.Get(readableKey) != nil {
		return nil // what a newer version has written stays its own
	}
	return setSchemaVersion(b, schema)
}

// isCurrent says whether migrate has nothing to do.
func isCurrent(tx *Tx) bool {
	b := tx.Tx.Bucket(schemaBucket)
	if b == nil || tx.Bucket(Path()...) == nil {
		return false
	}
	v := b.Get(schemaKey)
	return len(v) == 4 && binary.LittleEndian.Uint32(v) == Schema && b.Get(readableKey) != nil
}

func setSchemaVersion(b *bolt.Bucket, schema uint32) error {
	if err := b.Put(readableKey, binary.LittleEndian.AppendUint32(nil, readableBy)); err != nil {
		return err
	}
	return b.Put(schemaKey, binary.LittleEndian.AppendUint32(nil, schema))
}

// minReader is the oldest version that may work with the database whose schema bucket b is. One that does not say is for
// the version that wrote it.
func minReader(b *bolt.Bucket) uint32 {
	if v := b.Get(readableKey); len(v) == 4 {
		return binary.LittleEndian.Uint32(v)
	}
	return math.MaxUint32
}

func tooNew(found, known uint32) error {
	return fmt.Errorf("its schema version is %d, this managerd knows %d; run the version that wrote it: %w", found, known, errdefs.ErrFailedPrecondition)
}
