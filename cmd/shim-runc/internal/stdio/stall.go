package stdio

import (
	"sync"
	"time"
)

// stall is why a stream does not go on, for whoever asks about it.
type stall struct {
	mu      sync.Mutex
	why     string // what is in the way; empty: nothing
	since   time.Time
	calling time.Time // when a call into the sink began that has not returned; zero: there is none
}

// hanging is how long a call into a sink may take before it is called one that does not return.
const hanging = time.Second

// during runs a call that may not return for a long time.
func (s *stall) during(call func()) {
	s.mu.Lock()
	s.calling = time.Now()
	s.mu.Unlock()
	call()
	s.mu.Lock()
	s.calling = time.Time{}
	s.mu.Unlock()
}

// waits notes what is in the way.
func (s *stall) waits(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.why != why {
		s.why, s.since = why, time.Now()
	}
}

// goes notes that nothing is.
func (s *stall) goes() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.why = ""
}

// get is what is in the way, and since when; empty when nothing is.
func (s *stall) get() (why string, since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.calling.IsZero() && time.Since(s.calling) > hanging {
		return "a call into it does not return", s.calling
	}
	return s.why, s.since
}
