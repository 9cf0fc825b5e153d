package content

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/namespaces"
)

// Status describes an ingest: something that is being written under a reference, a name that its writer chose.
type Status struct {
	Ref       string
	Offset    int64 // bytes written
	Total     int64 // bytes expected, 0 if unknown
	Expected  digest.Digest
	StartedAt time.Time
	UpdatedAt time.Time
}

// Field lets filters look at an ingest: ref.
func (s Status) Field(path []string) (string, bool) {
	if len(path) == 1 && path[0] == "ref" {
		return s.Ref, true
	}
	return "", false
}

// separator stands between namespace and reference in an ingest's ref file; neither can contain it.
const separator = "\x00"

func (s *Store) ingest(ns, ref string) string {
	sum := sha256.Sum256([]byte(ns + separator + ref))
	return filepath.Join(s.ingests(), hex.EncodeToString(sum[:]))
}

// Status finds an ingest.
func (s *Store) Status(ctx context.Context, ref string) (Status, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return Status{}, err
	}
	st, err := status(s.ingest(ns, ref))
	if err != nil {
		return Status{}, fmt.Errorf("ingest %q: %w", ref, err)
	}
	return st, nil
}

func status(dir string) (st Status, err error) {
	data, err := os.ReadFile(filepath.Join(dir, "ref"))
	if errors.Is(err, fs.ErrNotExist) {
		return st, errdefs.ErrNotFound
	}
	if err != nil {
		return st, err
	}
	_, st.Ref, _ = strings.Cut(string(data), separator)
	fi, err := os.Stat(filepath.Join(dir, "data"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = errdefs.ErrNotFound
		}
		return st, err
	}
	st.Offset, st.UpdatedAt = fi.Size(), fi.ModTime()
	if data, err := os.ReadFile(filepath.Join(dir, "total")); err == nil {
		st.Total, _ = strconv.ParseInt(string(data), 10, 64)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "expected")); err == nil {
		st.Expected = digest.Digest(data)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "startedat")); err == nil {
		_ = st.StartedAt.UnmarshalText(data)
	}
	return st, nil
}

// ListStatuses gives the ingests that match f, ordered by reference.
func (s *Store) ListStatuses(ctx context.Context, f filters.Filter) ([]Status, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	dirs, err := os.ReadDir(s.ingests())
	if err != nil {
		return nil, fmt.Errorf("cannot list ingests: %w", err)
	}
	var out []Status
	for _, d := range dirs {
		dir := filepath.Join(s.ingests(), d.Name())
		if data, err := os.ReadFile(filepath.Join(dir, "ref")); err != nil || !strings.HasPrefix(string(data), ns+separator) {
			continue
		}
		if st, err := status(dir); err == nil && f.Match(st) {
			out = append(out, st)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Ref < out[j].Ref })
	return out, nil
}

// Abort throws an ingest away. Unavailable while somebody writes it.
func (s *Store) Abort(ctx context.Context, ref string) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	unlock, err := s.lock(ns, ref)
	if err != nil {
		return err
	}
	defer unlock()
	dir := s.ingest(ns, ref)
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("ingest %q: %w", ref, errdefs.ErrNotFound)
	}
	return os.RemoveAll(dir)
}

func (s *Store) lock(ns, ref string) (unlock func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := ns + separator + ref
	if _, taken := s.refs[k]; taken {
		return nil, fmt.Errorf("ingest %q is being written by another client: %w", ref, errdefs.ErrUnavailable)
	}
	s.refs[k] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.refs, k)
	}, nil
}

// Writer writes one ingest; nobody else does until it is closed. What was written and not committed stays, to be
// resumed or aborted.
type Writer struct {
	s      *Store
	ns     string
	dir    string
	status Status
	file   *os.File
	sum    hash.Hash
	alg    digest.Algorithm
	unlock func()
}

// Writer opens an ingest, new or where an earlier writer stopped. expected, if not empty, is the digest to be: when the
// namespace has it, or gets it from another that has, the error is AlreadyExists. total is its size in bytes, 0 if
// unknown. The caller closes the writer.
func (s *Store) Writer(ctx context.Context, ref string, expected digest.Digest, total int64) (_ *Writer, err error) {
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
	alg := digest.Canonical
	if expected != "" {
		if err := valid(expected); err != nil {
			return nil, err
		}
		alg = expected.Algorithm()
		_, err := s.Info(ctx, expected)
		there := err == nil
		if !there {
			if there, err = s.adopt(ctx, ns, expected, nil); err != nil {
				return nil, err
			}
		}
		if there {
			return nil, fmt.Errorf("content %s: %w", expected, errdefs.ErrAlreadyExists)
		}
	}
	unlock, err := s.lock(ns, ref)
	if err != nil {
		return nil, err
	}
	w := &Writer{s: s, ns: ns, dir: s.ingest(ns, ref), alg: alg, sum: alg.Hash(), unlock: unlock}
	defer func() {
		if err != nil {
			_ = w.Close()
			err = fmt.Errorf("cannot open ingest %q: %w", ref, err)
		}
	}()
	if w.status, err = status(w.dir); err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	} else if err != nil {
		w.status = Status{Ref: ref, Total: total, Expected: expected, StartedAt: time.Now().UTC()}
		if err := w.begin(); err != nil {
			return nil, err
		}
	}
	if w.file, err = os.OpenFile(filepath.Join(w.dir, "data"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	// What an earlier writer left counts as written: take it into the digest.
	if w.status.Offset, err = io.Copy(w.sum, w.file); err != nil {
		return nil, err
	}
	if total > 0 {
		w.status.Total = total
	}
	return w, nil
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
	if _, err := w.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	w.sum.Reset()
	w.status.Offset = 0
	return w.file.Truncate(0)
}

// Status describes the ingest as it is now.
func (w *Writer) Status() Status { return w.status }

// Digest is that of what was written so far.
func (w *Writer) Digest() digest.Digest { return digest.NewDigest(w.alg, w.sum) }

// Commit makes a blob of what was written: it is on disk, verified, when nil is returned. size (if not 0) and expected
// (if not empty) must be what they are: FailedPrecondition, and the ingest stays. AlreadyExists when the namespace has
// the blob; the ingest is gone then.
func (w *Writer) Commit(ctx context.Context, size int64, expected digest.Digest, labels map[string]string) error {
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
		return fmt.Errorf("cannot commit %q: its digest is %s, expected is %s: %w", w.status.Ref, got, expected, errdefs.ErrFailedPrecondition)
	}
	if _, err := w.s.Info(ctx, got); err == nil {
		if err := os.RemoveAll(w.dir); err != nil {
			return err
		}
		return fmt.Errorf("content %s: %w", got, errdefs.ErrAlreadyExists)
	}
	if err := w.file.Sync(); err != nil {
		return fmt.Errorf("cannot sync %q: %w", w.status.Ref, err)
	}
	w.s.files.RLock()
	defer w.s.files.RUnlock()
	path := w.s.path(got)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(w.dir, "data"), path); err != nil {
		return fmt.Errorf("cannot commit %q: %w", w.status.Ref, err)
	}
	if err := os.Chmod(path, 0o444); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return err
	}
	if err := os.RemoveAll(w.dir); err != nil {
		return err
	}
	return w.s.record(ctx, w.ns, got, w.status.Offset, labels)
}

// Close lets go of the ingest.
func (w *Writer) Close() error {
	if w.unlock == nil {
		return nil
	}
	w.unlock()
	w.unlock = nil
	if w.file == nil {
		return nil
	}
	return w.file.Close()
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
