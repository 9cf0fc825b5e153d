// Package leases keeps leases: names that hold resources (content, snapshots, ingests, images, mounts) back from collection
// while a client builds something of them. It must not know what a resource is, only its type and name.
package leases

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/metadata"
)

// The types of a Resource; a snapshot's is Snapshots + its snapshotter. All but Mounts are containerd's, whose clients cannot
// name an activation there.
const (
	Content   = "content"
	Ingests   = "ingests"
	Images    = "images"
	Mounts    = "mounts" // an activation of the Mounts service, by its name
	Snapshots = "snapshots/"
)

// ExpireLabel holds the RFC 3339 time after which a lease no longer counts.
const ExpireLabel = "containerd.io/gc.expire"

// FlatLabel on a lease says that it keeps its own resources only, not what those refer to.
const FlatLabel = "containerd.io/gc.flat"

// Expiry is when a lease, or an image, with these labels ends by itself; false when it does not. A time that cannot be read
// is none: nothing is lost for a slip of the pen.
func Expiry(labels map[string]string) (at time.Time, ok bool) {
	v, ok := labels[ExpireLabel]
	if !ok {
		return at, false
	}
	at, err := time.Parse(time.RFC3339, v)
	if err != nil {
		slog.Warn("an expiry that is no RFC 3339 time does not count", "label", ExpireLabel, "value", v)
		return time.Time{}, false
	}
	return at, true
}

const maxID = 256

// Lease is one lease.
type Lease struct {
	ID        string
	CreatedAt time.Time
	Labels    map[string]string
}

// Field lets filters look at a lease: id, labels.KEY.
func (l Lease) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "id":
		return l.ID, l.ID != ""
	case "labels":
		v, ok := l.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// Store keeps leases in the database. Every method works in the namespace of its context.
type Store struct {
	db *metadata.DB
}

// NewStore uses db, which stays the caller's.
func NewStore(db *metadata.DB) *Store { return &Store{db: db} }

// Create makes a lease; an empty id has one chosen. AlreadyExists when there is one with that id.
func (s *Store) Create(ctx context.Context, id string, labels map[string]string) (Lease, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return Lease{}, err
	}
	if id == "" {
		id = randomID()
	}
	if err := validateID(id); err != nil {
		return Lease{}, err
	}
	if err := identifiers.ValidateLabels(labels); err != nil {
		return Lease{}, fmt.Errorf("cannot create lease %q: %w", id, err)
	}
	l := Lease{ID: id, CreatedAt: time.Now().UTC(), Labels: labels}
	err = s.db.Batch(func(tx *metadata.Tx) error {
		b, err := tx.MakeBucket(metadata.Path(ns, metadata.Leases)...)
		if err != nil {
			return err
		}
		if b.Get([]byte(id)) != nil {
			return fmt.Errorf("lease %q: %w", id, errdefs.ErrAlreadyExists)
		}
		at, _ := Expiry(labels)
		tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Leases, Key: id, Expires: at})
		return metadata.Put(b, id, &records.Lease{CreatedAt: l.CreatedAt.UnixNano(), Labels: labels})
	})
	if err != nil {
		return Lease{}, fmt.Errorf("cannot create lease: %w", err)
	}
	return l, nil
}

// Delete removes a lease; what only it kept becomes collectable.
func (s *Store) Delete(ctx context.Context, id string) error {
	return s.update(ctx, "delete", id, func(tx *metadata.Tx, ns string) error {
		return Forget(tx, ns, id)
	})
}

// Forget removes a lease inside a transaction, for those who are in one already.
func Forget(tx *metadata.Tx, ns, id string) error {
	if b := tx.Bucket(metadata.Path(ns, metadata.LeaseResources)...); b != nil && b.Bucket([]byte(id)) != nil {
		if err := b.DeleteBucket([]byte(id)); err != nil {
			return err
		}
	}
	b := tx.Bucket(metadata.Path(ns, metadata.Leases)...)
	if b == nil {
		return nil
	}
	tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Leases, Key: id, Removed: true})
	return b.Delete([]byte(id))
}

// List gives the leases that match f, ordered by id.
func (s *Store) List(ctx context.Context, f filters.Filter) ([]Lease, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	var out []Lease
	err = s.db.View(func(tx *metadata.Tx) error {
		return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Leases)...), func(id string, r *records.Lease) error {
			l := Lease{ID: id, CreatedAt: metadata.Time(r.CreatedAt), Labels: r.Labels}
			if f.Match(l) {
				out = append(out, l)
			}
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list leases: %w", err)
	}
	return out, nil
}

// AddResource has the lease keep r, which need not exist yet.
func (s *Store) AddResource(ctx context.Context, id string, r Resource) error {
	if err := r.Validate(); err != nil {
		return fmt.Errorf("cannot add resource to lease %q: %w", id, err)
	}
	return s.update(ctx, "add resource to", id, func(tx *metadata.Tx, ns string) error {
		return attach(tx, ns, id, r)
	})
}

// DeleteResource lets go of r; no error when the lease did not keep it.
func (s *Store) DeleteResource(ctx context.Context, id string, r Resource) error {
	if err := r.Validate(); err != nil {
		return fmt.Errorf("cannot delete resource from lease %q: %w", id, err)
	}
	return s.update(ctx, "delete resource from", id, func(tx *metadata.Tx, ns string) error {
		b := tx.Bucket(metadata.Path(ns, metadata.LeaseResources, id)...)
		if b == nil {
			return nil
		}
		tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Leases, Key: id})
		return b.Delete(r.key())
	})
}

// ListResources gives what the lease keeps, ordered by type and id.
func (s *Store) ListResources(ctx context.Context, id string) ([]Resource, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	var out []Resource
	err = s.db.View(func(tx *metadata.Tx) error {
		if err := exists(tx, ns, id); err != nil {
			return err
		}
		out = Resources(tx, ns, id)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list resources of lease: %w", err)
	}
	return out, nil
}

func (s *Store) update(ctx context.Context, verb, id string, fn func(tx *metadata.Tx, ns string) error) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	err = s.db.Batch(func(tx *metadata.Tx) error {
		if err := exists(tx, ns, id); err != nil {
			return err
		}
		return fn(tx, ns)
	})
	if err != nil {
		return fmt.Errorf("cannot %s lease: %w", verb, err)
	}
	return nil
}

// Lease ids are looser than identifiers: clients make them of base64.
func validateID(id string) error {
	if len(id) > maxID {
		return fmt.Errorf("lease id %q... is longer than %d bytes: %w", id[:maxID], maxID, errdefs.ErrInvalidArgument)
	}
	for _, c := range []byte(id) {
		if c <= ' ' || c == 0x7f {
			return fmt.Errorf("lease id %q has a blank or control character: %w", id, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func randomID() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return strconv.FormatInt(time.Now().UnixNano(), 10) + "-" + hex.EncodeToString(b[:])
}
