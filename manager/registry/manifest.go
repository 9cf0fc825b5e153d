package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types of Docker's image manifest V 2, and of what came before.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerSchema1  = "application/vnd.docker.distribution.manifest.v1+"
	ociArtifact    = "application/vnd.oci.artifact.manifest.v1+json"
)

// accepted is what is understood, and then whatever there is.
var accepted = strings.Join([]string{ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, dockerList, dockerManifest, "*/*"}, ", ")

// IsManifest says whether a media type is one that registries keep under manifests, not under blobs.
func IsManifest(mediaType string) bool {
	switch mediaType {
	case ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, dockerList, dockerManifest, ociArtifact:
		return true
	}
	return strings.HasPrefix(mediaType, dockerSchema1)
}

// Resolve finds what the reference stands for. A registry that answers HEAD badly is asked with GET. With a digest in the
// reference that is what is looked for, whatever its tag is; it may be a blob's.
func (p *Repository) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	var desc ocispec.Descriptor
	c, target := resolve, p.tag
	if p.digest != "" {
		if err := p.digest.Validate(); err != nil {
			return desc, fmt.Errorf("digest %q: %w: %w", p.digest, err, errdefs.ErrInvalidArgument)
		}
		c, target = pull, p.digest.String()
	}
	err := p.each(ctx, "resolve", p.ref.String(), p.able(c), func(h *host) error {
		var (
			body []byte
			err  error
		)
		desc, body, err = h.resolve(h.scoped(ctx, "pull"), target, p.digest)
		if err == nil && body != nil {
			p.mu.Lock()
			p.kept[desc.Digest] = body
			p.mu.Unlock()
		}
		return err
	})
	return desc, err
}

// resolve asks for a manifest by tag or digest; want is the digest where it is known. The manifest itself is there when it
// had to be read.
func (h *host) resolve(ctx context.Context, target string, want digest.Digest) (ocispec.Descriptor, []byte, error) {
	req, err := h.request(ctx, http.MethodHead, h.url("manifests", target))
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	req.Header.Set("Accept", accepted)
	resp, err := h.do(req, func(resp *http.Response, err error, n int) (bool, time.Duration) {
		if resp != nil && resp.StatusCode >= 500 && resp.StatusCode != http.StatusServiceUnavailable {
			return false, 0 // GET may do
		}
		return h.again(resp, err, n)
	})
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		_ = resp.Body.Close()
		if isPage(resp) {
			return ocispec.Descriptor{}, nil, ErrNotRegistry
		}
		if desc, ok := fromHead(resp); ok {
			return desc, nil, checkResolved(desc, want)
		}
	case http.StatusNotFound:
		err := h.refused(resp)
		if desc, blobErr := h.resolveBlob(ctx, want); blobErr == nil {
			return desc, nil, nil
		}
		return ocispec.Descriptor{}, nil, err
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests:
		return ocispec.Descriptor{}, nil, h.refused(resp)
	default: // docker-registry says 500 of a manifest that is a blob
		_ = resp.Body.Close()
		if desc, blobErr := h.resolveBlob(ctx, want); blobErr == nil {
			return desc, nil, nil
		}
	}
	body, desc, err := h.manifest(ctx, target, want, "", h.r.cfg.ManifestLimit)
	if err != nil {
		return desc, nil, err
	}
	return desc, body, checkResolved(desc, want)
}

// fromHead reads the headers of a manifest; false when they do not say enough.
func fromHead(resp *http.Response) (ocispec.Descriptor, bool) {
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	d := digest.Digest(resp.Header.Get("Docker-Content-Digest"))
	known := IsManifest(mediaType)
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: resp.ContentLength}, known && d.Validate() == nil && resp.ContentLength > 0
}

// checkResolved refuses what cannot be what was asked for.
func checkResolved(desc ocispec.Descriptor, want digest.Digest) error {
	if want != "" && desc.Digest != want {
		return fmt.Errorf("asked for %s, the registry says it is %s: %w", want, desc.Digest, ErrDigest)
	}
	if strings.HasPrefix(desc.MediaType, dockerSchema1) {
		return fmt.Errorf("the image is of Docker's schema 1 (%s), which has no content digests; it has to be pushed anew by a newer tool: %w", desc.MediaType, errdefs.ErrNotImplemented)
	}
	return nil
}

