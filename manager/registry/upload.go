package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// uploading is one blob on its way to a registry (distribution spec, "Pushing blobs").
type uploading struct {
	p       *Repository
	h       *host
	desc    ocispec.Descriptor
	content io.ReaderAt
	at      *url.URL // of the session, nil before there is one
	off     int64    // bytes that the registry has
	least   int64    // the smallest chunk that it takes
	whole   bool     // it takes no chunks
}

// upload sends a blob that the registry has not.
func (p *Repository) upload(ctx context.Context, h *host, desc ocispec.Descriptor, content io.ReaderAt) error {
	u := &uploading{p: p, h: h, desc: desc, content: content}
	for tries := 1; ; {
		before := u.off
		err := u.step(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			if u.at != nil {
				stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
				h.cancel(stop, u.at)
				cancel()
			}
			return context.Cause(ctx)
		}
		if u.off > before {
			tries = 1
		}
		if u.refusesChunks(err) {
			u.whole, u.at, u.off = true, nil, 0
			continue
		}
		if !unreachable(err) && !lost(err) || tries >= h.r.cfg.Attempts {
			return err
		}
		select {
		case <-time.After(firstBackoff << (tries - 1)):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		tries++
		h.r.log.Debug("an upload broke off", "ref", p.ref.String(), "digest", desc.Digest, "at", u.off, "error", err)
		if found, _ := p.exists(ctx, h, desc); found { // it came through, the answer did not
			u.tell(desc.Size)
			return nil
		}
		u.ask(ctx)
	}
}

// lost says whether a registry has forgotten an upload.
func lost(err error) bool {
	var e *StatusError
	return errors.As(err, &e) && (e.Status == http.StatusNotFound || e.Status == http.StatusRequestedRangeNotSatisfiable)
}

// refusesChunks says whether an error is of a registry that wants blobs whole.
func (u *uploading) refusesChunks(err error) bool {
	var e *StatusError
	if u.whole || u.desc.Size <= u.chunk() || !errors.As(err, &e) || e.Method != http.MethodPatch {
		return false
	}
	switch e.Status {
	case http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusLengthRequired, http.StatusRequestEntityTooLarge, http.StatusNotImplemented:
		return true
	}
	return false
}

func (u *uploading) chunk() int64 { return max(u.h.r.cfg.ChunkSize, u.least) }

// step begins an upload where there is none, and sends what is left.
func (u *uploading) step(ctx context.Context) error {
	if u.at == nil {
		if err := u.begin(ctx); err != nil {
			return err
		}
	}
	if u.off == 0 && (u.whole || u.desc.Size <= u.chunk()) {
		return u.finish(ctx, u.desc.Size)
	}
	for u.off < u.desc.Size {
		if err := u.patch(ctx, min(u.chunk(), u.desc.Size-u.off)); err != nil {
			return err
		}
	}
	return u.finish(ctx, 0)
}

func (u *uploading) begin(ctx context.Context) error {
	at := u.h.url("blobs", "uploads")
	at.Path += "/"
	req, err := u.h.request(ctx, http.MethodPost, at)
	if err != nil {
		return err
	}
	resp, err := u.h.Do(req)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusAccepted {
		return u.h.refused(resp)
	}
	_ = resp.Body.Close()
	if n, err := strconv.ParseInt(resp.Header.Get("OCI-Chunk-Min-Length"), 10, 64); err == nil {
		u.least = n
	}
	u.off = 0
	u.at, err = location(resp)
	return err
}

// body gives a request n bytes of the blob, from where the registry is.
func (u *uploading) body(req *http.Request, n int64) {
	off := u.off
	req.ContentLength = n
	req.Header.Set("Content-Type", "application/octet-stream")
	if n == 0 {
		return
	}
	req.GetBody = func() (io.ReadCloser, error) {
		return io.NopCloser(&counted{r: io.NewSectionReader(u.content, off, n), sent: off, tell: u.tell}), nil
	}
	req.Body, _ = req.GetBody()
}

func (u *uploading) tell(sent int64) {
	if u.p.opts.Progress != nil {
		u.p.opts.Progress(u.desc, sent)
	}
}

// counted tells what was read of it.
type counted struct {
	r    io.Reader
	sent int64
	tell func(int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if n > 0 {
		c.sent += int64(n)
		c.tell(c.sent)
	}
	return n, err
}

// patch sends one chunk.
func (u *uploading) patch(ctx context.Context, n int64) error {
	req, err := u.h.request(ctx, http.MethodPatch, u.at)
	if err != nil {
		return err
	}
	u.body(req, n)
	req.Header.Set("Content-Range", fmt.Sprintf("%d-%d", u.off, u.off+n-1))
	resp, err := u.h.send(req)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusAccepted && resp.StatusCode != http.StatusNoContent {
		return u.h.refused(resp)
	}
	_ = resp.Body.Close()
	return u.moved(resp, u.off+n)
}

// moved reads how far a registry is; otherwise is what holds where it does not say.
func (u *uploading) moved(resp *http.Response, otherwise int64) error {
	at, err := location(resp)
	if err != nil {
		if resp.Request.Method != http.MethodGet {
			return err
		}
		at = u.at // the status need not say where
	}
	off := otherwise
	if s := resp.Header.Get("Range"); s != "" {
		_, last, ok := strings.Cut(strings.TrimPrefix(s, "bytes="), "-")
		n, err := strconv.ParseInt(last, 10, 64)
		if !ok || err != nil || n < 0 || n >= max(u.desc.Size, 1) {
			return fmt.Errorf("the registry says that it has bytes %q of %d: %w", s, u.desc.Size, errdefs.ErrFailedPrecondition)
		}
		off = n + 1
		if n == 0 { // 0-0 is of one byte, and of none
			off = min(otherwise, 1)
		}
	}
	u.at, u.off = at, off
	return nil
}

// ask finds out how far an upload that broke off has got, and gives it up where the registry does not know.
func (u *uploading) ask(ctx context.Context) {
	if u.at == nil || u.whole {
		u.at, u.off = nil, 0
		return
	}
	req, err := u.h.request(ctx, http.MethodGet, u.at)
	if err == nil {
		var resp *http.Response
		if resp, err = u.h.Do(req); err == nil {
			if resp.StatusCode == http.StatusNoContent {
				_ = resp.Body.Close()
				err = u.moved(resp, 0)
			} else {
				err = u.h.refused(resp)
			}
		}
	}
	if err != nil {
		u.at, u.off = nil, 0
	}
}

// finish ends an upload, with the last n bytes.
func (u *uploading) finish(ctx context.Context, n int64) error {
	at := *u.at
	if at.RawQuery != "" {
		at.RawQuery += "&"
	}
	at.RawQuery += "digest=" + url.QueryEscape(u.desc.Digest.String())
	req, err := u.h.request(ctx, http.MethodPut, &at)
	if err != nil {
		return err
	}
	u.body(req, n)
	resp, err := u.h.send(req)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusNoContent {
		return u.h.refused(resp)
	}
	if got := resp.Header.Get("Docker-Content-Digest"); got != "" && got != u.desc.Digest.String() {
		_ = resp.Body.Close()
		return fmt.Errorf("the registry took it as %s: %w", got, ErrDigest)
	}
	u.tell(u.desc.Size)
	return resp.Body.Close()
}
