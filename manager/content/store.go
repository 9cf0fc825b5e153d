// Package content keeps blobs by their digest. Their bytes, which all namespaces share, are a Backend's: files of this
// daemon, or another program (content/proxy). In a namespace a blob is visible only by its record in the database.
package content

import (
	"context"
	_ "crypto/sha256" // go-digest finds it by name
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/metadata"
	"github.com/managerd/managerd/shimapi/failpoint"
)

type publisher interface {
	Publish(ctx context.Context, topic string, event proto.Message) error
}

// Store keeps content. Every method works in the namespace of its context.
type Store struct {
	backend Backend
	remote  bool // the bytes are another program's
	policy  string
	db      *metadata.DB
	events  publisher

	// bytes is held for reading while a blob and its record are made to agree, for writing while a blob that no record has
	// any more is removed.
	bytes sync.RWMutex

	mu      sync.Mutex
	writers map[string]*Writer // by namespace and reference: ingests that are open
}

// Info describes a blob.
type Info struct {
	Digest    digest.Digest
	Size      int64 // bytes
	CreatedAt time.Time
	UpdatedAt time.Time
	Labels    map[string]string
}

// Field lets filters look at a blob: digest, size, labels.KEY.
func (i Info) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "digest":
		return i.Digest.String(), true
	case "size":
		return fmt.Sprint(i.Size), true
	case "labels":
		v, ok := i.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// The policies by which a blob that one namespace has comes to others that name its digest.
const (
	Shared   = "shared"   // to know the digest is enough
	Isolated = "isolated" // it must be written again, unless the other namespace has ShareableLabel
)

// ShareableLabel is the label, "true", of a namespace whose blobs others may take, whatever the policy.
const ShareableLabel = "containerd.io/namespace.shareable"

// New opens the store of files below root, the daemon's root directory, and removes those that no record knows: a commit
// that was interrupted between the two. policy is Shared or Isolated.
func New(root, policy string, db *metadata.DB, events publisher) (*Store, error) {
	s, err := newStore(policy, db, events)
	if err != nil {
		return nil, err
	}
	f, err := openFiles(root)
	if err != nil {
		return nil, fmt.Errorf("cannot make content directory: %w", err)
	}
	s.backend = f
	if err := errors.Join(s.sweep(f), f.sweepIngests()); err != nil {
		return nil, fmt.Errorf("cannot clear up %s: %w", f.root, err)
	}
	return s, nil
}

// NewRemote opens a store whose bytes are another program's, which need not run yet; see Tidy.
func NewRemote(b Backend, policy string, db *metadata.DB, events publisher) (*Store, error) {
	s, err := newStore(policy, db, events)
	if err != nil {
		return nil, err
	}
	s.backend, s.remote = b, true
	return s, nil
}

func newStore(policy string, db *metadata.DB, events publisher) (*Store, error) {
	if policy != Shared && policy != Isolated {
		return nil, fmt.Errorf("content sharing policy %q is neither %s nor %s: %w", policy, Shared, Isolated, errdefs.ErrInvalidArgument)
	}
	return &Store{policy: policy, db: db, events: events, writers: map[string]*Writer{}}, nil
}

// sweep removes the files that no record knows.
func (s *Store) sweep(f *files) error {
	known, err := s.sweepable()
	if err != nil || known == nil {
		return err
	}
	return f.sweep(func(d string) bool { return known[d] })
}

// sweepable gives the digests that have a record in some namespace; nil when what has none may be what the record was lost of.
func (s *Store) sweepable() (map[string]bool, error) {
	r, err := s.db.Recovery()
	if err != nil || r != nil {
		return nil, err // see Restore
	}
	known := map[string]bool{}
	err = s.db.View(func(tx *metadata.Tx) error {
		return eachNamespace(tx, func(ns string) error {
			return metadata.EachStrict(tx.Bucket(metadata.Path(ns, metadata.Content)...), func(d string, _ *records.Blob) error {
				known[d] = true
				return nil
			})
		})
	})
	if errdefs.IsDataLoss(err) {
		slog.Error("a record of content cannot be read; unknown content is not removed", "error", err)
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot look for unknown content: %w", err)
	}
	return known, nil
}

// Tidy removes from another program what this daemon stored there and no record knows: what a commit that was interrupted
// or a removal that failed left. Content of files is tidied by New.
func (s *Store) Tidy(ctx context.Context) error {
	if !s.remote {
		return nil
	}
	blobs, err := s.backend.Blobs(ctx, true)
	if err != nil {
		return err
	}
	known, err := s.sweepable()
	if err != nil || known == nil {
		return err
	}
	for d := range blobs {
		if !known[d.String()] {
			if err := s.Free(d); err != nil {
				return err
			}
		}
	}
	return nil
}

