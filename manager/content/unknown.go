package content

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/metadata"
)

// Unknown gives the blobs that no namespace has a record of. One that is just being committed may be among them: Free
// looks again.
func (s *Store) Unknown() ([]digest.Digest, error) {
	r := &restoring{s: s, known: map[string]map[digest.Digest]bool{}, files: map[digest.Digest]int64{}}
	s.files.Lock() // no commit is between the file and its record
	defer s.files.Unlock()
	if err := r.look(context.Background()); err != nil {
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
func (s *Store) Missing() (out []Blob, err error) {
	err = s.db.View(func(tx *metadata.Tx) error {
		return eachNamespace(tx, func(ns string) error {
			return metadata.Each(tx.Bucket(metadata.Path(ns, metadata.Content)...), func(d string, r *records.Blob) error {
				b := Blob{ns, digest.Digest(d)}
				if b.Digest.Validate() != nil {
					return nil
				}
				if fi, err := os.Stat(s.path(b.Digest)); errors.Is(err, fs.ErrNotExist) || err == nil && fi.Size() != r.Size_ {
					out = append(out, b)
				}
				return nil
			})
		})
	})
	return out, err
}

// Ingest is an ingest that nobody writes now.
type Ingest struct {
	Namespace string
	Status
}

// Idle gives the ingests of all namespaces that nobody writes now.
func (s *Store) Idle() (out []Ingest, err error) {
	dirs, err := os.ReadDir(s.ingests())
	if err != nil {
		return nil, err
	}
	for _, d := range dirs {
		dir := filepath.Join(s.ingests(), d.Name())
		data, err := os.ReadFile(filepath.Join(dir, "ref"))
		if err != nil {
			continue // just being made, or gone
		}
		ns, ref, ok := strings.Cut(string(data), separator)
		st, err := status(dir)
		if !ok || err != nil || s.ingest(ns, ref) != dir || s.writing(ns, ref) {
			continue
		}
		out = append(out, Ingest{ns, st})
	}
	return out, nil
}

func (s *Store) writing(ns, ref string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writers[ns+separator+ref] != nil
}

// AbortIdle throws an ingest away that nobody writes.
func (s *Store) AbortIdle(ctx context.Context, i Ingest) error {
	if s.writing(i.Namespace, i.Ref) {
		return nil
	}
	return s.Abort(namespaces.With(ctx, i.Namespace), i.Ref)
}
