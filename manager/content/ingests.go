package content

import (
	"context"
	"fmt"
	"sort"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

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

// Status finds an ingest.
func (s *Store) Status(ctx context.Context, ref string) (Status, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return Status{}, err
	}
	st, err := s.backend.Status(ctx, ns, ref)
	if err != nil {
		return Status{}, fmt.Errorf("ingest %q: %w", ref, err)
	}
	return st, nil
}

// ListStatuses gives the ingests that match f, ordered by reference.
func (s *Store) ListStatuses(ctx context.Context, f filters.Filter) ([]Status, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	all, err := s.backend.Ingests(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot list ingests: %w", err)
	}
	var out []Status
	for _, i := range all {
		if i.Namespace == ns && f.Match(i.Status) {
			out = append(out, i.Status)
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
	w := s.writers[ns+separator+ref]
	s.mu.Unlock()
	if err := s.backend.Abort(ctx, ns, ref); err != nil {
		return fmt.Errorf("ingest %q: %w", ref, err)
	}
	if w != nil {
		w.aborted.Store(true)
	}
	return nil
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
	for _, ref := range idle {
		if keep[ref] {
			continue
		}
		switch done, err := s.abortIdle(ctx, ns, ref); {
		case err != nil:
			return n, fmt.Errorf("cannot abort ingest %q: %w", ref, err)
		case done:
			n++
		}
	}
	return n, nil
}

// abortIdle throws an ingest away unless somebody has it open; meanwhile nobody opens it.
func (s *Store) abortIdle(ctx context.Context, ns, ref string) (done bool, err error) {
	w := &Writer{ns: ns, ref: ref}
	if s.enter(w) != nil {
		return false, nil
	}
	defer s.leave(w)
	if err := s.backend.Abort(ctx, ns, ref); err != nil && !errdefs.IsNotFound(err) {
		return false, err
	}
	return true, nil
}

// ErrBusy is an ingest that another client writes: Unavailable.
var ErrBusy = fmt.Errorf("is being written by another client: %w", errdefs.ErrUnavailable)

// enter makes w the writer of its ingest.
func (s *Store) enter(w *Writer) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := w.ns + separator + w.ref
	if _, taken := s.writers[k]; taken {
		return fmt.Errorf("ingest %q %w", w.ref, ErrBusy)
	}
	s.writers[k] = w
	return nil
}

func (s *Store) leave(w *Writer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := w.ns + separator + w.ref; s.writers[k] == w {
		delete(s.writers, k)
	}
}
