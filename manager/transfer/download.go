package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/registry"
)

const (
	// readSize is what is read at a time, and so what a daemon that is killed may have read in vain, for each request, in
	// bytes.
	readSize = 32 << 10
	// tries is how often a part is asked for anew without a byte of it coming; the registry's client has its own.
	tries = 3
	// pause is how long to wait before the second of them.
	pause = 200 * time.Millisecond
)

// download fetches the parts that are missing, by up to ranges requests at a time, the first parts first.
func download(ctx context.Context, remote Remote, desc ocispec.Descriptor, part content.Partial, ranges int) error {
	missing := part.Missing()
	if len(missing) == 0 {
		return nil
	}
	d := &downloading{remote: remote, desc: desc, part: part, missing: missing}
	err := d.parallel(ctx, min(ranges, len(missing)))
	if errors.Is(err, registry.ErrNoRanges) {
		err = d.whole(ctx)
	}
	if err != nil {
		return fmt.Errorf("cannot fetch %s: %w", desc.Digest, err)
	}
	return nil
}

type downloading struct {
	remote Remote
	desc   ocispec.Descriptor
	part   content.Partial

	mu      sync.Mutex
	missing []content.Part
}

func (d *downloading) next() (p content.Part, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.missing) == 0 {
		return p, false
	}
	p, d.missing = d.missing[0], d.missing[1:]
	return p, true
}

func (d *downloading) parallel(ctx context.Context, n int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var workers sync.WaitGroup
	for range n {
		workers.Go(func() {
			for {
				p, ok := d.next()
				if !ok || ctx.Err() != nil {
					return
				}
				if err := d.fetch(ctx, p); err != nil {
					cancel(err) // the first one counts
					return
				}
			}
		})
	}
	workers.Wait()
	return context.Cause(ctx)
}

// fetch fetches one part, in as many attempts as bring something.
func (d *downloading) fetch(ctx context.Context, p content.Part) error {
	for failed := 0; ; {
		n, err := d.once(ctx, p)
		if p.Next += n; p.Next == p.End {
			return nil
		}
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		if n > 0 {
			failed = 0
		}
		if failed++; failed >= tries || ctx.Err() != nil || final(err) {
			return err
		}
		select {
		case <-time.After(pause << failed):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// storeError is one of our own disk.
type storeError struct{ error }

func (e storeError) Unwrap() error { return e.error }

// final tells whether another attempt would end the same way.
func final(err error) bool {
	var store storeError
	return errors.As(err, &store) || errors.Is(err, registry.ErrNoRanges) || errdefs.IsNotFound(err) || errdefs.IsUnauthorized(err) ||
		errdefs.IsPermissionDenied(err) || errdefs.IsInvalidArgument(err) || errdefs.IsNotImplemented(err) || errdefs.IsFailedPrecondition(err)
}

// once asks for the rest of a part, and gives how many bytes came.
func (d *downloading) once(ctx context.Context, p content.Part) (n int64, err error) {
	var body io.ReadCloser
	if p.Next == 0 && p.End == d.desc.Size {
		body, err = d.remote.Fetch(ctx, d.desc, 0)
	} else {
		body, err = d.remote.FetchRange(ctx, d.desc, p.Next, p.End-p.Next)
	}
	if err != nil {
		return 0, err
	}
	defer func() { _ = body.Close() }()
	return d.copy(body, p.Next, p.End)
}

// copy writes what comes from body as bytes from to end, and gives how many.
func (d *downloading) copy(body io.Reader, from, end int64) (int64, error) {
	buf := make([]byte, min(readSize, end-from))
	at := from
	for at < end {
		n, err := body.Read(buf[:min(int64(len(buf)), end-at)])
		if n > 0 {
			w, werr := d.part.WriteAt(buf[:n], at)
			at += int64(w)
			if werr != nil {
				return at - from, storeError{werr}
			}
		}
		if err != nil && at < end {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return at - from, err
		}
	}
	return at - from, nil
}

// whole reads the blob from its beginning, at a registry that can do nothing else, and keeps what is missing.
func (d *downloading) whole(ctx context.Context) error {
	body, err := d.remote.Fetch(ctx, d.desc, 0)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }()
	var at int64
	for _, p := range d.part.Missing() {
		if _, err := io.CopyN(io.Discard, body, p.Next-at); err != nil {
			return err
		}
		if _, err := d.copy(body, p.Next, p.End); err != nil {
			return err
		}
		at = p.End
	}
	return nil
}
