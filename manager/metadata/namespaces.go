package metadata

import (
	"context"
	"fmt"
	"sort"
	"strings"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/namespaces"
)

// Namespaces keeps the namespaces themselves: their names and labels. What is in one belongs to the other stores, which
// make it when they first need it.
type Namespaces struct {
	db     *DB
	events publisher
}

// publisher is told of a change in its transaction.
type publisher interface {
	Publish(ctx context.Context, topic string, event proto.Message) error
}

// Tell has p told of every change from now on, with the context of the transaction that makes it (In).
func (n *Namespaces) Tell(p publisher) { n.events = p }

func (n *Namespaces) tell(tx *Tx, name, topic string, event proto.Message) error {
	if n.events == nil {
		return nil
	}
	return n.events.Publish(In(namespaces.With(context.Background(), name), tx), topic, event)
}

// NewNamespaces uses db, which stays the caller's.
func NewNamespaces(db *DB) *Namespaces { return &Namespaces{db: db} }

// Create makes a namespace. AlreadyExists when there is one.
func (n *Namespaces) Create(name string, labels map[string]string) error {
	if err := identifiers.Validate(name); err != nil {
		return fmt.Errorf("cannot create namespace: %w", err)
	}
	if err := identifiers.ValidateLabels(labels); err != nil {
		return fmt.Errorf("cannot create namespace %q: %w", name, err)
	}
	return n.db.Batch(func(tx *Tx) error {
		if tx.Bucket(Path(name)...) != nil {
			return fmt.Errorf("namespace %q: %w", name, errdefs.ErrAlreadyExists)
		}
		b, err := tx.MakeBucket(Path(name, Labels)...)
		if err != nil {
			return err
		}
		if err := putLabels(b, labels); err != nil {
			return err
		}
		return n.tell(tx, name, "/namespaces/create", &events.NamespaceCreate{Name: name, Labels: labels})
	})
}

// Labels gives a namespace's labels.
func (n *Namespaces) Labels(name string) (labels map[string]string, err error) {
	err = n.db.View(func(tx *Tx) error {
		if tx.Bucket(Path(name)...) == nil || name == "" {
			return fmt.Errorf("namespace %q: %w", name, errdefs.ErrNotFound)
		}
		labels = getLabels(tx.Bucket(Path(name, Labels)...))
		return nil
	})
	return labels, err
}

// SetLabels replaces the labels, or with paths (labels.KEY) those that they name, and returns all.
func (n *Namespaces) SetLabels(name string, labels map[string]string, paths ...string) (out map[string]string, err error) {
	if err := identifiers.ValidateLabels(labels); err != nil {
		return nil, fmt.Errorf("cannot update namespace %q: %w", name, err)
	}
	err = n.db.Batch(func(tx *Tx) error {
		if tx.Bucket(Path(name)...) == nil || name == "" {
			return fmt.Errorf("namespace %q: %w", name, errdefs.ErrNotFound)
		}
		b, err := tx.MakeBucket(Path(name, Labels)...)
		if err != nil {
			return err
		}
		out = labels
		if len(paths) > 0 {
			out = getLabels(b)
			for _, p := range paths {
				key, ok := strings.CutPrefix(p, "labels.")
				switch {
				case ok:
					out = With(out, key, labels[key])
				case p == "labels":
					out = labels
				default:
					return fmt.Errorf("cannot update namespace %q: field %q cannot be changed: %w", name, p, errdefs.ErrInvalidArgument)
				}
			}
		}
		if err := putLabels(b, out); err != nil {
			return err
		}
		return n.tell(tx, name, "/namespaces/update", &events.NamespaceUpdate{Name: name, Labels: out})
	})
	return out, err
}

// List gives all names, sorted.
func (n *Namespaces) List() (names []string, err error) {
	err = n.db.View(func(tx *Tx) error {
		names = nil
		return tx.Bucket(Path()...).ForEachBucket(func(k []byte) error {
			names = append(names, string(k))
			return nil
		})
	})
	return names, err
}

// Delete removes an empty namespace. FailedPrecondition names what is still in it.
func (n *Namespaces) Delete(name string) error {
	return n.db.Batch(func(tx *Tx) error {
		b := tx.Bucket(Path(name)...)
		if b == nil || name == "" {
			return fmt.Errorf("namespace %q: %w", name, errdefs.ErrNotFound)
		}
		var left []string
		for _, kind := range []string{Containers, Sandboxes, Images, Content, Leases, Snapshots} {
			if count := entries(b.Bucket([]byte(kind))); count > 0 {
				left = append(left, fmt.Sprintf("%d %s", count, kind))
			}
		}
		if len(left) > 0 {
			sort.Strings(left)
			return fmt.Errorf("namespace %q must be empty, it has %s: %w", name, strings.Join(left, ", "), errdefs.ErrFailedPrecondition)
		}
		if err := tx.Bucket(Path()...).DeleteBucket([]byte(name)); err != nil {
			return err
		}
		return n.tell(tx, name, "/namespaces/delete", &events.NamespaceDelete{Name: name})
	})
}

// entries counts the records of a bucket and of those below it.
func entries(b *bolt.Bucket) int {
	if b == nil {
		return 0
	}
	n := 0
	_ = b.ForEach(func(k, v []byte) error { // the function never fails
		if v == nil {
			n += entries(b.Bucket(k))
		} else {
			n++
		}
		return nil
	})
	return n
}

func getLabels(b *bolt.Bucket) map[string]string {
	if b == nil {
		return nil
	}
	out := map[string]string{}
	_ = b.ForEach(func(k, v []byte) error { // the function never fails
		out[string(k)] = string(v)
		return nil
	})
	return out
}

func putLabels(b *bolt.Bucket, labels map[string]string) error {
	for k := range getLabels(b) {
		if err := b.Delete([]byte(k)); err != nil {
			return err
		}
	}
	for k, v := range labels {
		if err := b.Put([]byte(k), []byte(v)); err != nil {
			return fmt.Errorf("label %q: %w: %w", k, err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
