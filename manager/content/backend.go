package content

import (
	"context"
	"io"

	"github.com/opencontainers/go-digest"
)

// Backend keeps bytes: blobs by their digest, and ingests by namespace and reference. It knows neither records nor who may
// see a blob. Its methods may be called from several goroutines.
type Backend interface {
	// Open reads a blob of size bytes. NotFound, here or when it is read, when there is none. The caller closes it.
	Open(ctx context.Context, d digest.Digest, size int64) (Reader, error)
	// Stat gives the size of a blob in bytes; NotFound.
	Stat(ctx context.Context, d digest.Digest) (int64, error)
	// Remove removes a blob, if there is one.
	Remove(ctx context.Context, d digest.Digest) error
	// Blobs gives the sizes of all blobs in bytes; with ours, only of those that are known to have been stored by this daemon.
	Blobs(ctx context.Context, ours bool) (map[digest.Digest]int64, error)

	// Ingest opens an ingest, new or where an earlier writer stopped. want has its reference, total and expected digest, each
	// of the latter only if it is known; FailedPrecondition when the earlier writer said otherwise. Nobody else has it open.
	// The caller closes it, without which it is not open to others.
	Ingest(ctx context.Context, ns string, want Status) (Session, error)
	// Status finds an ingest; NotFound.
	Status(ctx context.Context, ns, ref string) (Status, error)
	// Ingests gives the ingests of all namespaces.
	Ingests(ctx context.Context) ([]Ingest, error)
	// Abort throws an ingest away, open or not; NotFound.
	Abort(ctx context.Context, ns, ref string) error
}

// Session is an ingest that is open, for one goroutine.
type Session interface {
	// Write appends.
	io.Writer
	// Reset throws away what was written.
	Reset() error
	// Status is the ingest as it is now, also after it was committed or closed.
	Status() Status
	// Digest of what was written, by the algorithm of the digest that is expected; empty when it cannot be known.
	Digest() (digest.Digest, error)
	// Sync has what was written on disk.
	Sync() error
	// Commit makes a blob of what was written, whose digest d is, unless there is one. The ingest is gone then, or stays until
	// Discard; Aborted when it was aborted.
	Commit(ctx context.Context, d digest.Digest) error
	// Discard removes the ingest, committed or not.
	Discard(ctx context.Context) error
	// Close lets go of it, any number of times.
	Close() error
}

// Algorithm is that of the digest that is expected.
func (st Status) Algorithm() digest.Algorithm {
	if st.Expected == "" {
		return digest.Canonical
	}
	return st.Expected.Algorithm()
}

// Ingest is an ingest of a namespace.
type Ingest struct {
	Namespace string
	Status
}
