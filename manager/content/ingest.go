package content

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// Writer writes one ingest; nobody else does until it is closed. What was written and not committed stays, to be
// resumed or aborted.
type Writer struct {
	s       *Store
	ns, ref string
	in      Session
	over    bool // it is committed or closed
	aborted atomic.Bool
	wrong   bool // it is whole, and not what it was to be
}

// Writer opens an ingest, new or where an earlier writer stopped. expected, if not empty, is the digest to be: when the
// namespace has it, or gets it from another that shares it, the error is AlreadyExists. total is its size in bytes, 0 if
// unknown. Both must be what the earlier writer said: FailedPrecondition. A lease in ctx keeps the ingest, and then the
// blob. The caller closes the writer.
func (s *Store) Writer(ctx context.Context, ref string, expected digest.Digest, total int64) (*Writer, error) {
	return s.writer(ctx, ref, expected, total, s.backend.Ingest)
}

type opener func(ctx context.Context, ns string, want Status) (Session, error)

func (s *Store) writer(ctx context.Context, ref string, expected digest.Digest, total int64, open opener) (_ *Writer, err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	switch {
	case ref == "":
		return nil, fmt.Errorf("ingest has no reference: %w", errdefs.ErrInvalidArgument)
	case strings.Contains(ref, separator):
		return nil, fmt.Errorf("ingest reference %q has a NUL byte: %w", ref, errdefs.ErrInvalidArgument)
	case total < 0:
		return nil, fmt.Errorf("ingest %q has a total of %d bytes: %w", ref, total, errdefs.ErrInvalidArgument)
	}
	if expected != "" {
		if err := s.missing(ctx, ns, expected); err != nil {
			return nil, err
		}
	}
	w := &Writer{s: s, ns: ns, ref: ref}
	if err := s.enter(w); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.leave(w)
			err = fmt.Errorf("cannot open ingest %q: %w", ref, err)
		}
	}()
	if _, leased := leases.From(ctx); leased {
		err := s.db.Batch(func(tx *metadata.Tx) error {
			return leases.Attach(ctx, tx, ns, leases.Resource{ID: ref, Type: leases.Ingests})
		})
		if err != nil {
			return nil, err
		}
	}
	w.in, err = open(ctx, ns, Status{Ref: ref, Total: total, Expected: expected, StartedAt: time.Now().UTC()})
	return w, err
}

// missing is AlreadyExists when the namespace has the blob, or gets it from another that shares it.
func (s *Store) missing(ctx context.Context, ns string, d digest.Digest) error {
	there, err := s.keep(ctx, ns, d, "")
	if err == nil && !there {
		there, err = s.adopt(ctx, ns, d)
	}
	if there && err == nil {
		return fmt.Errorf("content %s: %w", d, errdefs.ErrAlreadyExists)
	}
	return err
}

// Keep has the lease of ctx, if there is one, hold on to a blob that the namespace has, or gets from another that shares
// it. NotFound when it has to be written.
func (s *Store) Keep(ctx context.Context, d digest.Digest) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	switch err := s.missing(ctx, ns, d); {
	case err == nil:
		return fmt.Errorf("content %s: %w", d, errdefs.ErrNotFound)
	case errdefs.IsAlreadyExists(err):
		return nil
	default:
		return err
	}
}

// keep tells whether the namespace has a blob, which the lease of ctx, if there is one, then holds on to instead of its
// ingest ref. It looks where it writes: what was collected a moment before is not there. Nor is one whose bytes are lost: to
// write it again is what mends it.
func (s *Store) keep(ctx context.Context, ns string, d digest.Digest, ref string) (there bool, err error) {
	if err := valid(d); err != nil {
		return false, err
	}
	var i Info
	look := func(tx *metadata.Tx) (err error) {
		i, err = info(tx, ns, d)
		if there = err == nil; errdefs.IsNotFound(err) {
			return nil
		}
		return err
	}
	if err := s.db.View(look); err != nil || !there {
		return false, err
	}
	if s.lost(ctx, d, i.Size) {
		slog.Warn("content has a record, but its bytes are not there, or not all; it is written again", "namespace", ns, "digest", d)
		return false, nil
	}
	if _, leased := leases.From(ctx); !leased {
		return true, nil
	}
	err = s.db.Batch(func(tx *metadata.Tx) error {
		if err := look(tx); err != nil || !there {
			return err
		}
		if err := leases.Attach(ctx, tx, ns, leases.Resource{ID: d.String(), Type: leases.Content}); err != nil {
			return err
		}
		return leases.Detach(ctx, tx, ns, leases.Resource{ID: ref, Type: leases.Ingests})
	})
	if err != nil {
		return false, fmt.Errorf("cannot keep content %s: %w", d, err)
	}
	return there, nil
}

