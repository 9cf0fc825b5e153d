package content

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
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
	ns      string
	dir     string
	status  Status
	file    *os.File // nil once it is closed or committed
	sum     hash.Hash
	alg     digest.Algorithm
	aborted atomic.Bool
	wrong   bool // it is whole, and not what it was to be
}

// Writer opens an ingest, new or where an earlier writer stopped. expected, if not empty, is the digest to be: when the
// namespace has it, or gets it from another that shares it, the error is AlreadyExists. total is its size in bytes, 0 if
// unknown. Both must be what the earlier writer said: FailedPrecondition. A lease in ctx keeps the ingest, and then the
// blob. The caller closes the writer.
func (s *Store) Writer(ctx context.Context, ref string, expected digest.Digest, total int64) (*Writer, error) {
	return s.writer(ctx, ref, expected, total, (*Writer).open)
}

func (s *Store) writer(ctx context.Context, ref string, expected digest.Digest, total int64, open func(*Writer) error) (_ *Writer, err error) {
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
	w := &Writer{s: s, ns: ns, dir: s.ingest(ns, ref), status: Status{Ref: ref, Total: total, Expected: expected, StartedAt: time.Now().UTC()}}
	if err := s.enter(w); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = w.Close()
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
	return w, open(w)
}

// missing is AlreadyExists when the namespace has the blob, or gets it from another that shares it.
func (s *Store) missing(ctx context.Context, ns string, d digest.Digest) error {
	i, err := s.Info(ctx, d)
	there := err == nil
	if errdefs.IsNotFound(err) {
		there, err = s.adopt(ctx, ns, d)
	} else if there {
		err = s.keep(ctx, ns, i, "")
	}
	if there && err == nil {
		return fmt.Errorf("content %s: %w", d, errdefs.ErrAlreadyExists)
	}
	return err
}

// keep has the lease of ctx, if there is one, hold on to a blob that is there.
func (s *Store) keep(ctx context.Context, ns string, i Info, ref string) error {
	if _, leased := leases.From(ctx); !leased {
		return nil
	}
	return s.record(ctx, ns, i.Digest, i.Size, i.Labels, ref)
}

// open begins the ingest, or takes up what an earlier writer left.
func (w *Writer) open() error {
	if err := w.take(); err != nil {
		return err
	}
	if err := flatten(w.dir); err != nil {
		return err
	}
	if err := w.openFile(); err != nil {
		return err
	}
	// What an earlier writer left counts as written: take it into the digest.
	var err error
	w.status.Offset, err = io.Copy(w.sum, w.file)
	return err
}

// take begins the ingest, or finds what an earlier writer said of it.
func (w *Writer) take() error {
	switch before, err := status(w.dir); {
	case errdefs.IsNotFound(err):
		return w.begin()
	case err != nil:
		return err
	case w.status.Expected != "" && before.Expected != "" && w.status.Expected != before.Expected:
		return fmt.Errorf("it was begun for %s, not for %s; abort it first: %w", before.Expected, w.status.Expected, errdefs.ErrFailedPrecondition)
	case w.status.Total > 0 && before.Total > 0 && w.status.Total != before.Total:
		return fmt.Errorf("it was begun for %d bytes, not for %d; abort it first: %w", before.Total, w.status.Total, errdefs.ErrFailedPrecondition)
	default:
		now := w.status
		w.status = before
		if now.Expected != "" {
			w.status.Expected = now.Expected
		}
		if now.Total > 0 {
			w.status.Total = now.Total
		}
	}
	return nil
}

func (w *Writer) openFile() (err error) {
	w.alg = digest.Canonical
	if e := w.status.Expected; e != "" {
		w.alg = e.Algorithm()
	}
	w.sum = w.alg.Hash()
	w.file, err = os.OpenFile(filepath.Join(w.dir, "data"), os.O_RDWR|os.O_CREATE, 0o600)
	return err
}

