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
	"github.com/managerd/managerd/manager/namespaces"
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
	err := r.b.again(r.ctx, func() error { return r.read(off, size) })
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

func (r *reader) read(off, size int64) error {
	r.buf = r.buf[:0]
	s, err := r.b.peer.Session(r.ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	var stream api.Content_ReadClient
	err = s.Step(r.ctx, r.b.cfg.Step, func() (err error) {
		stream, err = r.b.client.Read(namespaces.With(s.Context(), space), &api.ReadContentRequest{Digest: r.d.String(), Offset: off, Size: size})
		return err
	})
	for err == nil {
		var m *api.ReadContentResponse
		err = s.Step(r.ctx, r.b.cfg.Step, func() (err error) {
			if m, err = stream.Recv(); errors.Is(err, io.EOF) {
				m, err = nil, nil
			}
			return err
		})
		if err != nil || m == nil {
			break
		}
		at := off + int64(len(r.buf))
		if m.Offset != at {
			return fmt.Errorf("content %s: bytes at %d were answered, those at %d asked for: %w", r.d, m.Offset, at, errdefs.ErrDataLoss)
		}
		r.buf = append(r.buf, m.Data[:min(int64(len(m.Data)), size-int64(len(r.buf)))]...)
	}
	return err
}
