package content

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// sequence is a Partial of one part, for a Backend that takes bytes in their order only.
type sequence struct {
	w        *Writer
	total    int64
	expected digest.Digest

	mu      sync.Mutex
	written int64
}

func (s *Store) sequence(ctx context.Context, ref string, expected digest.Digest, total int64) (Partial, error) {
	w, err := s.Writer(ctx, ref, expected, total)
	if err != nil {
		return nil, err
	}
	p := &sequence{w: w, total: total, expected: expected, written: w.Status().Offset}
	if p.written > total { // it is of something else
		if err := w.Truncate(0); err != nil {
			_ = w.Close()
			return nil, err
		}
		p.written = 0
	}
	return p, nil
}

// Total implements Partial.
func (p *sequence) Total() int64 { return p.total }

// Written implements Partial.
func (p *sequence) Written() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.written
}

// Missing implements Partial.
func (p *sequence) Missing() []Part {
	if at := p.Written(); at < p.total {
		return []Part{{Next: at, End: p.total}}
	}
	return nil
}

// WriteAt implements Partial.
func (p *sequence) WriteAt(b []byte, off int64) (int, error) {
	if at := p.Written(); off != at || int64(len(b)) > p.total-at {
		return 0, fmt.Errorf("ingest %q: %d bytes at %d are not what comes next in a part: %w", p.w.ref, len(b), off, errdefs.ErrOutOfRange)
	}
	n, err := p.w.Write(b)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.written += int64(n)
	return n, err
}

// Commit implements Partial.
func (p *sequence) Commit(ctx context.Context, labels map[string]string) error {
	if at := p.Written(); at < p.total {
		return fmt.Errorf("cannot commit %q: bytes %d to %d are missing: %w", p.w.ref, at, p.total, errdefs.ErrFailedPrecondition)
	}
	return p.w.Commit(ctx, p.total, p.expected, labels)
}

// Open implements Partial.
func (p *sequence) Open(context.Context) (io.ReadCloser, error) {
	return nil, fmt.Errorf("ingest %q cannot be read before it is a blob: %w", p.w.ref, errdefs.ErrNotImplemented)
}

// Close implements Partial.
func (p *sequence) Close() error { return p.w.Close() }
