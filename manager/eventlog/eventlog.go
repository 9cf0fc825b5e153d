// Package eventlog keeps the daemon's events on disk, bounded in size and age, so that a consumer can ask again for what it
// missed. An event of a shim is written in one record with its number in the shim's ledger: a daemon that was killed at any
// moment is followed by one that knows which events of the shim are in the log.
//
// The log is a directory of segments, each named by the smallest number its events may have (16 hex digits, .log). A
// segment is eight bytes of magic, then frames:
//
//	length   uint32, little endian: bytes of payload, 1 to maxRecord
//	checksum uint32, little endian: CRC-32C (Castagnoli) of payload
//	payload  a protobuf managerd.eventlog.Record; that of the first frame is a header
//
// A torn frame at the end of the last segment (the writer was killed) is cut off by Open; a segment that is damaged
// anywhere else, or of a newer schema, is renamed to .damaged, and its events are reported as lost.
//
// A record is in the file when Append returns: to kill the daemon loses nothing. It is synced to the disk within syncEvery
// and when a segment is full, not for every event: a power cut ends the containers too, and may take their last events
// along. So that no number is used twice even then, a daemon of a later boot goes on with a number made of the time.
package eventlog

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	records "github.com/managerd/managerd/protos/eventlog"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// Dir is the directory of the log below the daemon's root.
const Dir = "io.managerd.events.v1"

// schema is the version that this code writes. It reads one more, too, which a version wrote that was taken back; a segment of
// a still larger one is set aside.
const schema = 1

// Bounds of a log; the zero value of a field stands for what Default says.
type Bounds struct {
	Segment int64         // bytes, after which a new segment is begun
	Total   int64         // bytes of all segments; the oldest is dropped
	Age     time.Duration // a segment whose last event is older is dropped
}

// Default is what the daemon keeps.
var Default = Bounds{Segment: 2 << 20, Total: 16 << 20, Age: 7 * 24 * time.Hour}

// syncEvery is how long an event may be in the page cache only.
const syncEvery = time.Second

// Log is an open log, with one writer. Close releases it.
type Log struct {
	dir    string
	bounds Bounds
	log    *slog.Logger

	mu       sync.Mutex
	segments []*segment // oldest first; the last one is written to
	file     *os.File   // of the last one
	last     uint64     // number of the last event
	next     uint64     // of the one to come
	cursors  map[string]cursor
	changed  chan struct{} // closed by the next append
	broken   error         // a failed write could not be undone
	dirty    *time.Timer   // syncs the file; nil: nothing to sync
	closed   bool
}

// cursor is the last event of a source, and the segment that has it.
type cursor struct {
	seq  uint64
	path string
}

// segment is one file. Its fields are guarded by Log.mu.
type segment struct {
	path    string
	first   uint64
	follows uint64
	last    uint64    // 0: it has no event
	end     int64     // bytes that are whole
	newest  time.Time // when its last event was written
}

// Open opens or makes the log in dir. Segments that are damaged are set aside: what is whole is there.
func Open(dir string, b Bounds, log *slog.Logger) (*Log, error) {
	if b.Segment == 0 {
		b.Segment = Default.Segment
	}
	if b.Total == 0 {
		b.Total = Default.Total
	}
	if b.Age == 0 {
		b.Age = Default.Age
	}
	l := &Log{dir: dir, bounds: b, log: log, cursors: map[string]cursor{}, changed: make(chan struct{})}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make log of events: %w", err)
	}
	if err := l.load(); err != nil {
		return nil, fmt.Errorf("cannot open log of events %s: %w", dir, err)
	}
	return l, nil
}

// load reads every segment, and leaves one to write to.
func (l *Log) load() error {
	names, err := filepath.Glob(filepath.Join(l.dir, "*.log"))
	if err != nil {
		return err
	}
	lastBoot := ""
	for i, path := range names { // in order: the names have one length
		s, boot, err := l.scan(path, i == len(names)-1)
		if err == nil {
			l.segments, lastBoot = append(l.segments, s), boot
			l.last = max(l.last, s.last, s.follows)
			continue
		}
		aside := strings.TrimSuffix(path, ".log") + ".damaged"
		l.log.Error("a segment of the log of events is set aside", "segment", aside, "error", err)
		if err := os.Rename(path, aside); err != nil {
			return err
		}
		lastBoot = "" // it may have had numbers above all that are known
		var first uint64
		if _, err := fmt.Sscanf(filepath.Base(path), "%016x.log", &first); err == nil {
			l.last = max(l.last, first) // so that what follows says that something is missing
		}
	}
	if n := len(l.segments); n > 0 && lastBoot == bootID() {
		s := l.segments[n-1]
		if l.file, err = os.OpenFile(s.path, os.O_RDWR, 0); err != nil {
			return err
		}
		l.next = max(l.last+1, s.first)
		return l.file.Truncate(s.end)
	}
	return l.beginLocked(max(l.last+1, uint64(time.Now().Unix())<<16))
}

