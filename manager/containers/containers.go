// Package containers keeps what is to be run: a spec, a runtime, a snapshot, labels. It knows nothing of running.
package containers

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/metadata"
)

// Container is one container. All but Labels, Spec, Extensions, Image, Runtime options and the snapshot is fixed once
// it was created.
type Container struct {
	ID          string
	Labels      map[string]string
	Image       string
	Runtime     Runtime
	Spec        *anypb.Any // OCI runtime spec, as JSON
	Snapshotter string
	SnapshotKey string
	SandboxID   string
	Extensions  map[string]*anypb.Any
	CreatedAt   time.Time
	UpdatedAt   time.Time
}

// Runtime names the shim.
type Runtime struct {
	Name    string
	Options *anypb.Any
}

// Field lets filters look at a container: id, image, runtime.name, snapshotter, sandbox (as containerd calls it, and
// sandboxid), labels.KEY.
func (c Container) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "id":
		return c.ID, c.ID != ""
	case "image":
		return c.Image, c.Image != ""
	case "snapshotter":
		return c.Snapshotter, c.Snapshotter != ""
	case "sandbox", "sandboxid":
		return c.SandboxID, c.SandboxID != ""
	case "runtime":
		if len(path) == 2 && path[1] == "name" {
			return c.Runtime.Name, c.Runtime.Name != ""
		}
	case "labels":
		v, ok := c.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// Store keeps containers in the database. Every method works in the namespace of its context.
type Store struct {
	db     *metadata.DB
	events publisher
}

// publisher is told of a change in its transaction.
type publisher interface {
	Publish(ctx context.Context, topic string, event proto.Message) error
}

// Tell has p told of every change from now on, with the context of the transaction that makes it (metadata.In).
func (s *Store) Tell(p publisher) { s.events = p }

func (s *Store) tell(ctx context.Context, tx *metadata.Tx, topic string, event proto.Message) error {
	if s.events == nil {
		return nil
	}
	return s.events.Publish(metadata.In(ctx, tx), topic, event)
}

// NewStore uses db, which stays the caller's.
func NewStore(db *metadata.DB) *Store { return &Store{db: db} }

// Get finds a container.
func (s *Store) Get(ctx context.Context, id string) (c Container, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return c, err
	}
	err = s.db.View(func(tx *metadata.Tx) error {
		c, err = get(tx.Bucket(metadata.Path(ns, metadata.Containers)...), id)
		return err
	})
	return c, err
}

// List gives the containers that match f, ordered by id.
func (s *Store) List(ctx context.Context, f filters.Filter) (out []Container, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	err = s.db.View(func(tx *metadata.Tx) error {
		return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Containers)...), func(id string, r *records.Container) error {
			if c := decode(id, r); f.Match(c) {
				out = append(out, c)
			}
			return nil
		})
	})
	return out, err
}

// Create adds a container. AlreadyExists when there is one with its id.
func (s *Store) Create(ctx context.Context, c Container) (Container, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return c, err
	}
	if err := validate(c); err != nil {
		return c, fmt.Errorf("cannot create container %q: %w", c.ID, err)
	}
	c.CreatedAt = time.Now().UTC()
	c.UpdatedAt = c.CreatedAt
	err = s.db.Batch(func(tx *metadata.Tx) error {
		b, err := tx.MakeBucket(metadata.Path(ns, metadata.Containers)...)
		if err != nil {
			return err
		}
		if b.Get([]byte(c.ID)) != nil {
			return fmt.Errorf("container %q: %w", c.ID, errdefs.ErrAlreadyExists)
		}
		tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Containers, Key: c.ID})
		if err := metadata.Put(b, c.ID, encode(c)); err != nil {
			return err
		}
		return s.tell(ctx, tx, "/containers/create", &events.ContainerCreate{
			ID: c.ID, Image: c.Image, Runtime: &events.ContainerCreate_Runtime{Name: c.Runtime.Name, Options: c.Runtime.Options},
		})
	})
	return c, err
}

// Update changes the fields of c that paths name, or without any, all that may change. A path is a field of containerd's
// API, labels.KEY or extensions.KEY.
func (s *Store) Update(ctx context.Context, c Container, paths ...string) (out Container, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return c, err
	}
	err = s.db.Batch(func(tx *metadata.Tx) error {
		b := tx.Bucket(metadata.Path(ns, metadata.Containers)...)
		if out, err = get(b, c.ID); err != nil {
			return err
		}
		if err := merge(&out, c, paths); err != nil {
			return fmt.Errorf("cannot update container %q: %w", c.ID, err)
		}
		if err := validate(out); err != nil {
			return fmt.Errorf("cannot update container %q: %w", c.ID, err)
		}
		out.UpdatedAt = time.Now().UTC()
		tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Containers, Key: out.ID})
		if err := metadata.Put(b, out.ID, encode(out)); err != nil {
			return err
		}
		return s.tell(ctx, tx, "/containers/update", &events.ContainerUpdate{
			ID: out.ID, Image: out.Image, Labels: out.Labels, SnapshotKey: out.SnapshotKey,
		})
	})
	return out, err
}

