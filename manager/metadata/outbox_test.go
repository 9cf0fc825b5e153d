package metadata

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"

	"github.com/managerd/managerd/manager/namespaces"
)

// listener takes events as the exchange does: one that it has had from a source is not new.
type listener struct {
	mu     sync.Mutex
	got    []string
	newest map[string]uint64
}

func (l *listener) take(source string, seq uint64, e *types.Envelope) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if seq > l.newest[source] {
		l.newest[source] = seq
		l.got = append(l.got, e.Namespace+e.Topic)
	}
	return nil
}

func (l *listener) seen() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.got)
}

// TestOutbox: events are told in the order of the changes, those of changes that failed are not, those of a daemon that was
// killed before it told them are by the next one, and none twice; what was told does not stay.
func TestOutbox(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	db, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	change := func(db *DB, topic string, fail error) error {
		return db.Batch(func(tx *Tx) error {
			ctx := In(namespaces.With(context.Background(), "ns"), tx)
			return errors.Join(db.Publish(ctx, topic, &events.ImageDelete{Name: "x"}), fail)
		})
	}
	waiting := func(db *DB) (n int) {
		err := db.View(func(tx *Tx) error {
			if b := tx.Bucket(string(outboxBucket)); b != nil {
				n = entries(b)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	// Nobody takes them yet: as with a daemon that is killed between the commit and the telling.
	var want []string
	for i := range 3 {
		if err := change(db, fmt.Sprint("/images/", i), nil); err != nil {
			t.Fatal(err)
		}
		want = append(want, fmt.Sprint("ns/images/", i))
	}
	if err := change(db, "/images/never", errors.New("no")); err == nil {
		t.Fatal("it was to fail")
	}
	if n := waiting(db); n != 3 {
		t.Errorf("%d events wait", n)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	l := &listener{newest: map[string]uint64{}}
	for range 2 { // the second daemon finds what the first one had no time to take out
		if db, err = Open(path); err != nil {
			t.Fatal(err)
		}
		if err := db.Deliver(l.take); err != nil {
			t.Fatal(err)
		}
		if got := l.seen(); !slices.Equal(got, want) {
			t.Errorf("told %q, want %q", got, want)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if db, err = Open(path); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	if err := db.Deliver(l.take); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if err := change(db, "/images/more", nil); err != nil {
				t.Error(err)
			}
			if err := change(db, "/images/never", errors.New("no")); err == nil {
				t.Error("it was to fail")
			}
		})
		want = append(want, "ns/images/more")
	}
	all.Wait()
	if got := l.seen(); !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
	for deadline := time.Now().Add(30 * time.Second); waiting(db) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d events stay", waiting(db))
		}
	}
}
