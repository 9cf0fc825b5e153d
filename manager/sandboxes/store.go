// Package sandboxes keeps what several containers are to share (Store), and runs it (Controller): each sandbox has a shim, which
// holds its namespaces. Which containers are in it is for those who make them.
package sandboxes

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/metadata"
)

// Sandbox is one sandbox, whether it runs or not. All but Labels, Spec, Extensions and Runtime options is fixed once it was
// created.
type Sandbox struct {
	ID         string
	Labels     map[string]string
	Runtime    Runtime
	Spec       *anypb.Any // OCI runtime spec, as JSON; nil: the shim's default
	Extensions map[string]*anypb.Any
	Sandboxer  string // name of the controller
	CreatedAt  time.Time
	UpdatedAt  time.Time
}

// Runtime names the shim; an empty name is the default one.
type Runtime struct {
	Name    string
	Options *anypb.Any
}

// Field lets filters look at a sandbox: id, labels.KEY, as containerd; and runtime.name, sandboxer.
func (s Sandbox) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "id":
		return s.ID, s.ID != ""
	case "sandboxer":
		return s.Sandboxer, s.Sandboxer != ""
	case "runtime":
		if len(path) == 2 && path[1] == "name" {
			return s.Runtime.Name, s.Runtime.Name != ""
		}
	case "labels":
		v, ok := s.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// Store keeps sandboxes in the database. Every method works in the namespace of its context.
type Store struct {
	db *metadata.DB
}

// NewStore uses db, which stays the caller's.
func NewStore(db *metadata.DB) *Store { return &Store{db: db} }

// Get finds a sandbox.
func (s *Store) Get(ctx context.Context, id string) (b Sandbox, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return b, err
	}
	err = s.db.View(func(tx *metadata.Tx) error {
		b, err = get(tx.Bucket(metadata.Path(ns, metadata.Sandboxes)...), id)
		return err
	})
	return b, err
}

// List gives the sandboxes that match f, ordered by id.
func (s *Store) List(ctx context.Context, f filters.Filter) (out []Sandbox, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	err = s.db.View(func(tx *metadata.Tx) error {
		return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Sandboxes)...), func(id string, r *records.Sandbox) error {
			if b := decode(id, r); f.Match(b) {
				out = append(out, b)
			}
			return nil
		})
	})
	return out, err
}

// Create adds a sandbox. AlreadyExists when there is one with its id.
func (s *Store) Create(ctx context.Context, b Sandbox) (Sandbox, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return b, err
	}
	if err := validate(b); err != nil {
		return b, fmt.Errorf("cannot create sandbox %q: %w", b.ID, err)
	}
	b.CreatedAt = time.Now().UTC()
	b.UpdatedAt = b.CreatedAt
	err = s.db.Batch(func(tx *metadata.Tx) error {
		bucket, err := tx.MakeBucket(metadata.Path(ns, metadata.Sandboxes)...)
		if err != nil {
			return err
		}
		if bucket.Get([]byte(b.ID)) != nil {
			return fmt.Errorf("sandbox %q: %w", b.ID, errdefs.ErrAlreadyExists)
		}
		tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Sandboxes, Key: b.ID})
		return metadata.Put(bucket, b.ID, encode(b))
	})
	return b, err
}

// Update changes the fields of b that paths name, or without any, all that may change. A path is a field of containerd's
// API, labels.KEY or extensions.KEY.
func (s *Store) Update(ctx context.Context, b Sandbox, paths ...string) (out Sandbox, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return b, err
	}
	err = s.db.Batch(func(tx *metadata.Tx) error {
		bucket := tx.Bucket(metadata.Path(ns, metadata.Sandboxes)...)
		if out, err = get(bucket, b.ID); err != nil {
			return err
		}
		err := merge(&out, b, paths)
		if err == nil {
			err = validate(out)
		}
		if err != nil {
			return fmt.Errorf("cannot update sandbox %q: %w", b.ID, err)
		}
		out.UpdatedAt = time.Now().UTC()
		tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Sandboxes, Key: out.ID})
		return metadata.Put(bucket, out.ID, encode(out))
	})
	return out, err
}

// Delete removes a sandbox.
func (s *Store) Delete(ctx context.Context, id string) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	return s.db.Batch(func(tx *metadata.Tx) error {
		b := tx.Bucket(metadata.Path(ns, metadata.Sandboxes)...)
		if _, err := get(b, id); err != nil {
			return err
		}
		tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Sandboxes, Key: id, Removed: true})
		return b.Delete([]byte(id))
	})
}

func merge(dst *Sandbox, src Sandbox, paths []string) error {
	if len(paths) == 0 {
		if src.Sandboxer != "" && src.Sandboxer != dst.Sandboxer {
			return fmt.Errorf("sandboxer cannot be changed: %w", errdefs.ErrInvalidArgument)
		}
		paths = []string{"labels", "extensions", "spec", "runtime"}
	}
	for _, path := range paths {
		field, key, nested := strings.Cut(path, ".")
		switch {
		case nested && field == "labels":
			dst.Labels = metadata.With(dst.Labels, key, src.Labels[key])
		case nested && field == "extensions":
			dst.Extensions = metadata.With(dst.Extensions, key, src.Extensions[key])
		case path == "labels":
			dst.Labels = src.Labels
		case path == "extensions":
			dst.Extensions = src.Extensions
		case path == "spec":
			dst.Spec = src.Spec
		case path == "runtime":
			if src.Runtime.Name != dst.Runtime.Name {
				return fmt.Errorf("runtime.name cannot be changed: %w", errdefs.ErrInvalidArgument)
			}
			dst.Runtime = src.Runtime
		default:
			return fmt.Errorf("field %q cannot be changed: %w", path, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func validate(b Sandbox) error {
	if err := identifiers.Validate(b.ID); err != nil {
		return err
	}
	for k := range b.Extensions {
		if k == "" {
			return fmt.Errorf("an extension has no name: %w", errdefs.ErrInvalidArgument)
		}
	}
	return identifiers.ValidateLabels(b.Labels)
}

func get(b *bolt.Bucket, id string) (Sandbox, error) {
	var r records.Sandbox
	if err := metadata.Get(b, id, &r); err != nil {
		return Sandbox{}, fmt.Errorf("sandbox %w", err)
	}
	return decode(id, &r), nil
}

func encode(b Sandbox) *records.Sandbox {
	r := &records.Sandbox{
		Labels: b.Labels, RuntimeName: b.Runtime.Name, RuntimeOptions: metadata.FromAny(b.Runtime.Options), Spec: metadata.FromAny(b.Spec),
		Sandboxer: b.Sandboxer, CreatedAt: b.CreatedAt.UnixNano(), UpdatedAt: b.UpdatedAt.UnixNano(),
	}
	for k, v := range b.Extensions {
		if r.Extensions == nil {
			r.Extensions = map[string]*records.Any{}
		}
		r.Extensions[k] = metadata.FromAny(v)
	}
	return r
}

func decode(id string, r *records.Sandbox) Sandbox {
	b := Sandbox{
		ID: id, Labels: r.Labels, Runtime: Runtime{Name: r.RuntimeName, Options: metadata.ToAny(r.RuntimeOptions)},
		Spec: metadata.ToAny(r.Spec), Sandboxer: r.Sandboxer, CreatedAt: metadata.Time(r.CreatedAt), UpdatedAt: metadata.Time(r.UpdatedAt),
	}
	for k, v := range r.Extensions {
		if b.Extensions == nil {
			b.Extensions = map[string]*anypb.Any{}
		}
		b.Extensions[k] = metadata.ToAny(v)
	}
	return b
}
