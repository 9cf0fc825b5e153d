package logsink

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// ReadOptions says what of a log is read.
type ReadOptions struct {
	Follow bool      // wait for more, until the streams have ended
	Tail   int       // only the last so many entries of what is there already; negative: all
	Since  time.Time // only entries that are not older
}

// Read calls fn with the entries of the log, oldest first, those in the rotated files too. It ends with the log, or what is there of it,
// with ctx, or with fn's error. A reader that is slower than the rotation misses entries.
func (l *Log) Read(ctx context.Context, o ReadOptions, fn func(Entry) error) error {
	parts, gen, err := l.parts()
	if err != nil {
		return fmt.Errorf("cannot read log %s: %w", l.cfg.Path, err)
	}
	defer func() {
		for _, p := range parts {
			_ = p.file.Close()
		}
	}()
	emit := func(e Entry) error {
		if !o.Since.IsZero() && e.Time.Before(o.Since) {
			return nil
		}
		return fn(e)
	}
	if o.Tail >= 0 {
		left := o.Tail
		for i := len(parts) - 1; i >= 0; i-- {
			if parts[i].at, left, err = tail(parts[i], left); err != nil {
				return fmt.Errorf("cannot read log %s: %w", l.cfg.Path, err)
			}
		}
	}
	for _, p := range parts {
		if err := l.entries(ctx, p, emit); err != nil {
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
	return l.follow(ctx, last, gen, emit)
}

// part is a stretch of a file that is to be read.
type part struct {
	file    *os.File
	at, end int64
}

// parts opens all files of the log, oldest first, up to what is recorded. gen is the number of the last one, -1 if there is none.
func (l *Log) parts() (parts []*part, gen int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := l.cfg.MaxFile - 1; i > 0; i-- {
		f, err := os.Open(l.rotated(i))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return parts, -1, err
		}
		p := &part{file: f}
		parts = append(parts, p)
		fi, err := f.Stat()
		if err != nil {
			return parts, -1, err
		}
		p.end = fi.Size()
	}
	if l.file == nil {
		return parts, -1, nil
	}
	f, err := l.againLocked()
	if err != nil {
		return parts, -1, err
	}
	return append(parts, &part{file: f, end: l.rec.length}), l.genLocked(), nil
}

func (l *Log) genLocked() int { return l.dropped + len(l.gens) - 1 }

// againLocked opens the file that is written a second time, whatever its name is by now.
func (l *Log) againLocked() (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", l.file.Fd()))
}

// follow reads on behind p, which was read to its end and is file number gen.
func (l *Log) follow(ctx context.Context, p *part, gen int, emit func(Entry) error) error {
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
		switch {
		case p != nil && gen == now && l.file != nil:
			p.end = max(l.rec.length, p.at)
		case p != nil && p.at < sizeOf(p.file):
			p.end = sizeOf(p.file) // nobody writes to it any more
		case gen < now:
			next, gen, err = l.nextLocked(gen)
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
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		case idle:
			return nil
		}
		if err := l.entries(ctx, p, emit); err != nil {
			return err
		}
	}
}

// nextLocked opens the oldest file that is newer than number gen.
func (l *Log) nextLocked(gen int) (*part, int, error) {
	for g := max(gen+1, l.dropped); g <= l.genLocked(); g++ {
		if g == l.genLocked() && l.file != nil {
			f, err := l.againLocked()
			return &part{file: f, end: l.rec.length}, g, err
		}
		for n := range l.cfg.MaxFile {
			if id, size, err := stat(l.rotated(n)); err == nil && id == l.gens[g-l.dropped] {
				f, err := os.Open(l.rotated(n))
				return &part{file: f, end: size}, g, err
			}
		}
	}
	return nil, gen, nil
}

func sizeOf(f *os.File) int64 {
	fi, err := f.Stat()
	if err != nil {
		return 0
	}
	return fi.Size()
}

// longest is how long a line of a log is at most: one that is longer is not ours, and is given in pieces.
const longest = 128 << 10

// entries calls emit with what is in a part, and moves it on.
func (l *Log) entries(ctx context.Context, p *part, emit func(Entry) error) error {
	r := bufio.NewReaderSize(io.NewSectionReader(p.file, p.at, p.end-p.at), int(min(longest, max(p.end-p.at, 16))))
	for {
		line, err := r.ReadSlice('\n')
		p.at += int64(len(line))
		if len(line) > 0 {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := emit(parse(l.cfg.Format, bytes.TrimSuffix(line, []byte("\n")))); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			p.at = p.end // a file that was cut has less
			return nil
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return fmt.Errorf("cannot read log %s: %w", l.cfg.Path, err)
		}
	}
}

// tail says where the last n entries of a part begin, and how many of the n are not in it.
func tail(p *part, n int) (at int64, left int, err error) {
	if n <= 0 {
		return p.end, 0, nil
	}
	buf := make([]byte, 64<<10)
	for at := p.end; at > p.at; {
		size := min(int64(len(buf)), at-p.at)
		if _, err := p.file.ReadAt(buf[:size], at-size); err != nil && !errors.Is(err, io.EOF) {
			return 0, 0, err
		}
		for i := size - 1; i >= 0; i-- {
			if buf[i] != '\n' || at-size+i == p.end-1 { // the last newline ends the last entry, and begins none
				continue
			}
			if n--; n == 0 {
				return at - size + i + 1, 0, nil
			}
		}
		at -= size
	}
	if p.end > p.at {
		n-- // the first entry of the file has no newline before it
	}
	return p.at, n, nil
}
