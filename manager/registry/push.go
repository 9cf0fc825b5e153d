package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// target is the endpoint that is pushed to: the first that may be.
func (p *Repository) target() []*endpoint {
	among := p.able(push)
	return among[:min(len(among), 1)]
}

// manifestName is what a manifest is put under: the tag, where the reference does not say that it is another's.
func (p *Repository) manifestName(d digest.Digest) string {
	if p.tag != "" && (p.digest == "" || p.digest == d) {
		return p.tag
	}
	return d.String()
}

// Exists says whether the registry that Push pushes to has content: a manifest under the name that Push would give it.
func (p *Repository) Exists(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	if err := checkDescriptor(desc, 0, desc.Size); err != nil {
		return false, err
	}
	var found bool
	err := p.each(ctx, "look for", p.named(desc.Digest), p.target(), func(h *host) (err error) {
		found, err = p.exists(h.scoped(ctx, "pull", "push"), h, desc)
		return err
	})
	return found, err
}

func (p *Repository) exists(ctx context.Context, h *host, desc ocispec.Descriptor) (bool, error) {
	u := h.url("blobs", desc.Digest.String())
	if IsManifest(desc.MediaType) {
		u = h.url("manifests", p.manifestName(desc.Digest))
	}
	req, err := h.request(ctx, http.MethodHead, u)
	if err != nil {
		return false, err
	}
	if IsManifest(desc.MediaType) {
		req.Header.Set("Accept", desc.MediaType+", */*")
	}
	resp, err := h.Do(req)
	if err != nil {
		return false, err
	}
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return false, resp.Body.Close()
	case resp.StatusCode != http.StatusOK:
		return false, h.refused(resp)
	}
	_ = resp.Body.Close()
	if isPage(resp) {
		return false, ErrNotRegistry
	}
	if IsManifest(desc.MediaType) {
		return resp.Header.Get("Docker-Content-Digest") == desc.Digest.String(), nil
	}
	return resp.ContentLength < 0 || resp.ContentLength == desc.Size, nil
}

// Push sends content, unless the registry has it. A manifest whose digest the reference has, or any where it has none, is
// put under the reference's tag; others, and those of a reference without a tag, under their digest. One with a subject
// is listed in the registry's referrers, by its fallback tag where there is no API for it. Blobs go in requests of
// Config.ChunkSize; an upload that breaks off is asked how far it got, and goes on from there or is begun anew. The first
// endpoint that may be pushed to is used, no other.
func (p *Repository) Push(ctx context.Context, desc ocispec.Descriptor, content io.ReaderAt) error {
	if err := checkDescriptor(desc, 0, desc.Size); err != nil {
		return err
	}
	return p.each(ctx, "push", p.named(desc.Digest), p.target(), func(h *host) error {
		ctx := h.scoped(ctx, "pull", "push")
		found, err := p.exists(ctx, h, desc)
		if err != nil || found {
			return err
		}
		if IsManifest(desc.MediaType) {
			return p.pushManifest(ctx, h, desc, content)
		}
		return p.upload(ctx, h, desc, content)
	})
}

func (p *Repository) pushManifest(ctx context.Context, h *host, desc ocispec.Descriptor, content io.ReaderAt) error {
	if limit := h.r.cfg.ManifestLimit; desc.Size > limit {
		return tooLarge(desc.Size, limit)
	}
	body := make([]byte, desc.Size)
	if n, err := content.ReadAt(body, 0); int64(n) != desc.Size {
		return fmt.Errorf("cannot read the manifest: %w", err)
	}
	if got := desc.Digest.Algorithm().FromBytes(body); got != desc.Digest {
		return fmt.Errorf("the manifest is %s: %w", got, ErrDigest)
	}
	err := h.oras().Manifests().PushReference(ctx, desc, bytes.NewReader(body), p.manifestName(desc.Digest))
	if err == nil && p.opts.Progress != nil {
		p.opts.Progress(desc, desc.Size)
	}
	return explain(ctx, err)
}

// maxReferrerPages bounds a list of referrers that does not end.
const maxReferrerPages = 100

