package eventlog

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	records "github.com/managerd/managerd/protos/eventlog"
)

// Item is an event with its number; without an event it says that those after LostAfter, up to Seq, are lost.
type Item struct {
	Seq       uint64
	LostAfter uint64
	Event     *records.Event
}

// Reader reads a log in order while it grows. It is used by one goroutine; Close releases its file.
type Reader struct {
	log  *Log
	told uint64 // the last number that was given, or given up
	any  bool   // the reader asked for a number: what is lost after it counts
	seg  *segment
	file *os.File
	at   int64
}

// Read gives a reader of the events with a number above since; 0: of all there are.
func (l *Log) Read(since uint64) *Reader {
	return &Reader{log: l, told: since, any: since != 0}
}

// Next gives the next event. Without one it waits until ctx ends, or returns io.EOF when wait is false.
func (r *Reader) Next(ctx context.Context, wait bool) (*Item, error) {
	for {
		r.log.mu.Lock()
		changed, closed := r.log.changed, r.log.closed
		item, more, err := r.advanceLocked()
		var end int64
		if r.seg != nil {
			end = r.seg.end
		}
		r.log.mu.Unlock()
		if item != nil || err != nil {
			return item, err
		}
		if more {
			item, err := r.read(end)
			if item != nil || err != nil {
				return item, err
			}
			continue
		}
		if !wait {
			return nil, io.EOF
		}
		if closed {
			return nil, os.ErrClosed
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// advanceLocked goes to the segment that has the next event; more says that there is something to read in it. An item
// tells of events that no segment has.
func (r *Reader) advanceLocked() (item *Item, more bool, err error) {
	if r.seg != nil && r.at < r.seg.end {
		return nil, true, nil
	}
	for _, s := range r.log.segments {
		if r.seg != nil && s.first <= r.seg.first || s.last != 0 && s.last <= r.told && s != r.log.segments[len(r.log.segments)-1] {
			continue
		}
		gap := r.any && s.follows > r.told // a number given out, of an event in no segment
		if s.follows == 0 && r.any && r.told+1 < s.first && r.told != 0 {
			gap = true // the log was made anew
		}
		f, err := os.Open(s.path)
		if err != nil {
			return nil, false, fmt.Errorf("cannot read log of events: %w", err)
		}
		r.Close()
		r.seg, r.file, r.at = s, f, int64(len(magic))
		if gap {
			item = &Item{LostAfter: r.told, Seq: s.first - 1}
			r.told = item.Seq
			return item, true, nil
		}
		return nil, r.at < s.end, nil
	}
	return nil, false, nil
}

// read reads what stands below end, up to the first event above told; nil: there is none.
func (r *Reader) read(end int64) (*Item, error) {
	section := bufio.NewReader(io.NewSectionReader(r.file, r.at, end-r.at))
	for r.at < end {
		record, n, err := next(section)
		if err != nil {
			return nil, fmt.Errorf("cannot read log of events %s at byte %d: %w", r.seg.path, r.at, err)
		}
		r.at += n
		if record.Event == nil || record.Seq <= r.told {
			continue
		}
		r.told, r.any = record.Seq, true
		return &Item{Seq: record.Seq, Event: record.Event}, nil
	}
	return nil, nil
}

// Close releases the file.
func (r *Reader) Close() {
	if r.file != nil {
		if err := r.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			r.log.log.Warn("cannot close a segment of the log of events", "error", err)
		}
		r.file = nil
	}
}