// resolveBlob looks for a digest among the blobs; there is none of "".
func (h *host) resolveBlob(ctx context.Context, d digest.Digest) (ocispec.Descriptor, error) {
	if d == "" {
		return ocispec.Descriptor{}, errdefs.ErrNotFound
	}
	req, err := h.request(ctx, http.MethodHead, h.url("blobs", d.String()))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	resp, err := h.send(req)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if resp.StatusCode != http.StatusOK || resp.ContentLength < 0 || isPage(resp) {
		return ocispec.Descriptor{}, h.refused(resp)
	}
	return ocispec.Descriptor{MediaType: "application/octet-stream", Digest: d, Size: resp.ContentLength}, resp.Body.Close()
}

// manifest reads one whole, at most limit bytes of it, and verifies it against what the registry says and, if that is known,
// against want. mediaType is asked for where it is known. A body that breaks off is read once more.
func (h *host) manifest(ctx context.Context, target string, want digest.Digest, mediaType string, limit int64) ([]byte, ocispec.Descriptor, error) {
	for again := false; ; again = true {
		body, desc, err := h.readManifest(ctx, target, want, mediaType, limit)
		var broken *TruncatedError
		if again || !errors.As(err, &broken) || ctx.Err() != nil {
			return body, desc, err
		}
	}
}

func (h *host) readManifest(ctx context.Context, target string, want digest.Digest, mediaType string, limit int64) ([]byte, ocispec.Descriptor, error) {
	var desc ocispec.Descriptor
	req, err := h.request(ctx, http.MethodGet, h.url("manifests", target))
	if err != nil {
		return nil, desc, err
	}
	req.Header.Set("Accept", accepted)
	if mediaType != "" {
		req.Header.Set("Accept", mediaType+", */*")
	}
	resp, err := h.Do(req)
	if err != nil {
		return nil, desc, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, desc, h.refused(resp)
	}
	defer resp.Body.Close()
	if isPage(resp) {
		return nil, desc, ErrNotRegistry
	}
	if resp.ContentLength > limit {
		return nil, desc, tooLarge(resp.ContentLength, limit)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		if ended(ctx, err) {
			return nil, desc, err
		}
		return nil, desc, &TruncatedError{Got: int64(len(body)), Want: resp.ContentLength, Err: err}
	}
	if int64(len(body)) > limit {
		return nil, desc, tooLarge(int64(len(body)), limit)
	}
	said := digest.Digest(resp.Header.Get("Docker-Content-Digest"))
	if said.Validate() != nil {
		said = ""
	}
	algorithm := digest.Canonical
	if want != "" {
		algorithm = want.Algorithm()
	} else if said != "" {
		algorithm = said.Algorithm()
	}
	got := algorithm.FromBytes(body)
	for _, d := range []digest.Digest{want, said} {
		if d != "" && d.Algorithm() == algorithm && d != got {
			return nil, desc, fmt.Errorf("the manifest should be %s and is %s: %w", d, got, ErrDigest)
		}
	}
	desc = ocispec.Descriptor{Digest: got, Size: int64(len(body))}
	desc.MediaType, _, _ = mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if !IsManifest(desc.MediaType) {
		if desc.MediaType = guess(body); desc.MediaType == "" {
			return nil, desc, fmt.Errorf("the answer (%q) is no image manifest or index: %w", resp.Header.Get("Content-Type"), errdefs.ErrFailedPrecondition)
		}
	}
	return body, desc, nil
}

func tooLarge(n, limit int64) error {
	return fmt.Errorf("the manifest has %d bytes or more, the limit is %d: %w", n, limit, errdefs.ErrFailedPrecondition)
}

// guess is the media type of a manifest that a registry calls something else, as it says itself or looks like; "" for none.
func guess(body []byte) string {
	var m struct {
		SchemaVersion int                 `json:"schemaVersion"`
		MediaType     string              `json:"mediaType"`
		Manifests     []json.RawMessage   `json:"manifests"`
		Config        *ocispec.Descriptor `json:"config"`
		FSLayers      json.RawMessage     `json:"fsLayers"`
	}
	switch {
	case json.Unmarshal(body, &m) != nil:
		return ""
	case m.SchemaVersion == 1 || m.FSLayers != nil:
		return dockerSchema1 + "json"
	case IsManifest(m.MediaType):
		return m.MediaType
	case m.MediaType != "":
		return ""
	case m.Manifests != nil:
		return ocispec.MediaTypeImageIndex
	case m.Config != nil:
		return ocispec.MediaTypeImageManifest
	}
	return ""
}
