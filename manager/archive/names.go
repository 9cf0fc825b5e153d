package archive

import (
	"strings"

	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// annotationName on an entry of index.json is the full name of the image.
const annotationName = "io.containerd.image.name"

// imageNames finds what the image of an index entry is to be called.
func imageNames(d ocispec.Descriptor, base string) ([]string, error) {
	if name := d.Annotations[annotationName]; name != "" {
		n, err := normalize(name)
		return []string{n}, err
	}
	ref := d.Annotations[ocispec.AnnotationRefName]
	switch {
	case ref == "":
		return []string{base + "@" + d.Digest.String()}, nil
	case strings.Contains(ref, "/"):
		n, err := normalize(ref)
		return []string{n}, err
	case strings.Contains(ref, ":"): // name:tag, as podman and skopeo write it
		n, err := normalize(ref)
		return []string{n}, err
	}
	if len(ref) > 128 {
		return nil, invalid("tag %q... of image %s is longer than 128 bytes", ref[:128], d.Digest)
	}
	return []string{base + ":" + ref}, nil
}

// normalize completes a name as docker does: busybox is docker.io/library/busybox:latest.
func normalize(name string) (string, error) {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return "", invalid("image name %q: %w", name, err)
	}
	return reference.TagNameOnly(n).String(), nil
}

// tagOf gives the tag of a full name, empty when it has none.
func tagOf(name string) string {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return ""
	}
	if t, ok := n.(reference.Tagged); ok {
		return t.Tag()
	}
	return ""
}