func eachNamespace(tx *metadata.Tx, fn func(ns string) error) error {
	return tx.Bucket(metadata.Path()...).ForEachBucket(func(k []byte) error { return fn(string(k)) })
}

func valid(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", d, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Info finds a blob.
func (s *Store) Info(ctx context.Context, d digest.Digest) (i Info, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return i, err
	}
	if err := valid(d); err != nil {
		return i, err
	}
	err = s.db.View(func(tx *metadata.Tx) error {
		i, err = info(tx, ns, d)
		return err
	})
	return i, err
}

func info(tx *metadata.Tx, ns string, d digest.Digest) (Info, error) {
	var r records.Blob
	if err := metadata.Get(tx.Bucket(metadata.Path(ns, metadata.Content)...), d.String(), &r); err != nil {
		return Info{}, fmt.Errorf("content %w", err)
	}
	return decode(d, &r), nil
}

func decode(d digest.Digest, r *records.Blob) Info {
	return Info{Digest: d, Size: r.Size_, Labels: r.Labels, CreatedAt: metadata.Time(r.CreatedAt), UpdatedAt: metadata.Time(r.UpdatedAt)}
}

func (i Info) put(tx *metadata.Tx, ns string) error {
	b, err := tx.MakeBucket(metadata.Path(ns, metadata.Content)...)
	if err != nil {
		return err
	}
	tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Content, Key: i.Digest.String()})
	return metadata.Put(b, i.Digest.String(), &records.Blob{
		Size_: i.Size, Labels: i.Labels, CreatedAt: i.CreatedAt.UnixNano(), UpdatedAt: i.UpdatedAt.UnixNano(),
	})
}

// Walk calls fn for every blob that matches f, ordered by digest.
func (s *Store) Walk(ctx context.Context, f filters.Filter, fn func(Info) error) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	var all []Info // fn may take its time: not inside the transaction
	err = s.db.View(func(tx *metadata.Tx) error {
		return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Content)...), func(d string, r *records.Blob) error {
			if i := decode(digest.Digest(d), r); f.Match(i) {
				all = append(all, i)
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("cannot list content: %w", err)
	}
	for _, i := range all {
		if err := fn(i); err != nil {
			return err
		}
	}
	return nil
}

// Update changes labels: all, or those that paths name (labels, labels.KEY).
func (s *Store) Update(ctx context.Context, i Info, paths ...string) (out Info, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return i, err
	}
	if err := valid(i.Digest); err != nil {
		return i, err
	}
	if err := identifiers.ValidateLabels(i.Labels); err != nil {
		return i, fmt.Errorf("cannot update content %s: %w", i.Digest, err)
	}
	err = s.db.Batch(func(tx *metadata.Tx) error {
		if out, err = info(tx, ns, i.Digest); err != nil {
			return err
		}
		if len(paths) == 0 {
			out.Labels = i.Labels
		}
		for _, path := range paths {
			key, nested := strings.CutPrefix(path, "labels.")
			switch {
			case nested:
				out.Labels = metadata.With(out.Labels, key, i.Labels[key])
			case path == "labels":
				out.Labels = i.Labels
			default:
				return fmt.Errorf("cannot update content %s: field %q cannot be changed: %w", i.Digest, path, errdefs.ErrInvalidArgument)
			}
		}
		out.UpdatedAt = time.Now().UTC()
		return out.put(tx, ns)
	})
	return out, err
}