// Delete removes a container.
func (s *Store) Delete(ctx context.Context, id string) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	return s.db.Batch(func(tx *metadata.Tx) error {
		b := tx.Bucket(metadata.Path(ns, metadata.Containers)...)
		if _, err := get(b, id); err != nil {
			return err
		}
		tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Containers, Key: id, Removed: true})
		if err := b.Delete([]byte(id)); err != nil {
			return err
		}
		return s.tell(ctx, tx, "/containers/delete", &events.ContainerDelete{ID: id})
	})
}

func merge(dst *Container, src Container, paths []string) error {
	if len(paths) == 0 {
		switch {
		case src.Snapshotter != "" && src.Snapshotter != dst.Snapshotter:
			return fmt.Errorf("snapshotter cannot be changed: %w", errdefs.ErrInvalidArgument)
		case src.Runtime.Name != "" && src.Runtime.Name != dst.Runtime.Name:
			return fmt.Errorf("runtime.name cannot be changed: %w", errdefs.ErrInvalidArgument)
		}
		paths = []string{"labels", "spec", "extensions", "image", "snapshotkey"}
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
		case path == "spec":
			dst.Spec = src.Spec
		case path == "extensions":
			dst.Extensions = src.Extensions
		case path == "image":
			dst.Image = src.Image
		case path == "snapshotkey" || path == "snapshot_key":
			dst.SnapshotKey = src.SnapshotKey
		default:
			return fmt.Errorf("field %q cannot be changed: %w", path, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func validate(c Container) error {
	if err := identifiers.Validate(c.ID); err != nil {
		return err
	}
	if err := identifiers.ValidateLabels(c.Labels); err != nil {
		return err
	}
	switch {
	case c.Runtime.Name == "":
		return fmt.Errorf("runtime.name is missing: %w", errdefs.ErrInvalidArgument)
	case c.Spec == nil:
		return fmt.Errorf("spec is missing: %w", errdefs.ErrInvalidArgument)
	case c.SnapshotKey != "" && c.Snapshotter == "":
		return fmt.Errorf("snapshot_key %q needs a snapshotter: %w", c.SnapshotKey, errdefs.ErrInvalidArgument)
	}
	for k := range c.Extensions {
		if k == "" {
			return fmt.Errorf("an extension has no name: %w", errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func get(b *bolt.Bucket, id string) (Container, error) {
	var r records.Container
	if err := metadata.Get(b, id, &r); err != nil {
		return Container{}, fmt.Errorf("container %w", err)
	}
	return decode(id, &r), nil
}

func encode(c Container) *records.Container {
	r := &records.Container{
		Labels: c.Labels, Image: c.Image, RuntimeName: c.Runtime.Name, RuntimeOptions: metadata.FromAny(c.Runtime.Options),
		Spec: metadata.FromAny(c.Spec), Snapshotter: c.Snapshotter, SnapshotKey: c.SnapshotKey, SandboxId: c.SandboxID,
		CreatedAt: c.CreatedAt.UnixNano(), UpdatedAt: c.UpdatedAt.UnixNano(),
	}
	for k, v := range c.Extensions {
		if r.Extensions == nil {
			r.Extensions = map[string]*records.Any{}
		}
		r.Extensions[k] = metadata.FromAny(v)
	}
	return r
}

func decode(id string, r *records.Container) Container {
	c := Container{
		ID: id, Labels: r.Labels, Image: r.Image, Runtime: Runtime{Name: r.RuntimeName, Options: metadata.ToAny(r.RuntimeOptions)},
		Spec: metadata.ToAny(r.Spec), Snapshotter: r.Snapshotter, SnapshotKey: r.SnapshotKey, SandboxID: r.SandboxId,
		CreatedAt: metadata.Time(r.CreatedAt), UpdatedAt: metadata.Time(r.UpdatedAt),
	}
	for k, v := range r.Extensions {
		if c.Extensions == nil {
			c.Extensions = map[string]*anypb.Any{}
		}
		c.Extensions[k] = metadata.ToAny(v)
	}
	return c
}
