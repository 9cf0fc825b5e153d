package registry

import (
	"maps"
	"sync"
	"time"
)

// breaker remembers which endpoints failed, so that a pull does not wait for a dead mirror again.
type breaker struct {
	first time.Duration
	mu    sync.Mutex
	open  map[string]*fault // by URL, guarded by mu
}

type fault struct {
	times int
	until time.Time
	err   error
}

// mostFaults is how many endpoints are remembered before those that may be asked again are forgotten.
const mostFaults = 1000

// mostDoublings bounds how long an endpoint is left alone.
const mostDoublings = 4

// failed notes a failure of the way to an endpoint or of its health. Several at once count as one.
func (b *breaker) failed(endpoint string, err error, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open == nil {
		b.open = map[string]*fault{}
	}
	f := b.open[endpoint]
	if f == nil {
		if len(b.open) >= mostFaults {
			maps.DeleteFunc(b.open, func(_ string, old *fault) bool { return !now.Before(old.until) })
		}
		f = &fault{}
		b.open[endpoint] = f
	}
	f.err = err
	if now.Before(f.until) {
		return
	}
	f.until = now.Add(b.first << min(f.times, mostDoublings))
	f.times++
}

// served notes that an endpoint answers.
func (b *breaker) served(endpoint string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.open, endpoint)
}

// skip says for how long an endpoint is to be left alone, 0 for not, and why.
func (b *breaker) skip(endpoint string, now time.Time) (time.Duration, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.open[endpoint]
	if f == nil || !now.Before(f.until) {
		return 0, nil
	}
	return f.until.Sub(now), f.err
}