// scan reads a segment for the first time. Only the last one may have a torn tail.
func (l *Log) scan(path string, isLast bool) (*segment, string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = f.Close() }()
	s, boot := &segment{path: path}, ""
	end, torn, err := scan(f, func(r *records.Record) error {
		if h := r.Header; h != nil {
			if h.Schema > schema+1 {
				return fmt.Errorf("schema version is %d, this managerd knows %d", h.Schema, schema+1)
			}
			s.first, s.follows, boot = h.First, h.Follows, h.BootId
			return nil
		}
		if s.first == 0 || r.Seq < s.first || r.Seq <= s.last {
			return fmt.Errorf("event %d is out of order", r.Seq)
		}
		s.last, s.newest = r.Seq, time.Unix(0, r.UnixNano)
		if e := r.Event; e.Source != "" {
			l.cursors[e.Source] = cursor{max(l.cursors[e.Source].seq, e.SourceSeq), s.path}
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, "", err
	case s.first == 0:
		return nil, "", errors.New("it has no header")
	case torn && !isLast:
		return nil, "", fmt.Errorf("it ends within a record, at byte %d", end)
	}
	s.end = end
	return s, boot, nil
}

// beginLocked begins a segment whose events have the number first or larger.
func (l *Log) beginLocked(first uint64) error {
	s := &segment{path: filepath.Join(l.dir, fmt.Sprintf("%016x.log", first)), first: first, follows: l.last}
	head, err := frame(&records.Record{UnixNano: time.Now().UnixNano(), Header: &records.Header{
		Schema: schema, BootId: bootID(), First: first, Follows: l.last,
	}})
	if err != nil {
		return err
	}
	f, err := os.OpenFile(s.path+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.Write(append([]byte(magic), head...)); err == nil {
		failpoint.Hit("eventlog.segment.half")
		err = os.Rename(s.path+".new", s.path)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	failpoint.Hit("eventlog.segment.begun")
	if l.file != nil {
		if err := errors.Join(l.file.Sync(), l.file.Close()); err != nil {
			l.log.Error("cannot sync a segment of the log of events", "error", err)
		}
	}
	s.end = int64(len(magic) + len(head))
	l.file, l.next = f, first
	l.segments = append(l.segments, s)
	l.dropLocked()
	return nil
}

// dropLocked removes the oldest segments that are beyond the bounds.
func (l *Log) dropLocked() {
	var total int64
	for _, s := range l.segments {
		total += s.end
	}
	for len(l.segments) > 1 {
		s := l.segments[0]
		if total <= l.bounds.Total && (s.newest.IsZero() || time.Since(s.newest) <= l.bounds.Age) {
			return
		}
		if err := os.Remove(s.path); err != nil {
			l.log.Error("cannot drop a segment of the log of events", "error", err)
			return
		}
		failpoint.Hit("eventlog.segment.dropped")
		total -= s.end
		l.segments = l.segments[1:]
		for source, c := range l.cursors {
			if c.path == s.path {
				delete(l.cursors, source) // its last event is long ago; the bundle, if there is one, remembers it
			}
		}
	}
}

// Append writes an event, gives it its number, and returns false when it has been written before: the same source has
// given this number or a larger one. An event without a source is always new.
func (l *Log) Append(e *records.Event) (fresh bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return true, errors.New("the log of events is closed")
	}
	if l.broken != nil {
		return true, l.broken
	}
	if e.Source != "" && e.SourceSeq <= l.cursors[e.Source].seq {
		return false, nil
	}
	now := time.Now()
	if s := l.segments[len(l.segments)-1]; s.last != 0 && s.end >= l.bounds.Segment {
		if err := l.beginLocked(l.next); err != nil {
			return true, fmt.Errorf("cannot begin a segment of the log of events: %w", err)
		}
	}
	data, err := frame(&records.Record{Seq: l.next, UnixNano: now.UnixNano(), Event: e})
	if err != nil {
		return true, err
	}
	s := l.segments[len(l.segments)-1]
	if _, err := l.file.WriteAt(data, s.end); err != nil {
		if terr := l.file.Truncate(s.end); terr != nil {
			l.broken = fmt.Errorf("log of events is unusable after a failed write: %w", terr)
		}
		return true, fmt.Errorf("cannot write log of events: %w", err)
	}
	failpoint.Hit("eventlog.appended")
	l.last, l.next = l.next, l.next+1
	s.last, s.newest = l.last, now
	s.end += int64(len(data))
	if e.Source != "" {
		l.cursors[e.Source] = cursor{e.SourceSeq, s.path}
	}
	close(l.changed)
	l.changed = make(chan struct{})
	if l.dirty == nil {
		l.dirty = time.AfterFunc(syncEvery, l.sync)
	}
	return true, nil
}

func (l *Log) sync() {
	l.mu.Lock()
	l.dirty = nil
	f := l.file
	closed := l.closed
	l.mu.Unlock()
	if closed {
		return
	}
	if err := f.Sync(); err != nil && !errors.Is(err, os.ErrClosed) { // a segment that was ended meanwhile is synced
		l.log.Error("cannot sync the log of events", "error", err)
	}
}

// Cursor is the number of the last event of a source that is in the log; 0 for none.
func (l *Log) Cursor(source string) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cursors[source].seq
}

// Close syncs and closes the log; readers end with their contexts.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	if l.dirty != nil {
		l.dirty.Stop()
	}
	return errors.Join(l.file.Sync(), l.file.Close())
}

func bootID() string {
	data, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data))
}