// usable is an error when there is nothing any more to write to.
func (w *Writer) usable() error {
	switch {
	case w.aborted.Load():
		return fmt.Errorf("ingest %q was aborted: %w", w.ref, errdefs.ErrAborted)
	case w.over:
		return fmt.Errorf("ingest %q is committed or closed: %w", w.ref, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// Write appends.
func (w *Writer) Write(p []byte) (int, error) {
	if err := w.usable(); err != nil {
		return 0, err
	}
	return w.in.Write(p)
}

// Truncate throws away what was written beyond size; only 0 is supported, which begins anew.
func (w *Writer) Truncate(size int64) error {
	if size != 0 {
		return fmt.Errorf("cannot truncate ingest %q to %d bytes, only to 0: %w", w.ref, size, errdefs.ErrNotImplemented)
	}
	if err := w.usable(); err != nil {
		return err
	}
	w.wrong = false
	return w.in.Reset()
}

// Status describes the ingest as it is now.
func (w *Writer) Status() Status { return w.in.Status() }

// Digest is that of what was written so far; empty when the program that keeps it does not say.
func (w *Writer) Digest() digest.Digest {
	d, err := w.in.Digest()
	if err != nil {
		return ""
	}
	return d
}

// Commit makes a blob of what was written: it is on disk, verified, when nil is returned. size (if not 0) and expected
// (if not empty) must be what they are, or it is FailedPrecondition, and the ingest stays; but one that is whole and has
// another digest, which nothing that is added makes right, only until Close. AlreadyExists when the namespace has the blob;
// the ingest is gone then. Aborted when somebody aborted the ingest.
func (w *Writer) Commit(ctx context.Context, size int64, expected digest.Digest, labels map[string]string) error {
	if err := w.usable(); err != nil {
		return err
	}
	if err := identifiers.ValidateLabels(labels); err != nil {
		return fmt.Errorf("cannot commit %q: %w", w.ref, err)
	}
	got, err := w.in.Digest()
	if err != nil {
		return fmt.Errorf("cannot commit %q: %w", w.ref, err)
	}
	st := w.in.Status()
	if size > 0 && size != st.Offset {
		return fmt.Errorf("cannot commit %q: it has %d bytes, expected are %d: %w", w.ref, st.Offset, size, errdefs.ErrFailedPrecondition)
	}
	if expected == "" {
		expected = st.Expected
	}
	if got == "" {
		got = expected // who keeps it verifies it
	}
	switch {
	case got == "":
		return fmt.Errorf("cannot commit %q: nobody knows its digest; abort it first: %w", w.ref, errdefs.ErrFailedPrecondition)
	case expected != "" && expected != got:
		w.wrong = st.Offset > 0 && st.Offset >= st.Total
		return fmt.Errorf("cannot commit %q: its digest is %s, expected is %s: %w", w.ref, got, expected, errdefs.ErrFailedPrecondition)
	}
	switch there, err := w.s.keep(ctx, w.ns, got, w.ref); {
	case err != nil:
		return err
	case there:
		w.over = true
		if err := errors.Join(w.in.Discard(ctx), w.in.Close()); err != nil {
			return err
		}
		return fmt.Errorf("content %s: %w", got, errdefs.ErrAlreadyExists)
	}
	if err := w.in.Sync(); err != nil {
		return fmt.Errorf("cannot sync %q: %w", w.ref, err)
	}
	failpoint.Hit("content.commit.synced")
	if err := w.publish(ctx, got, labels); err != nil {
		return errors.Join(fmt.Errorf("cannot commit %q: %w", w.ref, err), w.s.removeUnknown(got))
	}
	failpoint.Hit("content.commit.recorded")
	return nil
}

// publish makes a blob of the data, and then enters its record. The ingest of a file stays until then.
func (w *Writer) publish(ctx context.Context, d digest.Digest, labels map[string]string) error {
	w.s.bytes.RLock()
	defer w.s.bytes.RUnlock()
	if err := w.in.Commit(ctx, d); err != nil {
		return err
	}
	w.over = true
	err := w.s.record(ctx, w.ns, d, w.in.Status().Offset, labels, w.ref)
	return errors.Join(err, w.in.Discard(ctx))
}

// Close lets go of the ingest.
func (w *Writer) Close() error {
	var err error
	if w.wrong && w.usable() == nil {
		err = w.in.Discard(context.Background())
	}
	w.over = true
	err = errors.Join(err, w.in.Close())
	w.s.leave(w)
	return err
}
