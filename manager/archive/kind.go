package archive

import (
	"context"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Kind is what a blob is in an image, as its media type says.
type Kind string

// The kinds.
const (
	Index    Kind = "index"
	Manifest Kind = "manifest"
	Conf     Kind = "config"
	Layer    Kind = "layer"
	Unknown  Kind = "unknown"
)

// KindOf finds it.
func KindOf(mediaType string) Kind {
	base, _, _ := strings.Cut(mediaType, "+")
	switch {
	case isIndex(mediaType):
		return Index
	case isManifest(mediaType):
		return Manifest
	case isConfig(mediaType):
		return Conf
	case strings.HasPrefix(mediaType, "application/vnd.oci.image.layer."),
		strings.HasPrefix(base, "application/vnd.docker.image.rootfs.diff.tar"),
		strings.HasPrefix(base, "application/vnd.docker.image.rootfs.foreign.diff.tar"),
		base == "application/vnd.erofs", base == "application/vnd.erofs.layer.v1":
		return Layer
	}
	return Unknown
}

// Distributable is false for layers that no registry has, and that are not to be pushed: Windows' own.
func Distributable(mediaType string) bool {
	return !strings.HasPrefix(mediaType, "application/vnd.oci.image.layer.nondistributable.") &&
		!strings.HasPrefix(mediaType, "application/vnd.docker.image.rootfs.foreign.")
}

// RefKey is the name of the ingest by which a blob is fetched, as other clients of the content store choose it, too.
func RefKey(desc ocispec.Descriptor) string {
	return string(KindOf(desc.MediaType)) + "-" + desc.Digest.String()
}

// MediaType is what a manifest or index says of itself, empty when it says nothing. InvalidArgument for what is neither.
func MediaType(ctx context.Context, c Content, desc ocispec.Descriptor) (string, error) {
	var said struct {
		MediaType string `json:"mediaType"`
	}
	err := readJSON(ctx, c, desc, &said)
	return said.MediaType, err
}