// oras is the endpoint as that library sees it, for what it does and this package does not: referrers.
func (h *host) oras() *remote.Repository {
	return &remote.Repository{
		Client:               orasClient{h},
		Reference:            registry.Reference{Registry: h.base.Host, Repository: h.repo},
		PlainHTTP:            h.base.Scheme == "http",
		MaxMetadataBytes:     h.r.cfg.ManifestLimit,
		ReferrerListMaxPages: maxReferrerPages,
		SkipReferrersGC:      true, // who may push may not delete
	}
}

// orasClient puts the endpoint's own path and what a mirror wants to know into requests.
type orasClient struct{ h *host }

func (c orasClient) Do(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.URL.Path = c.h.base.Path + strings.TrimPrefix(req.URL.Path, "/v2")
	req.URL.RawPath = ""
	c.h.finish(req.URL)
	return c.h.Do(req)
}

// Mount makes a blob of another repository, at the same registry, one of this too; from is its name without the host,
// library/busybox. false: the registry would not, and it has to be pushed.
func (p *Repository) Mount(ctx context.Context, desc ocispec.Descriptor, from string) (bool, error) {
	if err := checkDescriptor(desc, 0, desc.Size); err != nil {
		return false, err
	}
	var mounted bool
	err := p.each(ctx, "mount", p.named(desc.Digest), p.target(), func(h *host) error {
		ctx := auth.AppendScopesForHost(h.scoped(ctx, "pull", "push"), h.base.Host, auth.ScopeRepository(from, "pull"))
		u := h.url("blobs", "uploads") // and a slash
		u.Path += "/"
		q := u.Query()
		q.Set("mount", desc.Digest.String())
		q.Set("from", from)
		u.RawQuery = q.Encode()
		req, err := h.request(ctx, http.MethodPost, u)
		if err != nil {
			return err
		}
		resp, err := h.Do(req)
		if err != nil {
			return err
		}
		switch resp.StatusCode {
		case http.StatusCreated:
			mounted = true
			return resp.Body.Close()
		case http.StatusAccepted: // an upload was begun instead
			_ = resp.Body.Close()
			if at, err := location(resp); err == nil {
				h.cancel(ctx, at)
			}
			return nil
		case http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotImplemented:
			return resp.Body.Close()
		}
		return h.refused(resp)
	})
	return mounted, err
}

// cancel gives up an upload, so that the registry need not keep it. Registries forget those that are left, in time.
func (h *host) cancel(ctx context.Context, at *url.URL) {
	req, err := h.request(ctx, http.MethodDelete, at)
	if err != nil {
		return
	}
	if resp, err := h.send(req); err == nil {
		_ = resp.Body.Close()
	}
}

// location is where an upload goes on.
func location(resp *http.Response) (*url.URL, error) {
	raw := resp.Header.Get("Location")
	if raw == "" {
		return nil, fmt.Errorf("the registry does not say where to upload to: %w", errdefs.ErrFailedPrecondition)
	}
	u, err := resp.Request.URL.Parse(raw)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" {
		return nil, fmt.Errorf("the registry wants the upload at %q: %w", raw, errdefs.ErrFailedPrecondition)
	}
	if resp.Request.URL.Scheme == "https" && u.Scheme != "https" {
		if u.Hostname() != resp.Request.URL.Hostname() {
			return nil, fmt.Errorf("the registry wants the upload at %s, unencrypted: %w", bare(u), errdefs.ErrFailedPrecondition)
		}
		u.Scheme = "https" // a registry that does not know of the proxy before it
	}
	return u, nil
}

// Referrers lists the manifests whose subject is a digest, of one artifact type or, with "", all: by the API, and by the
// fallback tag where there is none.
func (p *Repository) Referrers(ctx context.Context, subject digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	if err := subject.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w: %w", subject, err, errdefs.ErrInvalidArgument)
	}
	var found []ocispec.Descriptor
	err := p.each(ctx, "list the referrers of", p.named(subject), p.able(referrers), func(h *host) error {
		found = nil
		err := h.oras().Referrers(ctx, ocispec.Descriptor{Digest: subject}, artifactType, func(page []ocispec.Descriptor) error {
			found = append(found, page...)
			return nil
		})
		var answer *StatusError
		if err = explain(ctx, err); errors.As(err, &answer) && answer.Status == http.StatusNotFound {
			return nil // no such repository, so nothing refers to it
		}
		return err
	})
	return found, err
}
