// Package snapshots keeps the filesystems of images and containers: layers that never change (committed), and views and
// active ones on top of them. It owns names, labels and who is whose parent, in metadata.db; a Backend per snapshotter
// owns the storage. It must not know what a layer contains, nor who mounts it.
package snapshots

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/filters"
)

// LabelRef on Prepare names the committed snapshot that the active one is to become. When that is there already,
// Prepare answers AlreadyExists, and the client has nothing to do.
const LabelRef = "containerd.io/snapshot.ref"

// Kind is what a snapshot may be used for.
type Kind string

// The kinds. Only committed ones may be parents, only the others have mounts.
const (
	Active    Kind = "active"
	View      Kind = "view"
	Committed Kind = "committed"
)

// Info describes a snapshot.
type Info struct {
	Kind    Kind
	Name    string // the key of an active one or a view
	Parent  string
	Labels  map[string]string
	Created time.Time
	Updated time.Time
}

// Field lets filters look at a snapshot: kind, name, parent, labels.KEY.
func (i Info) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "kind":
		return string(i.Kind), true
	case "name":
		return i.Name, true
	case "parent":
		return i.Parent, i.Parent != ""
	case "labels":
		v, ok := i.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// Usage is what a snapshot takes by itself, without its parents.
type Usage struct {
	Inodes int64 // a file with many links counts once
	Size   int64 // bytes on disk
}

// Snapshotter is one of the snapshotters of a Store. Every method but Close works in the namespace of its context, and
// in the lease of its context, if there is one.
type Snapshotter interface {
	// Stat describes the snapshot that has this key or name.
	Stat(ctx context.Context, key string) (Info, error)
	// Update changes labels: fields are "labels" or "labels.KEY"; none means all of them.
	Update(ctx context.Context, info Info, fields ...string) (Info, error)
	// Usage counts; for an active snapshot that means walking it.
	Usage(ctx context.Context, key string) (Usage, error)
	// Mounts gives what makes an active snapshot or a view visible; FailedPrecondition for a committed one.
	Mounts(ctx context.Context, key string) ([]*types.Mount, error)
	// Prepare makes an active snapshot on parent, which must be committed; an empty parent is an empty directory.
	Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]*types.Mount, error)
	// View makes a read-only one.
	View(ctx context.Context, key, parent string, labels map[string]string) ([]*types.Mount, error)
	// Commit turns the active snapshot key into the committed one name. Only labels given here are kept.
	Commit(ctx context.Context, name, key string, labels map[string]string) error
	// Remove forgets a snapshot and frees its storage; FailedPrecondition while it has children.
	Remove(ctx context.Context, key string) error
	// Walk calls fn for every snapshot that f matches, ordered by name. fn may use the Snapshotter.
	Walk(ctx context.Context, f filters.Filter, fn func(Info) error) error
	// Cleanup frees storage that no snapshot of any namespace uses.
	Cleanup(ctx context.Context) error
}

// Backend is the storage behind a snapshotter. It keeps no names: the store says with each call all that is known of
// the snapshot. Backends with local storage go by IDs, those that are another program's by Ref.String. Calls for
// different snapshots, and reading calls for the same one, come concurrently.
type Backend interface {
	// Create makes the storage of an active snapshot or a view. When it fails, nothing is left.
	Create(ctx context.Context, s Snapshot) error
	// Mounts says how to mount it.
	Mounts(ctx context.Context, s Snapshot) ([]*types.Mount, error)
	// Usage counts what an active snapshot or a view takes.
	Usage(ctx context.Context, s Snapshot) (Usage, error)
	// Commit freezes an active snapshot, which is known as to from then on, and counts it. The ID stays. It may be
	// called again for one that it has frozen, should the store not have been able to note it.
	Commit(ctx context.Context, s Snapshot, to Ref) (Usage, error)
	// Remove frees the storage. None there is no error.
	Remove(ctx context.Context, s Snapshot) error
	// Sweep calls keep with the ID of everything that is stored and frees what it does not want kept.
	Sweep(ctx context.Context, keep func(id uint64) bool) error
	// Close lets go of the storage; what is mounted stays so.
	Close() error
}

// Deferrer is a Backend whose Remove may be left for later: a client's removal is answered when the record is gone.
type Deferrer interface {
	Defers() bool
}

// Labeler is a Backend that adds labels to what clients are told of a snapshot. They are not kept.
type Labeler interface {
	Labels(id uint64) map[string]string
}

// Ref names a snapshot in a backend.
type Ref struct {
	ID        uint64 // unique in the backend, over all namespaces and for all time
	Namespace string
	Key       string
}

// String is the unique name NAMESPACE/ID/KEY, as containerd's metadata store names snapshots to its backends.
func (r Ref) String() string { return fmt.Sprintf("%s/%d/%s", r.Namespace, r.ID, r.Key) }

// Snapshot is what a backend is told of one.
type Snapshot struct {
	Ref
	Kind    Kind
	Parents []Ref // the nearest first
	Labels  map[string]string
}

// Publisher is told of changes that clients subscribe to.
type Publisher interface {
	Publish(ctx context.Context, topic string, event proto.Message) error
}

const maxKey = 4096

func validateKey(what, key string) error {
	switch {
	case key == "":
		return fmt.Errorf("%s of a snapshot must not be empty: %w", what, errdefs.ErrInvalidArgument)
	case len(key) > maxKey:
		return fmt.Errorf("%s of a snapshot has %d bytes, the maximum is %d: %w", what, len(key), maxKey, errdefs.ErrInvalidArgument)
	case strings.IndexByte(key, 0) >= 0:
		return fmt.Errorf("%s %q of a snapshot has a NUL byte: %w", what, key, errdefs.ErrInvalidArgument)
	}
	return nil
}
