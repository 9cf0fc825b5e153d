package logsink

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// awake are the logs that may have a file open, or are opening or closing one: those that were given up, too.
var awake = struct {
	mu   sync.Mutex
	logs map[*Log]struct{}
}{logs: map[*Log]struct{}{}}

func (l *Log) wakes() {
	if l.cfg.Lazy {
		return
	}
	awake.mu.Lock()
	defer awake.mu.Unlock()
	awake.logs[l] = struct{}{}
}

func (l *Log) rests() {
	awake.mu.Lock()
	defer awake.mu.Unlock()
	delete(awake.logs, l)
}

// AllRest waits until every log of the process rests or is closed, those too that somebody has closed or given up opening while
// their file system did not answer. Unavailable when ctx ends before.
func AllRest(ctx context.Context) error {
	for {
		path := ""
		awake.mu.Lock()
		for l := range awake.logs {
			path = l.cfg.Path
		}
		awake.mu.Unlock()
		if path == "" {
			return nil
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return unanswered(path)
		}
	}
}

func unanswered(path string) error {
	return fmt.Errorf("the file system of log %s does not answer: %w", path, errdefs.ErrUnavailable)
}

// Rest closes the log's files, those of its readers too, and keeps them closed until Wake: a process that is replaced or ends waits
// for the file system of what is open. Readers go on then. It returns when they are closed. When ctx ends before, the log goes on by
// itself as soon as they are; Unavailable.
func (l *Log) Rest(ctx context.Context) error {
	if l.cfg.Lazy {
		return nil
	}
	rested := make(chan struct{})
	var late atomic.Bool
	go func() {
		l.mu.Lock()
		l.restLocked()
		if !late.CompareAndSwap(false, true) {
			l.mu.Unlock()
		}
		close(rested)
	}()
	select {
	case <-rested:
	case <-ctx.Done():
		if late.CompareAndSwap(false, true) {
			return unanswered(l.cfg.Path)
		}
		<-rested
	}
	l.rests()
	return nil
}

// restLocked makes the log one that goes on as that of another process does.
func (l *Log) restLocked() {
	if l.file != nil {
		_ = l.file.Close()
		l.file, l.resumed = nil, true
	}
	for table := range l.readers {
		table.Clear()
	}
	l.table.Close()
	l.table = nil
}

// Wake ends a Rest that succeeded.
func (l *Log) Wake() {
	if l.cfg.Lazy {
		return
	}
	if !l.closed {
		l.wakes()
	}
	l.mu.Unlock()
}
