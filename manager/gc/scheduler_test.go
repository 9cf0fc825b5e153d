package gc

import (
	"context"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/leases"
)

// run has a scheduler work until the test ends.
func (e *env) run(set Settings) *Scheduler {
	s := NewScheduler(e.Collector, set)
	ctx, cancel := context.WithCancel(e.ctx)
	done := make(chan struct{})
	go func() { s.Run(ctx); close(done) }()
	e.t.Cleanup(func() { cancel(); <-done })
	return s
}

// gone waits until text is collected.
func (e *env) gone(text string) {
	e.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		_, err := e.content.Info(e.ctx, digest.FromString(text))
		if errdefs.IsNotFound(err) {
			return
		}
		if time.Now().After(end) {
			e.t.Fatalf("%q was not collected: %v", text, err)
		}
	}
}

func (e *env) there(text string) {
	e.t.Helper()
	if _, err := e.content.Info(e.ctx, digest.FromString(text)); err != nil {
		e.t.Error(err)
	}
}

func TestAtStart(t *testing.T) {
	e := newEnv(t)
	e.blob(e.ctx, "a", nil)
	e.run(Settings{StartupDelay: time.Millisecond})
	e.gone("a")
}

// TestDeletionMakesDue: without any wish of a client; a lease that is over by then is no deletion, and needs a timer.
func TestDeletionMakesDue(t *testing.T) {
	e := newEnv(t)
	s := e.run(Settings{StartupDelay: time.Hour, PauseThreshold: 0.02})
	e.blob(e.ctx, "a", nil)
	e.image("i", digest.FromString("a"), nil)
	e.must(s.Collect(e.ctx))
	e.there("a")
	e.must(e.images.Delete(e.ctx, "i", ""))
	e.gone("a")
	e.blob(e.lease("l", labels{leases.ExpireLabel: time.Now().Add(2 * time.Second).Format(time.RFC3339)}), "b", nil)
	e.gone("b")
}

func TestMutationsMakeDue(t *testing.T) {
	e := newEnv(t)
	s := e.run(Settings{StartupDelay: time.Hour, MutationThreshold: 5})
	e.must(s.Collect(e.ctx))
	e.blob(e.ctx, "a", nil)
	for range 5 {
		e.lease("", nil)
	}
	e.gone("a")
}

// TestDue: what makes a collection due, and from when.
func TestDue(t *testing.T) {
	now := time.Now()
	later, much := now.Add(time.Minute), now.Add(time.Hour)
	set := Settings{DeletionThreshold: 3, MutationThreshold: 10, ScheduleDelay: time.Second}
	for name, c := range map[string]struct {
		s    *Scheduler
		want time.Time
	}{
		"nothing":        {&Scheduler{set: set}, time.Time{}},
		"expiry":         {&Scheduler{set: set, expiry: much, mutations: 9}, much},
		"deletion":       {&Scheduler{set: set, deletions: 1, first: now}, later},
		"deletion later": {&Scheduler{set: set, deletions: 1, first: later}, later.Add(time.Second)},
		"deletions":      {&Scheduler{set: set, deletions: 3, first: now}, now.Add(time.Second)},
		"mutations":      {&Scheduler{set: set, mutations: 10, first: now}, later},
		"expiry first":   {&Scheduler{set: set, mutations: 10, first: now, expiry: now}, now},
		"no thresholds":  {&Scheduler{mutations: 1000, first: now}, time.Time{}},
	} {
		if got := c.s.due(later); !got.Equal(c.want) {
			t.Errorf("%s: due in %s, not in %s", name, got.Sub(now), c.want.Sub(now))
		}
	}
}

// TestOwnDeletions: what a collection deletes makes no other due.
func TestOwnDeletions(t *testing.T) {
	e := newEnv(t)
	s := e.run(Settings{StartupDelay: time.Hour})
	e.blob(e.ctx, "a", nil)
	e.must(s.Collect(e.ctx))
	e.must(s.Collect(e.ctx)) // the first has ended, also in the books, when this one begins
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.deletions != 0 || s.mutations != 0 {
		t.Errorf("%d deletions, %d mutations", s.deletions, s.mutations)
	}
}

func TestEnded(t *testing.T) {
	e := newEnv(t)
	s := NewScheduler(e.Collector, Settings{StartupDelay: time.Hour})
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	s.Run(ctx)
	if err := s.Collect(e.ctx); !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
}
