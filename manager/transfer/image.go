package transfer

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/images"
	"github.com/managerd/managerd/manager/transfer/wish"
)

// Image says what an image is to be called, or is called, in the image store, and which part of it counts.
type Image struct {
	Name   string
	Labels map[string]string
	// Platforms whose images are taken; none means all of them.
	Platforms []ocispec.Platform
	// AllMetadata takes manifests and configs of the other platforms, too.
	AllMetadata bool
	// ManifestLimit is how many images of an index are taken, the best for Platforms first; 0 means all that match.
	ManifestLimit int
	// References are further names.
	References []Reference
	// Unpacks says where its layers are unpacked.
	Unpacks []Unpack
	wish.Wish
}

// Unpack is a platform whose layers are unpacked, and by which snapshotter.
type Unpack struct {
	Platform    ocispec.Platform
	Snapshotter string
}

// Reference is a name, or, with Prefix, what names begin with that are made for the images of an archive.
type Reference struct {
	Name   string
	Prefix bool
	// Overwrite takes a name that an archive gives also when it does not begin with the prefix.
	Overwrite bool
	// Digest names images PREFIX@DIGEST, with SkipNamed only those that have no other name.
	Digest, SkipNamed bool
}

// Stored is an image in the image store.
type Stored struct {
	Name   string
	Target ocispec.Descriptor
}

// store gives a target its names.
func (s *Service) store(ctx context.Context, names []string, labels map[string]string, target ocispec.Descriptor) (out []Stored, err error) {
	for _, name := range names {
		i := images.Image{Name: name, Target: target, Labels: labels}
		_, err := s.cfg.Images.Create(ctx, i)
		if errdefs.IsAlreadyExists(err) {
			_, err = s.cfg.Images.Update(ctx, i)
		}
		if err != nil {
			return out, fmt.Errorf("cannot name image %s: %w", name, err)
		}
		out = append(out, Stored{name, target})
	}
	return out, nil
}

// names are those that the image gets whatever it is.
func (i Image) names() (out []string) {
	if i.Name != "" {
		out = append(out, i.Name)
	}
	for _, r := range i.References {
		if !r.Prefix {
			out = append(out, r.Name)
		}
	}
	return out
}

// imported are the names of an image of an archive, which calls it named (empty: nothing, or a tag alone is in tag).
func (i Image) imported(named, tag string, desc ocispec.Descriptor) (out []string) {
	for _, r := range i.References {
		if !r.Prefix {
			continue
		}
		name := named
		if name == "" && tag != "" {
			name = r.Name + ":" + tag
		}
		ok := name != "" && (r.Overwrite || below(name, r.Name))
		if ok {
			out = append(out, name)
		}
		if r.Digest && !(ok && r.SkipNamed) {
			out = append(out, r.Name+"@"+desc.Digest.String())
		}
	}
	return out
}

func below(name, prefix string) bool {
	rest, ok := strings.CutPrefix(name, prefix)
	return ok && (rest == "" || strings.ContainsRune(":@/", rune(rest[0])) || strings.HasSuffix(prefix, "/"))
}

// lookup finds the images that are meant.
func (s *Service) lookup(ctx context.Context, i Image) (out []Stored, err error) {
	for _, name := range i.names() {
		found, err := s.cfg.Images.Get(ctx, name)
		if err != nil {
			return nil, err
		}
		out = append(out, Stored{found.Name, found.Target})
	}
	var all []images.Image
	for _, r := range i.References {
		if !r.Prefix {
			continue
		}
		if all == nil {
			if all, err = s.cfg.Images.List(ctx, filters.Always); err != nil {
				return nil, err
			}
		}
		for _, found := range all {
			if below(found.Name, r.Name) {
				out = append(out, Stored{found.Name, found.Target})
			}
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no image was named, or none begins so: %w", errdefs.ErrNotFound)
	}
	return out, nil
}

// Tag gives an image a further name, whatever that stood for before.
func (s *Service) Tag(ctx context.Context, from, to Image) error {
	return s.leased(ctx, "tag "+from.Name, func(ctx context.Context) error {
		found, err := s.lookup(ctx, from)
		if err != nil {
			return err
		}
		names := to.names()
		if len(names) == 0 {
			return fmt.Errorf("the new name of image %s is missing: %w", from.Name, errdefs.ErrInvalidArgument)
		}
		labels := to.Labels
		if labels == nil {
			old, err := s.cfg.Images.Get(ctx, found[0].Name)
			if err != nil {
				return err
			}
			labels = old.Labels
		}
		_, err = s.store(ctx, names, labels, found[0].Target)
		return err
	})
}

// withDigest is a reference whose digest is that of desc.
func withDigest(name string, desc ocispec.Descriptor) (string, error) {
	named, err := reference.ParseDockerRef(name)
	if err != nil {
		return "", fmt.Errorf("image name %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	if _, ok := named.(reference.Digested); ok {
		return named.String(), nil
	}
	full, err := reference.WithDigest(reference.TagNameOnly(named), desc.Digest)
	if err != nil {
		return "", fmt.Errorf("image name %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return full.String(), nil
}
