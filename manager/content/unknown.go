package content

import (
	"context"

	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/metadata"
)

// Unknown gives the blobs that no namespace has a record of. One that is just being committed may be among them: Free
// looks again.
func (s *Store) Unknown(ctx context.Context) ([]digest.Digest, error) {
	r := newRestoring(s)
	if err := r.list(ctx); err != nil {
		return nil, err
	}
	s.bytes.Lock() // no commit is between a blob that was listed and its record
	defer s.bytes.Unlock()
	if err := r.look(); err != nil {
		return nil, err
	}
	return r.unknown(), nil
}

// Blob is a record of a blob.
type Blob struct {
	Namespace string
	Digest    digest.Digest
}

// Missing gives the records whose blob is not there, or has another size.
func (s *Store) Missing(ctx context.Context) (out []Blob, err error) {
	var all []Blob
	var sizes []int64
	err = s.db.View(func(tx *metadata.Tx) error {
		return eachNamespace(tx, func(ns string) error {
			return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Content)...), func(d string, r *records.Blob) error {
				if b := (Blob{ns, digest.Digest(d)}); b.Digest.Validate() == nil {
					all, sizes = append(all, b), append(sizes, r.Size_)
				}
				return nil
			})
		})
	})
	if err != nil || len(all) == 0 {
		return nil, err
	}
	stored, err := s.backend.Blobs(ctx, false)
	if err != nil {
		return nil, err
	}
	for i, b := range all {
		if size, ok := stored[b.Digest]; ok && size == sizes[i] {
			continue
		}
		if _, err := s.Info(namespaces.With(ctx, b.Namespace), b.Digest); err != nil {
			continue // removed meanwhile
		}
		out = append(out, b)
	}
	return out, nil
}

// Idle gives the ingests of all namespaces that nobody writes now.
func (s *Store) Idle(ctx context.Context) (out []Ingest, err error) {
	all, err := s.backend.Ingests(ctx)
	for _, i := range all {
		if !s.writing(i.Namespace, i.Ref) {
			out = append(out, i)
		}
	}
	return out, err
}

func (s *Store) writing(ns, ref string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writers[ns+separator+ref] != nil
}

// AbortIdle throws an ingest away that nobody writes.
func (s *Store) AbortIdle(ctx context.Context, i Ingest) error {
	_, err := s.abortIdle(ctx, i.Namespace, i.Ref)
	return err
}
