package registry

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Repository is one name at a registry, with the endpoints that serve it, for one pull or push. Its methods may be called
// from several goroutines. Their errors are *Error, with every endpoint that was tried.
type Repository struct {
	r    *Registry
	opts Options
	ref  reference.Named
}

// Repository reads a reference, NAME[:TAG][@DIGEST], docker.io's short names too (busybox is
// docker.io/library/busybox:latest), and finds its endpoints. Its error is InvalidArgument, for a reference or a
// hosts.toml that is wrong.
func (r *Registry) Repository(ref string, o Options) (*Repository, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, fmt.Errorf("reference %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return &Repository{r: r, opts: o, ref: named}, nil
}

// Reference is what was asked for, in full.
func (p *Repository) Reference() reference.Named { return p.ref }

// Resolve finds what the reference stands for. A registry that answers HEAD badly is asked with GET. With a digest in the
// reference that is what is looked for, whatever its tag is.
func (p *Repository) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, errdefs.ErrNotImplemented
}

// Fetch opens content from a byte on, to its end as desc.Size says. The caller closes it; it may be read from one
// goroutine only. Manifests are verified before the first byte comes, and limited to Config.ManifestLimit.
//
// A blob's reader resumes by itself: a connection that breaks, stalls (Config.StallTimeout) or ends early is opened anew
// at the next byte, at the same endpoint and then at the others, up to Config.Attempts times without a byte between them;
// then Read fails with what was wrong, a *StallError or *TruncatedError among it, and the caller may call Fetch again with
// the offset it has got to. From offset 0 the digest is verified: the last Read fails with ErrDigest instead of io.EOF.
// Bytes beyond desc.Size are not read. A registry that ignores ranges is read from its beginning and what comes before
// offset thrown away.
func (p *Repository) Fetch(ctx context.Context, desc ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	return nil, errdefs.ErrNotImplemented
}

// FetchRange is Fetch for length bytes, without a check of the digest. At a registry that ignores ranges it fails with
// ErrNoRanges, unless offset is 0.
func (p *Repository) FetchRange(ctx context.Context, desc ocispec.Descriptor, offset, length int64) (io.ReadCloser, error) {
	return nil, errdefs.ErrNotImplemented
}

// Exists says whether the registry that Push pushes to has content: a manifest under the reference's tag where Push would
// set it.
func (p *Repository) Exists(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	return false, errdefs.ErrNotImplemented
}

// Push sends content, unless the registry has it. A manifest whose digest the reference has, or any where it has none, is
// put under the reference's tag; others, and those of a reference without a tag, under their digest. One with a subject
// is listed in the registry's referrers, by its fallback tag too where there is no API for it. Blobs go in requests of
// Config.ChunkSize; an upload that breaks off is asked how far it got, and goes on from there or is begun anew. The first
// endpoint that may be pushed to is used, no other.
func (p *Repository) Push(ctx context.Context, desc ocispec.Descriptor, content io.ReaderAt) error {
	return errdefs.ErrNotImplemented
}

// Mount makes a blob of another repository, at the same registry, one of this too; from is its name without the host,
// library/busybox. false: the registry would not, and it has to be pushed.
func (p *Repository) Mount(ctx context.Context, desc ocispec.Descriptor, from string) (bool, error) {
	return false, errdefs.ErrNotImplemented
}

// Referrers lists the manifests whose subject is a digest, of one artifact type or, with "", all: by the API, and by the
// fallback tag where there is none.
func (p *Repository) Referrers(ctx context.Context, subject digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	return nil, errdefs.ErrNotImplemented
}