// Delete removes a blob from the namespace, and its bytes when no other namespace has it.
func (s *Store) Delete(ctx context.Context, d digest.Digest) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	if err := valid(d); err != nil {
		return err
	}
	s.bytes.Lock()
	defer s.bytes.Unlock()
	var shared bool
	err = s.db.Batch(func(tx *metadata.Tx) error {
		if _, err := info(tx, ns, d); err != nil {
			return err
		}
		if err := Forget(tx, ns, d); err != nil {
			return err
		}
		if err := s.events.Publish(metadata.In(ctx, tx), "/content/delete", &events.ContentDelete{Digest: d.String()}); err != nil {
			return err
		}
		shared = false
		return eachNamespace(tx, func(other string) error {
			if b := tx.Bucket(metadata.Path(other, metadata.Content)...); b != nil && b.Get([]byte(d)) != nil {
				shared = true
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	failpoint.Hit("content.delete.recorded")
	if !shared {
		if err := s.backend.Remove(ctx, d); err != nil {
			err = fmt.Errorf("cannot remove content %s: %w", d, err)
			if !s.remote {
				return err
			}
			slog.Warn("what was removed could not be freed; the next start of the daemon tries again", "error", err)
		}
	}
	failpoint.Hit("content.delete.removed")
	return nil
}

// Forget removes the record of a blob inside a transaction, for those who are in one already. When that is committed, they
// give its bytes back with Free.
func Forget(tx *metadata.Tx, ns string, d digest.Digest) error {
	b := tx.Bucket(metadata.Path(ns, metadata.Content)...)
	if b == nil {
		return nil
	}
	tx.Changed(metadata.Change{Namespace: ns, Kind: metadata.Content, Key: d.String(), Removed: true})
	return b.Delete([]byte(d))
}

// Free removes the bytes of a blob that no namespace has any more.
func (s *Store) Free(d digest.Digest) error {
	if err := s.removeUnknown(d); err != nil {
		return fmt.Errorf("cannot remove content %s: %w", d, err)
	}
	return nil
}

// Reader reads one blob. The caller closes it.
type Reader interface {
	io.ReaderAt
	io.Closer
	Size() int64
}

// ReaderAt opens a blob.
func (s *Store) ReaderAt(ctx context.Context, d digest.Digest) (Reader, error) {
	i, err := s.Info(ctx, d)
	if err != nil {
		return nil, err
	}
	r, err := s.backend.Open(ctx, d, i.Size)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("content %s has a record but no file; pull or import it again: %w", d, errdefs.ErrDataLoss)
	}
	return r, err
}

// adopt makes a blob visible in this namespace that another one shares, or that is shared and in the other program's store
// already. false when there is none.
func (s *Store) adopt(ctx context.Context, ns string, d digest.Digest) (bool, error) {
	s.bytes.RLock()
	defer s.bytes.RUnlock()
	size, err := s.shared(d)
	if err == nil && size < 0 && s.remote && s.policy == Shared {
		if size, err = s.backend.Stat(ctx, d); errdefs.IsNotFound(err) {
			return false, nil
		}
	}
	if err != nil || size < 0 || s.lost(ctx, d, size) {
		return false, err
	}
	if err := s.record(ctx, ns, d, size, nil, ""); err != nil {
		return false, err
	}
	return true, nil
}

// lost tells whether a blob that has a record is not there, or not as large. One of which the other program does not say it
// is not.
func (s *Store) lost(ctx context.Context, d digest.Digest, size int64) bool {
	there, err := s.backend.Stat(ctx, d)
	if err != nil {
		return errdefs.IsNotFound(err)
	}
	return there != size
}

// shared gives the size of a blob that some namespace has and shares, -1 when there is none.
func (s *Store) shared(d digest.Digest) (size int64, err error) {
	size = -1
	err = s.db.View(func(tx *metadata.Tx) error {
		return eachNamespace(tx, func(ns string) error {
			if s.policy != Shared {
				l := tx.Bucket(metadata.Path(ns, metadata.Labels)...)
				if l == nil || string(l.Get([]byte(ShareableLabel))) != "true" {
					return nil
				}
			}
			i, err := info(tx, ns, d)
			if err == nil {
				size = i.Size
			}
			return nil //nolint:nilerr // a namespace that has it not, or no readable record of it, shares nothing
		})
	})
	return size, err
}

// record enters a blob whose file is in place, unless the namespace has it by now, and makes a lease of its ingest one
// of the blob.
func (s *Store) record(ctx context.Context, ns string, d digest.Digest, size int64, labels map[string]string, ref string) error {
	now := time.Now().UTC()
	err := s.db.Batch(func(tx *metadata.Tx) error {
		if err := leases.Attach(ctx, tx, ns, leases.Resource{ID: d.String(), Type: leases.Content}); err != nil {
			return err
		}
		if err := leases.Detach(ctx, tx, ns, leases.Resource{ID: ref, Type: leases.Ingests}); err != nil {
			return err
		}
		if _, err := info(tx, ns, d); err == nil {
			return nil
		}
		i := Info{Digest: d, Size: size, Labels: labels, CreatedAt: now, UpdatedAt: now}
		if err := i.put(tx, ns); err != nil {
			return err
		}
		return s.events.Publish(metadata.In(ctx, tx), "/content/create", &events.ContentCreate{Digest: d.String(), Size: size})
	})
	if err != nil {
		return fmt.Errorf("cannot record content %s: %w", d, err)
	}
	return nil
}

// removeUnknown removes a blob if no namespace has a record of it.
func (s *Store) removeUnknown(d digest.Digest) error {
	s.bytes.Lock()
	defer s.bytes.Unlock()
	known := false
	err := s.db.View(func(tx *metadata.Tx) error {
		return eachNamespace(tx, func(ns string) error {
			b := tx.Bucket(metadata.Path(ns, metadata.Content)...)
			known = known || b != nil && b.Get([]byte(d)) != nil
			return nil
		})
	})
	if err != nil || known {
		return err
	}
	return s.backend.Remove(context.Background(), d)
}
