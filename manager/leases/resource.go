package leases

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/metadata"
)

// Resource is something that a lease keeps.
type Resource struct {
	// ID is a digest, a reference, a snapshot key, an image name or an activation's, as Type has it.
	ID string
	// Type is Content, Ingests, Images, Mounts, or Snapshots + the snapshotter's name.
	Type string
}

// Validate checks type and id: InvalidArgument, or NotImplemented for a type that nobody knows.
func (r Resource) Validate() error {
	typ, sub, nested := strings.Cut(r.Type, "/")
	switch {
	case r.ID == "":
		return fmt.Errorf("resource of type %q must have an id: %w", r.Type, errdefs.ErrInvalidArgument)
	case strings.IndexByte(r.ID, 0) >= 0:
		return fmt.Errorf("resource id %q has a NUL byte: %w", r.ID, errdefs.ErrInvalidArgument)
	case len(r.key()) > metadata.MaxKey:
		return fmt.Errorf("resource of type %.64q has an id of %d bytes: %w", r.Type, len(r.ID), errdefs.ErrInvalidArgument)
	case typ == strings.TrimSuffix(Snapshots, "/"):
		if sub == "" || strings.ContainsAny(sub, "/\x00") {
			return fmt.Errorf("resource type %q must be %sNAME: %w", r.Type, Snapshots, errdefs.ErrInvalidArgument)
		}
	case typ == Content || typ == Ingests || typ == Images || typ == Mounts:
		if nested {
			return fmt.Errorf("resource type %q must have no %q: %w", r.Type, "/", errdefs.ErrInvalidArgument)
		}
		if typ == Content {
			if _, err := digest.Parse(r.ID); err != nil {
				return fmt.Errorf("content resource %q: %w: %w", r.ID, err, errdefs.ErrInvalidArgument)
			}
		}
	default:
		return fmt.Errorf("resource type %q is not known: %w", r.Type, errdefs.ErrNotImplemented)
	}
	return nil
}

func (r Resource) key() []byte { return []byte(r.Type + "\x00" + r.ID) }

// Resources gives what a lease keeps, for those who are in a transaction already.
func Resources(tx *metadata.Tx, ns, id string) []Resource {
	b := tx.Bucket(metadata.Path(ns, metadata.LeaseResources, id)...)
	if b == nil {
		return nil
	}
	var out []Resource
	_ = b.ForEach(func(k, _ []byte) error { // the function never fails
		if typ, rid, ok := strings.Cut(string(k), "\x00"); ok {
			out = append(out, Resource{ID: rid, Type: typ})
		}
		return nil
	})
	return out
}

// Attach has the lease of ctx keep r, inside the transaction that makes r. Without a lease in ctx it does nothing;
// NotFound when the lease is unknown.
func Attach(ctx context.Context, tx *metadata.Tx, ns string, r Resource) error {
	id, ok := From(ctx)
	if !ok {
		return nil
	}
	if err := exists(tx, ns, id); err != nil {
		return fmt.Errorf("cannot attach %s %q: %w", r.Type, r.ID, err)
	}
	return attach(tx, ns, id, r)
}

// Detach has the lease of ctx let go of r, inside the transaction that removes r (an ingest that became a blob).
func Detach(ctx context.Context, tx *metadata.Tx, ns string, r Resource) error {
	id, ok := From(ctx)
	if !ok {
		return nil
	}
	if b := tx.Bucket(metadata.Path(ns, metadata.LeaseResources, id)...); b != nil {
		return b.Delete(r.key())
	}
	return nil
}

func attach(tx *metadata.Tx, ns, id string, r Resource) error {
	b, err := tx.MakeBucket(metadata.Path(ns, metadata.LeaseResources, id)...)
	if err != nil {
		return err
	}
	tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Leases, Key: id})
	return b.Put(r.key(), []byte{})
}

func exists(tx *metadata.Tx, ns, id string) error {
	if b := tx.Bucket(metadata.Path(ns, metadata.Leases)...); b != nil && id != "" && b.Get([]byte(id)) != nil {
		return nil
	}
	return fmt.Errorf("lease %q: %w", id, errdefs.ErrNotFound)
}
