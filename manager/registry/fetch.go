package registry

import (
	"bytes"
	"context"
	_ "crypto/sha512" // digests of these
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Fetch opens content from a byte on, to its end as desc.Size says. The caller closes it; it may be read from one
// goroutine only, and ends with the context. Manifests are verified before the first byte comes, and limited to
// Config.ManifestLimit.
//
// A blob's reader resumes by itself: a connection that breaks, stalls (Config.StallTimeout) or ends early is opened anew
// at the next byte, at the same endpoint and then at the others, up to Config.Attempts times without a byte between them;
// then Read fails with what was wrong, a *StallError or *TruncatedError among it, and the caller may call Fetch again with
// the offset it has got to. From offset 0 the digest is verified: the last Read fails with ErrDigest instead of io.EOF, and
// another Fetch asks other endpoints first. Bytes beyond desc.Size are not read. A registry that ignores ranges is read
// from its beginning, and what comes before the offset thrown away.
func (p *Repository) Fetch(ctx context.Context, desc ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	if err := checkDescriptor(desc, offset, desc.Size-offset); err != nil {
		return nil, err
	}
	if IsManifest(desc.MediaType) {
		body, err := p.fetchManifest(ctx, desc)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(bytes.NewReader(body[offset:])), nil
	}
	s := &stream{p: p, ctx: ctx, desc: desc, pos: offset, end: desc.Size}
	if offset == 0 {
		s.verifier = desc.Digest.Verifier()
	}
	return s, s.start()
}

// FetchRange is Fetch of length bytes, without a check of the digest. At a registry that ignores ranges it fails with
// ErrNoRanges, unless offset is 0.
func (p *Repository) FetchRange(ctx context.Context, desc ocispec.Descriptor, offset, length int64) (io.ReadCloser, error) {
	if err := checkDescriptor(desc, offset, length); err != nil {
		return nil, err
	}
	if IsManifest(desc.MediaType) {
		body, err := p.fetchManifest(ctx, desc)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(bytes.NewReader(body[offset : offset+length])), nil
	}
	s := &stream{p: p, ctx: ctx, desc: desc, pos: offset, end: offset + length, ranges: true}
	return s, s.start()
}

func checkDescriptor(desc ocispec.Descriptor, offset, length int64) error {
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	if desc.Size < 0 {
		return fmt.Errorf("size %d of %s: %w", desc.Size, desc.Digest, errdefs.ErrInvalidArgument)
	}
	if offset < 0 || length < 0 || offset+length > desc.Size {
		return fmt.Errorf("bytes %d to %d of %s, which has %d: %w", offset, offset+length, desc.Digest, desc.Size, errdefs.ErrOutOfRange)
	}
	return nil
}

// fetchManifest reads one whole.
func (p *Repository) fetchManifest(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	if limit := p.r.cfg.ManifestLimit; desc.Size > limit {
		return nil, fmt.Errorf("%s: %w", p.named(desc.Digest), tooLarge(desc.Size, limit))
	}
	p.mu.Lock()
	body := p.kept[desc.Digest]
	p.mu.Unlock()
	if int64(len(body)) == desc.Size && body != nil {
		return body, nil
	}
	err := p.each(ctx, "fetch", p.named(desc.Digest), p.able(pull), func(h *host) error {
		got, _, err := h.manifest(h.scoped(ctx, "pull"), desc.Digest.String(), desc.Digest, desc.MediaType, desc.Size)
		body = got
		if err == nil && int64(len(body)) != desc.Size {
			return wrongSize(int64(len(body)), desc)
		}
		return err
	})
	return body, err
}

func wrongSize(got int64, desc ocispec.Descriptor) error {
	return fmt.Errorf("it has %d bytes, where %d are expected: %w", got, desc.Size, errdefs.ErrFailedPrecondition)
}

// open asks one endpoint for bytes from to the end of a blob, or to end of them. skip is how many come first that
// were not asked for.
func (h *host) open(ctx context.Context, desc ocispec.Descriptor, from, end int64) (body io.ReadCloser, skip int64, err error) {
	req, err := h.request(h.scoped(ctx, "pull"), http.MethodGet, h.url("blobs", desc.Digest.String()))
	if err != nil {
		return nil, 0, err
	}
	ranged := from > 0 || end < desc.Size
	if ranged {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, end-1))
	}
	resp, err := h.Do(req)
	if err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			_ = resp.Body.Close()
		}
	}()
	switch {
	case resp.StatusCode == http.StatusOK:
		if isPage(resp) && !strings.HasPrefix(desc.MediaType, "text/html") {
			return nil, 0, ErrNotRegistry
		}
		if n := resp.ContentLength; n >= 0 && n != desc.Size {
			return nil, 0, wrongSize(n, desc)
		}
		skip = from
	case resp.StatusCode == http.StatusPartialContent && ranged:
		first, total, ok := contentRange(resp.Header.Get("Content-Range"))
		if !ok || first != from {
			return nil, 0, fmt.Errorf("asked for bytes from %d, it sends %q: %w", from, resp.Header.Get("Content-Range"), errdefs.ErrFailedPrecondition)
		}
		if total >= 0 && total != desc.Size {
			return nil, 0, wrongSize(total, desc)
		}
	default:
		return nil, 0, h.refused(resp)
	}
	if c := resp.Header.Get("Content-Encoding"); c != "" && c != "identity" {
		return nil, 0, fmt.Errorf("it sends the blob compressed once more (%s), which was not asked for: %w", c, errdefs.ErrFailedPrecondition)
	}
	return resp.Body, skip, nil
}

// contentRange reads "bytes FIRST-LAST/TOTAL" (RFC 9110, 14.4); total is -1 where it is not said.
func contentRange(s string) (first, total int64, ok bool) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(s), "bytes ")
	span, size, ok2 := strings.Cut(rest, "/")
	from, to, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, false
	}
	first, err := strconv.ParseInt(from, 10, 64)
	last, err2 := strconv.ParseInt(to, 10, 64)
	if err != nil || err2 != nil || first < 0 || last < first {
		return 0, 0, false
	}
	total = -1
	if size != "*" {
		if total, err = strconv.ParseInt(size, 10, 64); err != nil || total <= last {
			return 0, 0, false
		}
	}
	return first, total, true
}

// emptyBlob says whether a descriptor is of no bytes at all, which need no request.
func emptyBlob(desc ocispec.Descriptor) bool {
	return desc.Size == 0 && desc.Digest == desc.Digest.Algorithm().FromBytes(nil)
}
