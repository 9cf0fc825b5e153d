package gc

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
)

// Settings say when a collection is due: those of containerd's plugin io.containerd.gc.v1.scheduler.
type Settings struct {
	PauseThreshold    float64       // the greatest part of the time during which collections may keep others from writing, 0 to 0.5
	DeletionThreshold int           // after how many deletions one does not wait for that any more; 0: never
	MutationThreshold int           // after how many changes one is due though nothing was deleted; 0: never
	ScheduleDelay     time.Duration // from what makes one due to its beginning
	StartupDelay      time.Duration // from the start of the daemon to the first
}

// Scheduler runs a collector: after deletions, when something expires, and when it is asked to.
type Scheduler struct {
	collector *Collector
	set       Settings
	metrics   metrics
	held      bool // what was said last

	mu        sync.Mutex
	deletions int // since the last collection began
	mutations int
	first     time.Time // when the first of them was
	expiry    time.Time // the next one that is known; zero: none
	waiting   []chan error
	ended     bool
	wake      chan struct{}
}

// NewScheduler makes one that does nothing before Run. It watches the collector's database until Run has ended.
func NewScheduler(c *Collector, set Settings) *Scheduler {
	return &Scheduler{collector: c, set: set, metrics: newMetrics(), wake: make(chan struct{}, 1)}
}

// Run collects when it is due, until ctx ends.
func (s *Scheduler) Run(ctx context.Context) {
	defer s.collector.DB.Watch(s.changed)()
	defer s.refuse()
	first := time.Now().Add(s.set.StartupDelay)
	var earliest time.Time
	for {
		due := sooner(first, s.due(earliest))
		if due.IsZero() {
			due = time.Now().Add(24 * time.Hour) // nothing is to be done: to look again does no harm
		}
		timer := time.NewTimer(time.Until(due))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-s.wake:
			timer.Stop()
			continue
		case <-timer.C:
		}
		waiting := s.begin()
		res, err := s.collector.Collect(ctx)
		s.end(ctx, waiting, res, err)
		pause := res.Took * working
		if s.set.PauseThreshold > 0 {
			pause = max(pause, time.Duration(float64(res.Locked)/s.set.PauseThreshold))
		}
		first, earliest = time.Time{}, time.Now().Add(pause)
	}
}

// working is how many times as long as a collection took it stays away, so that it takes no more than a tenth of a
// processor however much is deleted.
const working = 9

func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// due tells when the next collection is, as far as is known by now; zero: none is needed. earliest is when it
// may be.
func (s *Scheduler) due(earliest time.Time) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	enough := s.set.DeletionThreshold > 0 && s.deletions >= s.set.DeletionThreshold
	changed := s.deletions > 0 || s.set.MutationThreshold > 0 && s.mutations >= s.set.MutationThreshold
	if len(s.waiting) > 0 {
		return time.Now()
	}
	if !enough && !changed {
		return s.expiry
	}
	at := s.first.Add(s.set.ScheduleDelay)
	if !enough && earliest.After(at) {
		at = earliest
	}
	return sooner(at, s.expiry)
}

// changed counts; it is called inside a commit.
func (s *Scheduler) changed(changes []metadata.Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mutations == 0 {
		s.first = time.Now()
	}
	for _, c := range changes {
		s.mutations++
		if c.Removed {
			s.deletions++
		}
		s.expiry = sooner(s.expiry, c.Expires)
	}
	s.poke()
}

func (s *Scheduler) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// begin gives those whom the collection that begins now is to answer.
func (s *Scheduler) begin() []chan error {
	s.mu.Lock()
	defer s.mu.Unlock()
	waiting := s.waiting
	s.waiting, s.deletions, s.mutations, s.expiry = nil, 0, 0, time.Time{}
	return waiting
}

// end answers them, and forgets what the collection deleted itself.
func (s *Scheduler) end(ctx context.Context, waiting []chan error, res Result, err error) {
	if err != nil && ctx.Err() == nil {
		s.collector.Log.Error("not everything could be collected", "error", err)
	}
	if res.Held && !s.held {
		s.collector.Log.Warn("nothing is collected: the database was recovered; `mctl fsck` tells of it, and `mctl fsck --fix` ends that")
	}
	s.held = res.Held
	s.metrics.add(res, err)
	own := 0
	for kind, n := range res.Removed {
		if kind != leases.Ingests && kind != leases.Mounts { // they have no records
			own += n
		}
	}
	if len(res.Removed) > 0 {
		s.collector.Log.Info("collected", "removed", res.Removed, "objects", res.Objects, "took", res.Took.Round(time.Microsecond), "locked", res.Locked.Round(time.Microsecond))
	}
	s.mu.Lock()
	s.deletions, s.mutations = max(0, s.deletions-own), max(0, s.mutations-own)
	s.expiry = sooner(s.expiry, res.Next)
	s.mu.Unlock()
	for _, w := range waiting {
		w <- err
	}
}

// refuse answers those who still wait when there will be no collection any more.
func (s *Scheduler) refuse() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	for _, w := range s.waiting {
		w <- errEnded
	}
	s.waiting = nil
}

var errEnded = fmt.Errorf("the daemon ends, its next start collects: %w", errdefs.ErrUnavailable)

// Collect has a collection begin now, and waits for its end.
func (s *Scheduler) Collect(ctx context.Context) error {
	done := make(chan error, 1)
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return errEnded
	}
	s.waiting = append(s.waiting, done)
	s.poke()
	s.mu.Unlock()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
