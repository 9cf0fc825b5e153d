package tasks

import "time"

const (
	// maxDeaths is how often the shim of a task may die within deathsWithin, without having told anything new, before it
	// has no further successor.
	maxDeaths    = 8
	deathsWithin = time.Minute
	// firstWait is how long to wait before the successor of a successor is started; of each further one, twice as long.
	firstWait = 50 * time.Millisecond
)

// deaths are those of the shims of one task, since one of them last told something new: a shim that works may be killed
// as often as anybody likes.
type deaths struct {
	at    []time.Time
	since uint64
}

// count enters a death; since is the last event that was told. It says how long to wait before a successor is started, and
// whether there is to be one at all.
func (d *deaths) count(now time.Time, since uint64) (wait time.Duration, more bool) {
	if since > d.since {
		d.at, d.since = nil, since
	}
	for len(d.at) > 0 && now.Sub(d.at[0]) >= deathsWithin {
		d.at = d.at[1:]
	}
	d.at = append(d.at, now)
	n := len(d.at)
	if n == 1 {
		return 0, true
	}
	return firstWait << min(n-2, maxDeaths), n < maxDeaths
}

// pause waits, and says whether the service has been closed meanwhile.
func (s *Service) pause(wait time.Duration) (closed bool) {
	select {
	case <-time.After(wait):
		return false
	case <-s.ctx.Done():
		return true
	}
}
