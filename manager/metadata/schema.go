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

func migrate(tx *Tx) error {
	b, err := tx.CreateBucketIfNotExists(schemaBucket)
	if err != nil {
		return err
	}
	v := b.Get(schemaKey)
	if v == nil {
		if _, err := tx.MakeBucket(Path()...); err != nil {
			return err
		}
		return b.Put(schemaKey, binary.LittleEndian.AppendUint32(nil, Schema))
	}
	if len(v) != 4 {
		return fmt.Errorf("schema version has %d bytes, must be 4: %w", len(v), errdefs.ErrDataLoss)
	}
	if n := binary.LittleEndian.Uint32(v); n != Schema {
		return fmt.Errorf("schema version is %d, this managerd knows %d; run the version that wrote it: %w", n, Schema, errdefs.ErrFailedPrecondition)
	}
	return nil
}
