// Package images keeps names for descriptors. It does not look at what they point to.
package images

import (
	"context"
	_ "crypto/sha256" // go-digest finds it by name
	_ "crypto/sha512"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/metadata"
)

// Image is a name, and what it stands for.
type Image struct {
	Name      string
	Labels    map[string]string
	Target    ocispec.Descriptor
	CreatedAt time.Time
	UpdatedAt time.Time
}

// Field lets filters look at an image: name, target.digest, target.mediatype, labels.KEY, annotations.KEY.
func (i Image) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	rest := strings.Join(path[1:], ".")
	switch path[0] {
	case "name":
		return i.Name, i.Name != ""
	case "target":
		switch rest {
		case "digest":
			return i.Target.Digest.String(), i.Target.Digest != ""
		case "mediatype":
			return i.Target.MediaType, i.Target.MediaType != ""
		}
	case "labels":
		v, ok := i.Labels[rest]
		return v, ok
	case "annotations":
		v, ok := i.Target.Annotations[rest]
		return v, ok
	}
	return "", false
}

// Store keeps images in the database. Every method works in the namespace of its context.
type Store struct {
	db *metadata.DB
}

// NewStore uses db, which stays the caller's.
func NewStore(db *metadata.DB) *Store { return &Store{db: db} }

// Get finds an image by its name.
func (s *Store) Get(ctx context.Context, name string) (i Image, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return i, err
	}
	err = s.db.View(func(tx *metadata.Tx) error {
		i, err = get(tx, ns, name)
		return err
	})
	return i, err
}

// List gives the images that match f, ordered by name.
func (s *Store) List(ctx context.Context, f filters.Filter) (out []Image, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	err = s.db.View(func(tx *metadata.Tx) error {
		return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Images)...), func(name string, r *records.Image) error {
			if i := decode(name, r); f.Match(i) {
				out = append(out, i)
			}
			return nil
		})
	})
	return out, err
}

// Create adds a name. AlreadyExists when it is taken.
func (s *Store) Create(ctx context.Context, i Image) (Image, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return i, err
	}
	if err := validate(i); err != nil {
		return i, fmt.Errorf("cannot create image %q: %w", i.Name, err)
	}
	i.CreatedAt = time.Now().UTC()
	i.UpdatedAt = i.CreatedAt
	err = s.db.Batch(func(tx *metadata.Tx) error {
		b, err := tx.MakeBucket(metadata.Path(ns, metadata.Images)...)
		if err != nil {
			return err
		}
		if b.Get([]byte(i.Name)) != nil {
			return fmt.Errorf("image %q: %w", i.Name, errdefs.ErrAlreadyExists)
		}
		tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Images, Key: i.Name, Expires: expiry(i)})
		return metadata.Put(b, i.Name, encode(i))
	})
	return i, err
}

// Update changes what paths name (labels, labels.KEY, target, annotations, annotations.KEY), or without any, labels and
// target.
func (s *Store) Update(ctx context.Context, i Image, paths ...string) (out Image, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return i, err
	}
	err = s.db.Batch(func(tx *metadata.Tx) error {
		if out, err = get(tx, ns, i.Name); err != nil {
			return err
		}
		if len(paths) == 0 {
			out.Labels, out.Target = i.Labels, i.Target
		}
		for _, path := range paths {
			field, key, nested := strings.Cut(path, ".")
			switch {
			case nested && field == "labels":
				out.Labels = metadata.With(out.Labels, key, i.Labels[key])
			case nested && field == "annotations":
				out.Target.Annotations = metadata.With(out.Target.Annotations, key, i.Target.Annotations[key])
			case path == "labels":
				out.Labels = i.Labels
			case path == "target":
				out.Target = i.Target
			case path == "annotations":
				out.Target.Annotations = i.Target.Annotations
			default:
				return fmt.Errorf("cannot update image %q: field %q cannot be changed: %w", i.Name, path, errdefs.ErrInvalidArgument)
			}
		}
		if err := validate(out); err != nil {
			return fmt.Errorf("cannot update image %q: %w", i.Name, err)
		}
		out.UpdatedAt = time.Now().UTC()
		tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Images, Key: out.Name, Expires: expiry(out)})
		return metadata.Put(tx.Bucket(metadata.Path(ns, metadata.Images)...), out.Name, encode(out))
	})
	return out, err
}

// Delete removes a name; with target set only while it stands for that digest, else NotFound.
func (s *Store) Delete(ctx context.Context, name string, target digest.Digest) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	return s.db.Batch(func(tx *metadata.Tx) error {
		i, err := get(tx, ns, name)
		if err != nil {
			return err
		}
		if target != "" && i.Target.Digest != target {
			return fmt.Errorf("image %q is %s by now, not %s: %w", name, i.Target.Digest, target, errdefs.ErrNotFound)
		}
		return Forget(tx, ns, name)
	})
}

// Forget removes a name inside a transaction, for those who are in one already.
func Forget(tx *metadata.Tx, ns, name string) error {
	b := tx.Bucket(metadata.Path(ns, metadata.Images)...)
	if b == nil {
		return nil
	}
	tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Images, Key: name, Removed: true})
	return b.Delete([]byte(name))
}

func expiry(i Image) time.Time {
	at, _ := leases.Expiry(i.Labels)
	return at
}

func validate(i Image) error {
	switch {
	case i.Name == "":
		return fmt.Errorf("name is missing: %w", errdefs.ErrInvalidArgument)
	case i.Target.MediaType == "":
		return fmt.Errorf("target has no media type: %w", errdefs.ErrInvalidArgument)
	case i.Target.Size <= 0:
		return fmt.Errorf("target has size %d: %w", i.Target.Size, errdefs.ErrInvalidArgument)
	}
	if err := i.Target.Digest.Validate(); err != nil {
		return fmt.Errorf("target digest %q: %w: %w", i.Target.Digest, err, errdefs.ErrInvalidArgument)
	}
	return identifiers.ValidateLabels(i.Labels)
}

func get(tx *metadata.Tx, ns, name string) (Image, error) {
	var r records.Image
	if err := metadata.Get(tx.Bucket(metadata.Path(ns, metadata.Images)...), name, &r); err != nil {
		return Image{}, fmt.Errorf("image %w", err)
	}
	return decode(name, &r), nil
}

func encode(i Image) *records.Image {
	return &records.Image{
		Labels: i.Labels, CreatedAt: i.CreatedAt.UnixNano(), UpdatedAt: i.UpdatedAt.UnixNano(),
		Target: &records.Descriptor{
			MediaType: i.Target.MediaType, Digest: i.Target.Digest.String(), Size_: i.Target.Size, Annotations: i.Target.Annotations,
		},
	}
}

func decode(name string, r *records.Image) Image {
	i := Image{Name: name, Labels: r.Labels, CreatedAt: metadata.Time(r.CreatedAt), UpdatedAt: metadata.Time(r.UpdatedAt)}
	if t := r.Target; t != nil {
		i.Target = ocispec.Descriptor{MediaType: t.MediaType, Digest: digest.Digest(t.Digest), Size: t.Size_, Annotations: t.Annotations}
	}
	return i
}
