package logsink

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/containerd/errdefs"
)

// raw is what a file is that output is appended to as it is: lines without times.
const raw Format = "file"

// looking is how often a file that others write is looked at.
const looking = 100 * time.Millisecond

// ReadFile is Log.Read for a file to which output is appended as it is, at path: stream is what its entries are of, and writer
// says which file is written (zero: that is not known), or that nothing more comes. When it is another one, that is gone on
// with. InvalidArgument for Since: lines have no times.
func ReadFile(ctx context.Context, path, stream string, o ReadOptions, writer func() (file Position, over bool), fn Reader) error {
	if !o.Since.IsZero() {
		return fmt.Errorf("cannot read log %s from a time on: its lines have no times: %w", path, errdefs.ErrInvalidArgument)
	}
	r := &reading{ctx: ctx, path: path, format: raw, stream: stream, fn: fn}
	var p *part
	defer func() {
		if p != nil {
			_ = p.file.Close()
		}
	}()
	begun := false
	for tick := time.NewTicker(looking); ; {
		written, ended := writer() // first: what was written before is read
		over := !o.Follow || ended
		next, err := replaced(path, p, written)
		if err == nil && p == nil && next != nil {
			p, next = next, nil
		}
		if err == nil && p != nil {
			if p.end = sizeOf(p.file); p.end < p.at {
				p.at = 0 // it was cut
			}
			if p.whole = over || next != nil; !begun {
				err = r.skip([]*part{p}, o)
			}
			begun = true
		}
		if err == nil && p != nil {
			err = r.entries(p)
		}
		if err == nil && next != nil {
			_ = p.file.Close()
			p = next
			continue
		}
		if err != nil || over {
			tick.Stop()
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			tick.Stop()
			return ctx.Err()
		}
	}
}

// replaced opens the file at path if p is not the one that is written; nil when it is, or there is none.
func replaced(path string, p *part, written Position) (*part, error) {
	if p != nil {
		at := p.position()
		if written == (Position{}) || at.Dev == written.Dev && at.Ino == written.Ino {
			return nil, nil
		}
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read log %s: %w", path, err)
	}
	next := &part{file: f}
	if at := next.position(); p != nil && (at.Dev != written.Dev || at.Ino != written.Ino) { // moved away in its turn
		_ = f.Close()
		return nil, nil
	}
	return next, nil
}
