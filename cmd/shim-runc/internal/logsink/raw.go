package logsink

import "bytes"

// surplus is what a raw log was found to have beyond what its last writer had recorded.
type surplus struct {
	at, length int64
	asked      [2]bool // streams of which it is not
}

// append appends bytes of a stream to a raw log. What could be written is recorded, also when there is an error.
func (l *Log) append(s *Stream, b []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.tellLocked()
	if err := l.readyLocked(); err != nil {
		return err
	}
	n, err := l.claimLocked(s, b), error(nil)
	if n > 0 {
		l.rec.length += int64(n)
	} else {
		var was int64
		if n, was, err = l.file.WriteAfter(-1, b); err == nil || n > 0 {
			l.rec.length = was + int64(n)
		}
	}
	l.rec.streams[s.index].done += int64(n)
	if cerr := l.commitLocked(); err == nil {
		err = cerr
	}
	return err
}

// claimLocked says how much of b the log has already, because somebody was killed between writing it and recording that.
func (l *Log) claimLocked(s *Stream, b []byte) int {
	x := &l.surplus
	if x.length == 0 || x.asked[s.index] {
		return 0
	}
	x.asked[s.index] = true
	if x.length > int64(len(b)) {
		return 0
	}
	have := make([]byte, x.length)
	if _, err := l.file.ReadAt(have, x.at); err != nil || !bytes.HasPrefix(b, have) {
		return 0
	}
	x.length = 0
	l.rec.length -= int64(len(have)) // it is counted by whoever asks
	return len(have)
}
