package metadata

import (
	"encoding/binary"
	"fmt"

	"github.com/containerd/errdefs"
)

// Schema is the version that this code writes. Version n reads n and n-1.
//
//	schema                          uint32, little endian: the version
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
//	snapshot-ids/                   SNAPSHOTTER → uint64, big endian: the highest id that was given out
const Schema = 1

const root = "v1"

var schemaBucket, schemaKey = []byte("schema"), []byte("version")

// The kinds of object kept per namespace.
const (
	Labels     = "labels"
	Containers = "containers"
	Sandboxes  = "sandboxes"
	Images     = "images"
	Leases     = "leases"
	Content    = "content"
	Snapshots  = "snapshots"

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
		return b.Put(schemaKey, binary.LittleEndian.AppendUint32(nil, schema))
	}
	if len(v) != 4 {
		return fmt.Errorf("schema version has %d bytes, must be 4: %w", len(v), errdefs.ErrDataLoss)
	}
	found := binary.LittleEndian.Uint32(v)
	for n := found; n != schema; n++ {
		up := upgrades[n]
		if n > schema || up == nil {
			return fmt.Errorf("schema version is %d, this managerd knows %d; run the version that wrote it: %w", found, schema, errdefs.ErrFailedPrecondition)
		}
		if err := up(tx); err != nil {
			return fmt.Errorf("cannot bring schema version %d to %d: %w", n, n+1, err)
		}
	}
	if tx.Bucket(Path()...) == nil {
		return fmt.Errorf("bucket %q is missing: %w", root, errdefs.ErrDataLoss)
	}
	if found == schema {
		return nil
	}
	return b.Put(schemaKey, binary.LittleEndian.AppendUint32(nil, schema))
}
