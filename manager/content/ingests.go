package content

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/filters"
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
	if p, err := readParts(dir); err == nil {
		st.Offset = p.written()
	} else if !errors.Is(err, fs.ErrNotExist) {
		st.Offset = 0 // which bytes are there is not known
	}
	if data, err := os.ReadFile(filepath.Join(dir, "total")); err == nil {
		st.Total, _ = strconv.ParseInt(string(data), 10, 64)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "expected")); err == nil {
		if d := digest.Digest(data); d.Validate() == nil {
			st.Expected = d
		}
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

// Abort throws an ingest away, also under the hands of a writer, which fails with Aborted from then on: a client that
// closes its stream and aborts must not find that the daemon has not yet seen the first.
func (s *Store) Abort(ctx context.Context, ref string) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	dir := s.ingest(ns, ref)
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("ingest %q: %w", ref, errdefs.ErrNotFound)
	}
	if w := s.writers[ns+separator+ref]; w != nil {
		w.aborted.Store(true)
	}
	return os.RemoveAll(dir)
}

// SweepIdle aborts the ingests of the namespace that have not been written since, that nobody has open, and that kept,
// asked for when there are any, does not name. It gives their number.
func (s *Store) SweepIdle(ctx context.Context, since time.Time, kept func() (map[string]bool, error)) (n int, err error) {
	all, err := s.ListStatuses(ctx, filters.Always)
	if err != nil {
		return 0, err
	}
	var idle []string
	for _, st := range all {
		if st.UpdatedAt.Before(since) {
			idle = append(idle, st.Ref)
		}
	}
	if len(idle) == 0 {
		return 0, nil
	}
	keep, err := kept()
	if err != nil {
		return 0, err
	}
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ref := range idle {
		if keep[ref] || s.writers[ns+separator+ref] != nil {
			continue
		}
		if err := os.RemoveAll(s.ingest(ns, ref)); err != nil {
			return n, fmt.Errorf("cannot abort ingest %q: %w", ref, err)
		}
		n++
	}
	return n, nil
}

// enter makes w the writer of its ingest.
func (s *Store) enter(w *Writer) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := w.ns + separator + w.status.Ref
	if _, taken := s.writers[k]; taken {
		return fmt.Errorf("ingest %q is being written by another client: %w", w.status.Ref, errdefs.ErrUnavailable)
	}
	s.writers[k] = w
	return nil
}

func (s *Store) leave(w *Writer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := w.ns + separator + w.status.Ref; s.writers[k] == w {
		delete(s.writers, k)
	}
}

// committed tells whether the data of an ingest is a blob by now.
func committed(dir string) bool {
	_ = os.Remove(filepath.Join(dir, "blob")) // see place
	var st unix.Stat_t
	return unix.Stat(filepath.Join(dir, "data"), &st) == nil && st.Nlink > 1
}

// sweepIngests removes what a daemon that was killed left of ingests that were just begun, or were just committed.
func (s *Store) sweepIngests() error {
	dirs, err := os.ReadDir(s.ingests())
	if err != nil {
		return err
	}
	for _, d := range dirs {
		dir := filepath.Join(s.ingests(), d.Name())
		if _, err := status(dir); errdefs.IsNotFound(err) || committed(dir) {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
	}
	return nil
}
