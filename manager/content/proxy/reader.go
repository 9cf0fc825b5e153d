package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/manager/content"
)

// ahead is how many bytes are asked for at the least, for those who read a little at a time.
const ahead = 1 << 20

// reader reads a blob by calls that each have an end, so that it goes on when the program was started again.
type reader struct {
	b    *Backend
	ctx  context.Context
	d    digest.Digest
	size int64

	mu  sync.Mutex
	at  int64  // where buf begins
	buf []byte // what was read last
}

// Open implements content.Backend. Nothing is asked for yet; ctx is for what will be.
func (b *Backend) Open(ctx context.Context, d digest.Digest, size int64) (content.Reader, error) {
	return &reader{b: b, ctx: ctx, d: d, size: size}, nil
}

// Size implements content.Reader.
func (r *reader) Size() int64 { return r.size }

// Close implements content.Reader.
func (r *reader) Close() error { return nil }

// ReadAt implements content.Reader.
func (r *reader) ReadAt(p []byte, off int64) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if off < 0 {
		return 0, fmt.Errorf("content %s cannot be read at %d: %w", r.d, off, errdefs.ErrOutOfRange)
	}
	n := 0
	for n < len(p) && off+int64(n) < r.size {
		at := off + int64(n)
		if at < r.at || at >= r.at+int64(len(r.buf)) {
			if err := r.fill(at, min(max(int64(len(p)-n), ahead), r.size-at)); err != nil {
				return n, err
			}
		}
		n += copy(p[n:], r.buf[at-r.at:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// fill reads size bytes at off, which the blob has.
func (r *reader) fill(off, size int64) error {
	if int64(cap(r.buf)) < size {
		r.buf = make([]byte, 0, size)
	}
	r.at = off
	err := r.b.again(r.ctx, func() error {
		return r.b.call(r.ctx, r.b.cfg.Slow, func(ctx context.Context) error { return r.read(ctx, off, size) })
	})
	if err != nil {
		r.buf = r.buf[:0]
		return err
	}
	if int64(len(r.buf)) < size {
		err := fmt.Errorf("content %s ends at byte %d of %d in %s: %w", r.d, off+int64(len(r.buf)), r.size, r.b.cfg.Name, errdefs.ErrDataLoss)
		r.buf = r.buf[:0]
		return err
	}
	return nil
}

func (r *reader) read(ctx context.Context, off, size int64) error {
	r.buf = r.buf[:0]
	stream, err := r.b.client.Read(ctx, &api.ReadContentRequest{Digest: r.d.String(), Offset: off, Size: size})
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if m.Offset != off+int64(len(r.buf)) {
			return fmt.Errorf("content %s: bytes at %d were answered, those at %d asked for: %w", r.d, m.Offset, off+int64(len(r.buf)), errdefs.ErrDataLoss)
		}
		r.buf = append(r.buf, m.Data[:min(int64(len(m.Data)), size-int64(len(r.buf)))]...)
	}
}
