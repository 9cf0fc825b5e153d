package registry

import (
	"context"
	"io"
	"sync/atomic"
	"time"
)

// watch ends a request on which nothing moves for a time. It runs only while somebody waits for the other side.
type watch struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	limit  atomic.Int64 // a time.Duration
	timer  *time.Timer
}

type watchKey struct{}

// newWatch starts one; the request is to be made with its context.
func newWatch(parent context.Context, limit time.Duration) *watch {
	w := &watch{}
	w.limit.Store(int64(limit))
	ctx, cancel := context.WithCancelCause(parent)
	w.cancel = cancel
	w.ctx = context.WithValue(ctx, watchKey{}, w)
	w.timer = time.AfterFunc(limit, func() { cancel(&StallError{For: time.Duration(w.limit.Load())}) })
	return w
}

// watchOf is the watch of a request's context, or nil.
func watchOf(ctx context.Context) *watch {
	w, _ := ctx.Value(watchKey{}).(*watch)
	return w
}

// kick says that something moved, or that the waiting begins.
func (w *watch) kick() { w.timer.Reset(time.Duration(w.limit.Load())) }

// stop says that nobody waits for the other side.
func (w *watch) stop() { w.timer.Stop() }

// end gives the request up.
func (w *watch) end() {
	w.timer.Stop()
	w.cancel(context.Canceled)
}

// watchedBody is the body of an answer, and the end of its request when it is closed.
type watchedBody struct {
	io.ReadCloser
	w *watch
}

func (b *watchedBody) Read(p []byte) (int, error) {
	b.w.kick()
	n, err := b.ReadCloser.Read(p)
	b.w.stop()
	if err != nil && err != io.EOF {
		if cause := context.Cause(b.w.ctx); cause != nil {
			err = cause
		}
	}
	return n, err
}

func (b *watchedBody) Close() error {
	b.w.end()
	return b.ReadCloser.Close()
}

// watchedUpload is the body of a request.
type watchedUpload struct {
	io.ReadCloser
	w *watch
}

func (b *watchedUpload) Read(p []byte) (int, error) {
	b.w.kick()
	return b.ReadCloser.Read(p)
}
