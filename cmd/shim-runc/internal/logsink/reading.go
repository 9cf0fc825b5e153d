package logsink

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/managerd/managerd/cmd/shim-runc/internal/fdtable"
)

// longest is how long a line of a log is at most: one that is longer is not ours, and is given in pieces.
const longest = 128 << 10

// Entries are handed on in batches of at most so many, and of about so many bytes.
const (
	batchEntries = 1000
	batchBytes   = 64 << 10
)

// reading is one reader's way through a log.
type reading struct {
	ctx    context.Context
	table  *fdtable.Table // where files are opened
	path   string
	format Format
	stream string // of raw: what the lines are of; empty: of both
	since  time.Time
	fn     Reader
}

// skip moves parts on to where the reader begins.
func (r *reading) skip(parts []*part, o ReadOptions) (err error) {
	if o.After != nil {
		for i, p := range parts {
			if at := p.position(); at.Dev == o.After.Dev && at.Ino == o.After.Ino {
				for _, before := range parts[:i] {
					before.at = before.end
				}
				p.at = min(max(o.After.Offset, p.at), p.end)
				return nil
			}
		}
		return nil
	}
	if o.Tail < 0 {
		return nil
	}
	left := o.Tail
	for i := len(parts) - 1; i >= 0; i-- {
		if parts[i].at, left, err = tail(parts[i], left); err != nil {
			return r.fail(err)
		}
	}
	return nil
}

func (r *reading) fail(err error) error { return fmt.Errorf("cannot read log %s: %w", r.path, err) }

// position is how far a part was read.
func (p *part) position() Position { return Position{p.id.dev, p.id.ino, p.at} }

// extend moves the end of a part on to that of its file, to which nobody writes any more.
func (p *part) extend() error {
	st, err := p.file.Stat()
	if err == nil {
		p.end = max(p.at, st.Size)
	}
	return err
}

// entries hands on what is in a part, and moves it on.
func (r *reading) entries(p *part) error {
	var list []Entry
	bytesOf := 0
	flush := func() error {
		if len(list) == 0 {
			return nil
		}
		if err := r.ctx.Err(); err != nil {
			return err
		}
		err := r.fn(list, p.position())
		list, bytesOf = nil, 0
		return err
	}
	in := bufio.NewReaderSize(io.NewSectionReader(p.file, p.at, p.end-p.at), int(min(longest, max(p.end-p.at, 16))))
	for {
		line, err := in.ReadSlice('\n')
		p.at += int64(len(line))
		if len(line) > 0 {
			e := r.parse(line)
			if r.since.IsZero() || !e.Time.Before(r.since) {
				list, bytesOf = append(list, e), bytesOf+len(e.Line)
			}
			if len(list) >= batchEntries || bytesOf >= batchBytes {
				if err := flush(); err != nil {
					return err
				}
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			ferr := flush()
			p.at = p.end // a file that was cut has less
			return ferr
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return errors.Join(flush(), r.fail(err))
		}
	}
}

func (r *reading) parse(line []byte) Entry {
	if r.format == Raw {
		return Entry{Stream: r.stream, Line: bytes.Clone(line), Partial: line[len(line)-1] != '\n'}
	}
	return parse(r.format, bytes.TrimSuffix(line, []byte("\n")))
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