// usable is an error when there is nothing any more to write to.
func (w *Writer) usable() error {
	switch {
	case w.aborted.Load():
		return fmt.Errorf("ingest %q was aborted: %w", w.status.Ref, errdefs.ErrAborted)
	case w.file == nil:
		return fmt.Errorf("ingest %q is committed or closed: %w", w.status.Ref, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// begin makes the directory of a new ingest; the ref file, without which there is none, comes last but data.
func (w *Writer) begin() error {
	if err := os.RemoveAll(w.dir); err != nil {
		return err
	}
	if err := os.Mkdir(w.dir, 0o700); err != nil {
		return err
	}
	started, err := w.status.StartedAt.MarshalText()
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{
		{"total", strconv.AppendInt(nil, w.status.Total, 10)}, {"expected", []byte(w.status.Expected)}, {"startedat", started},
		{"data", nil}, {"ref", []byte(w.ns + separator + w.status.Ref)},
	} {
		if err := os.WriteFile(filepath.Join(w.dir, f.name), f.data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// Write appends.
func (w *Writer) Write(p []byte) (int, error) {
	if err := w.usable(); err != nil {
		return 0, err
	}
	n, err := w.file.Write(p)
	w.sum.Write(p[:n])
	w.status.Offset += int64(n)
	w.status.UpdatedAt = time.Now().UTC()
	return n, err
}

// Truncate throws away what was written beyond size; only 0 is supported, which begins anew.
func (w *Writer) Truncate(size int64) error {
	if size != 0 {
		return fmt.Errorf("cannot truncate ingest %q to %d bytes, only to 0: %w", w.status.Ref, size, errdefs.ErrNotImplemented)
	}
	if err := w.usable(); err != nil {
		return err
	}
	if _, err := w.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	w.sum.Reset()
	w.status.Offset, w.wrong = 0, false
	return w.file.Truncate(0)
}

// Status describes the ingest as it is now.
func (w *Writer) Status() Status { return w.status }

// Digest is that of what was written so far.
func (w *Writer) Digest() digest.Digest { return digest.NewDigest(w.alg, w.sum) }

// Commit makes a blob of what was written: it is on disk, verified, when nil is returned. size (if not 0) and expected
// (if not empty) must be what they are, or it is FailedPrecondition, and the ingest stays; but one that is whole and has
// another digest, which nothing that is added makes right, only until Close. AlreadyExists when the namespace has the blob;
// the ingest is gone then. Aborted when somebody aborted the ingest.
func (w *Writer) Commit(ctx context.Context, size int64, expected digest.Digest, labels map[string]string) error {
	if err := w.usable(); err != nil {
		return err
	}
	if err := identifiers.ValidateLabels(labels); err != nil {
		return fmt.Errorf("cannot commit %q: %w", w.status.Ref, err)
	}
	got := w.Digest()
	if size > 0 && size != w.status.Offset {
		return fmt.Errorf("cannot commit %q: it has %d bytes, expected are %d: %w", w.status.Ref, w.status.Offset, size, errdefs.ErrFailedPrecondition)
	}
	if expected == "" {
		expected = w.status.Expected
	}
	if expected != "" && expected != got {
		w.wrong = w.status.Offset > 0 && w.status.Offset >= w.status.Total
		return fmt.Errorf("cannot commit %q: its digest is %s, expected is %s: %w", w.status.Ref, got, expected, errdefs.ErrFailedPrecondition)
	}
	i, err := w.s.Info(ctx, got)
	switch {
	case err == nil:
		if err := errors.Join(w.s.keep(ctx, w.ns, i, w.status.Ref), os.RemoveAll(w.dir), w.closeFile()); err != nil {
			return err
		}
		return fmt.Errorf("content %s: %w", got, errdefs.ErrAlreadyExists)
	case !errdefs.IsNotFound(err):
		return err
	}
	if err := w.file.Sync(); err != nil {
		return fmt.Errorf("cannot sync %q: %w", w.status.Ref, err)
	}
	failpoint.Hit("content.commit.synced")
	if err := w.publish(ctx, got, labels); err != nil {
		return errors.Join(fmt.Errorf("cannot commit %q: %w", w.status.Ref, err), w.s.removeUnknown(got))
	}
	failpoint.Hit("content.commit.recorded")
	return nil
}

// publish gives the data a place among the blobs, and then enters its record. The ingest stays until then: a daemon that
// is killed between the two has lost nothing.
func (w *Writer) publish(ctx context.Context, d digest.Digest, labels map[string]string) error {
	w.s.files.RLock()
	defer w.s.files.RUnlock()
	path := w.s.path(d)
	if err := makeDir(filepath.Dir(path)); err != nil {
		return err
	}
	if err := place(w.dir, path); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("it was aborted: %w", errdefs.ErrAborted)
	} else if err != nil {
		return err
	}
	failpoint.Hit("content.commit.renamed")
	err := errors.Join(w.closeFile(), os.Chmod(path, 0o444), syncDir(filepath.Dir(path)))
	if err == nil {
		err = w.s.record(ctx, w.ns, d, w.status.Offset, labels, w.status.Ref)
	}
	return errors.Join(err, os.RemoveAll(w.dir))
}

// place makes the data of an ingest a blob as well, or where the filesystem has no hard links, instead.
func place(dir, path string) error {
	data, second := filepath.Join(dir, "data"), filepath.Join(dir, "blob")
	err := os.Link(data, second)
	if errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return os.Rename(data, path)
	}
	return os.Rename(second, path)
}

// Close lets go of the ingest.
func (w *Writer) Close() error {
	var err error
	if w.wrong && w.usable() == nil {
		err = os.RemoveAll(w.dir)
	}
	w.s.leave(w)
	return errors.Join(err, w.closeFile())
}

func (w *Writer) closeFile() error {
	if w.file == nil {
		return nil
	}
	f := w.file
	w.file = nil
	return f.Close()
}

// makeDir makes a directory, if there is none, so that it is there after a power failure.
func makeDir(path string) error {
	err := os.Mkdir(path, 0o755)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
