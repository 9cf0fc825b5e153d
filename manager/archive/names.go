package archive

import (
	"strings"

	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// annotationName on an entry of index.json is the full name of the image.
const annotationName = "io.containerd.image.name"

// imageNames finds what the image of an index entry is to be called, and whether the archive has that name in full.
func imageNames(d ocispec.Descriptor, base string) (names []string, full bool, err error) {
	named, tag, err := named(d)
	switch {
	case err != nil || named != "":
		return []string{named}, true, err
	case tag != "":
		return []string{base + ":" + tag}, false, nil
	}
	return []string{base + "@" + d.Digest.String()}, false, nil
}

// named gives the full name that an archive has for an image, or only its tag, or neither.
func named(d ocispec.Descriptor) (name, tag string, err error) {
	if name := d.Annotations[annotationName]; name != "" {
		n, err := normalize(name)
		return n, "", err
	}
	ref := d.Annotations[ocispec.AnnotationRefName]
	if strings.ContainsAny(ref, "/:") { // the latter, name:tag, as podman and skopeo write it
		n, err := normalize(ref)
		return n, "", err
	}
	if len(ref) > 128 {
		return "", "", invalid("tag %q... of image %s is longer than 128 bytes", ref[:128], d.Digest)
	}
	return "", ref, nil
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
