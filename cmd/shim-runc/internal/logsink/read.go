package logsink

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/fdtable"
)

// ReadOptions says what of a log is read.
type ReadOptions struct {
	Follow bool      // wait for more, until the streams have ended
	Tail   int       // only the last so many entries of what is there already; negative: all
	Since  time.Time // only entries that are not older
	After  *Position // only what is behind it, whatever Tail says; of a file that is not there any more: all
}

// Position is a place in a log: a file, whatever its name, and how many bytes of it.
type Position struct {
	Dev, Ino uint64
	Offset   int64
}

// Reader is called with entries in the order of the log, at least one, and with where they end.
type Reader func(entries []Entry, end Position) error

// Read calls fn with the entries of the log, oldest first, those in the rotated files too. It ends with the log, or what is there of it,
// with ctx, or with fn's error. A reader that is slower than the rotation misses entries.
func (l *Log) Read(ctx context.Context, o ReadOptions, fn Reader) error {
	for {
		err := l.read(ctx, o, func(entries []Entry, end Position) error {
			o.After = &end
			return fn(entries, end)
		})
		if !errors.Is(err, fdtable.ErrCleared) || ctx.Err() != nil {
			return err
		}
		// The log rests, or has rested: from there on, when it is awake.
	}
}

// read is Read until the log is laid to rest.
func (l *Log) read(ctx context.Context, o ReadOptions, fn Reader) error {
	table, err := l.beginReading()
	if err != nil {
		return fmt.Errorf("cannot read log %s: %w", l.cfg.Path, err)
	}
	defer l.endReading(table)
	parts, gen, err := l.parts(table)
	defer func() {
		for _, p := range parts {
			_ = p.file.Close()
		}
	}()
	if err != nil {
		return fmt.Errorf("cannot read log %s: %w", l.cfg.Path, err)
	}
	r := &reading{ctx: ctx, table: table, path: l.cfg.Path, format: l.cfg.Format, since: o.Since, fn: fn}
	if l.cfg.Format == Raw {
		if !o.Since.IsZero() {
			return fmt.Errorf("cannot read log %s from a time on: its lines have no times: %w", l.cfg.Path, errdefs.ErrInvalidArgument)
		}
		r.stream = l.only()
	}
	if err := r.skip(parts, o); err != nil {
		return err
	}
	for _, p := range parts {
		if err := r.entries(p); err != nil {
			return err
		}
	}
	if !o.Follow {
		return nil
	}
	var last *part
	if gen >= 0 {
		last = parts[len(parts)-1]
	}
	return l.follow(r, last, gen)
}

// beginReading gives the table in which a reader opens files, for endReading.
func (l *Log) beginReading() (*fdtable.Table, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	table, err := l.tableLocked()
	if err == nil && table != nil {
		if l.readers == nil {
			l.readers = map[*fdtable.Table]int{}
		}
		l.readers[table]++
	}
	return table, err
}

func (l *Log) endReading(table *fdtable.Table) {
	if table == nil {
		return
	}
	l.mu.Lock()
	if l.readers[table]--; l.readers[table] <= 0 {
		delete(l.readers, table)
	}
	l.mu.Unlock()
	table.Close()
}

// part is a stretch of a file that is to be read.
type part struct {
	file    *fdtable.File
	at, end int64
	id      identity
}

// parts opens all files of the log, oldest first, up to what is recorded. gen is the number of the last one, -1 if there is none.
func (l *Log) parts(table *fdtable.Table) (parts []*part, gen int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := l.cfg.MaxFile - 1; i > 0; i-- {
		f, err := table.Open(l.rotated(i), unix.O_RDONLY, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return parts, -1, err
		}
		p := &part{file: f}
		parts = append(parts, p)
		st, err := f.Stat()
		if err != nil {
			return parts, -1, err
		}
		p.end, p.id = st.Size, identity{uint64(st.Dev), st.Ino}
	}
	if l.file == nil {
		return l.untouchedLocked(table, parts)
	}
	f, err := l.file.Again()
	if err != nil {
		return parts, -1, err
	}
	return append(parts, &part{file: f, end: l.rec.length, id: l.rec.file}), l.genLocked(), nil
}

// untouchedLocked is parts for a log that another process has left, and that nothing was written to since.
func (l *Log) untouchedLocked(table *fdtable.Table, parts []*part) ([]*part, int, error) {
	if !l.resumed || len(l.gens) == 0 {
		return parts, -1, nil
	}
	f, err := table.Open(l.cfg.Path, unix.O_RDONLY, 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return parts, -1, err
	}
	if err == nil {
		if id, _, err := stat(l.cfg.Path); err == nil && id == l.rec.file {
			return append(parts, &part{file: f, end: l.rec.length, id: id}), l.genLocked(), nil
		}
		_ = f.Close()
	}
	if len(parts) == 0 { // somebody took it away
		return parts, -1, nil
	}
	return parts, l.genLocked(), nil
}

func (l *Log) genLocked() int { return l.dropped + len(l.gens) - 1 }

// follow reads on behind p, which was read to its end and is file number gen.
func (l *Log) follow(r *reading, p *part, gen int) error {
	mine := false // p is ours to close
	defer func() {
		if mine {
			_ = p.file.Close()
		}
	}()
	for {
		l.mu.Lock()
		now, over := l.genLocked(), l.closed || l.live == 0
		var next *part
		var err error
		if p != nil && gen == now && (l.file != nil || l.resumed) {
			p.end = max(l.rec.length, p.at)
		} else {
			if p != nil {
				err = p.extend()
			}
			if err == nil && (p == nil || p.at == p.end) && gen < now {
				next, gen, err = l.nextLocked(r.table, gen)
			}
		}
		var more chan struct{}
		idle := next == nil && (p == nil || p.at == p.end)
		if idle && err == nil && !over {
			if l.changed == nil {
				l.changed = make(chan struct{})
			}
			more = l.changed
		}
		l.mu.Unlock()
		switch {
		case err != nil:
			return fmt.Errorf("cannot read log %s: %w", l.cfg.Path, err)
		case next != nil:
			if mine {
				_ = p.file.Close()
			}
			p, mine = next, true
		case more != nil:
			select {
			case <-more:
			case <-r.ctx.Done():
				return r.ctx.Err()
			}
			continue
		case idle:
			return nil
		}
		if err := r.entries(p); err != nil {
			return err
		}
	}
}

// nextLocked opens the oldest file that is newer than number gen.
func (l *Log) nextLocked(table *fdtable.Table, gen int) (*part, int, error) {
	for g := max(gen+1, l.dropped); g <= l.genLocked(); g++ {
		if g == l.genLocked() && l.file != nil {
			f, err := l.file.Again()
			return &part{file: f, end: l.rec.length, id: l.rec.file}, g, err
		}
		for n := range l.cfg.MaxFile {
			if id, size, err := stat(l.rotated(n)); err == nil && id == l.gens[g-l.dropped] {
				f, err := table.Open(l.rotated(n), unix.O_RDONLY, 0)
				return &part{file: f, end: size, id: id}, g, err
			}
		}
	}
	return nil, gen, nil
}
