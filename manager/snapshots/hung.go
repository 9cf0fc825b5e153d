package snapshots

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/containerd/errdefs"
)

// opening is a snapshotter that was not there in time.
type opening struct {
	since time.Time
	done  chan struct{} // closed when it is there, or cannot be
	err   error         // why it cannot
}

// arriving is how long whoever asks for a snapshotter waits that is being opened.
const arriving = 5 * time.Second

// Open is Add of the backend that open gives. One that takes longer than patience, such as on a file system that does not
// answer, is no error: it is there when it is there, and whoever asks for it before waits for a moment, and gets Unavailable.
// late is called then, when it has turned out whether it is there.
func (s *Store) Open(ctx context.Context, name string, patience time.Duration, open func() (Backend, error), late func()) error {
	o := &opening{since: time.Now(), done: make(chan struct{})}
	s.mu.Lock()
	s.opening[name] = o
	s.mu.Unlock()
	settle := func(late bool) (err error) {
		<-o.done
		s.mu.Lock()
		defer s.mu.Unlock()
		if o.err == nil || !late {
			delete(s.opening, name)
		}
		return o.err
	}
	go func() { // it may wait in the kernel, where nothing ends it
		defer close(o.done)
		b, err := open()
		if err == nil {
			if err = s.Add(ctx, name, b); err != nil {
				err = errors.Join(err, b.Close())
			}
		}
		o.err = err
	}()
	select {
	case <-o.done:
		return settle(false)
	case <-time.After(patience):
	}
	go func() {
		err := settle(true)
		slog.Warn("a snapshotter has answered that did not", "snapshotter", name, "after", time.Since(o.since), "error", err)
		late()
	}()
	return nil
}

// Pending says why a snapshotter is not there that was to be opened; nil when it is.
func (s *Store) Pending(name string) error { return s.await(name, 0) }

func (s *Store) await(name string, patience time.Duration) error {
	s.mu.RLock()
	o := s.opening[name]
	s.mu.RUnlock()
	if o == nil {
		return nil
	}
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-o.done:
		return o.err
	case <-late.C:
	}
	return fmt.Errorf("snapshotter %s does not answer since %s, its file system may hang: %w", name, o.since.Format(time.DateTime), errdefs.ErrUnavailable)
}

// freeing is how long somebody waits for storage that is given back; after that it goes on by itself.
const freeing = 10 * time.Second

// free gives storage back that no record names (any more). Should that fail, Cleanup or the next start tries again.
func (s *store) free(snap Snapshot) {
	if err := s.discard(snap); err != nil {
		slog.Warn("cannot free the storage of a snapshot; cleanup tries again", "snapshotter", s.name, "snapshot", snap.String(), "error", err)
	}
}

// discard removes storage. Unavailable: that goes on, since it takes longer than anybody waits.
func (s *store) discard(snap Snapshot) error {
	done := make(chan error, 1)
	// Not the caller's context: it may be what ended.
	go func() { done <- s.backend.Remove(context.Background(), snap) }()
	late := time.NewTimer(freeing)
	defer late.Stop()
	select {
	case err := <-done:
		return err
	case <-late.C:
		return fmt.Errorf("not done after %s, its file system may hang: %w", freeing, errdefs.ErrUnavailable)
	}
}
