package transfer

import (
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/archive/local"
)

// Import reads an archive (see archive.Import), names its images as image.References says, and unpacks them; image.Name
// is a name for the archive as a whole. compress is ImportOptions.Compress.
func (s *Service) Import(ctx context.Context, r io.Reader, image Image, compress bool, progress func(Progress)) ([]Stored, error) {
	if len(image.Unpacks) > 0 && s.cfg.Snapshots == nil {
		return nil, fmt.Errorf("there is no snapshotter that works: %w", errdefs.ErrUnavailable)
	}
	t := newTracker("", progress)
	defer t.end()
	var out []Stored
	err := s.leased(ctx, "import "+image.Name, func(ctx context.Context) error {
		t.say(Progress{Event: "Importing"})
		names := &keeper{}
		o := archive.ImportOptions{Index: image.Name, Labels: image.Labels, Names: image.imported, Compress: compress}
		if w := image.Import; w != nil {
			o.Base, o.Digests, o.SkipNamed, o.Names = w.Base, w.Digests, w.SkipNamed, nil
		}
		if _, err := archive.Import(ctx, s.blobs, names, r, o); err != nil {
			return err
		}
		if err := s.unpackAll(ctx, names, image); err != nil {
			return err
		}
		for _, i := range names.all {
			if err := s.name(ctx, i, image); err != nil {
				return err
			}
			out = append(out, i)
			t.say(Progress{Event: "saved", Name: i.Name, Desc: &i.Target})
		}
		if image.Import != nil && image.Import.Discard {
			if err := s.discard(ctx, names, image); err != nil {
				return err
			}
		}
		t.say(Progress{Event: "Completed import"})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// name gives an imported image its name. One of image.Import keeps the labels of the image that has it.
func (s *Service) name(ctx context.Context, i Stored, image Image) error {
	if image.Import != nil {
		return local.NewImages(s.cfg.Images).Put(ctx, i.Name, i.Target, image.Labels)
	}
	_, err := s.store(ctx, []string{i.Name}, image.Labels, i.Target)
	return err
}

// keeper keeps the names of an import until all of it is unpacked.
type keeper struct {
	all     []Stored
	targets []ocispec.Descriptor
}

func (k *keeper) Put(_ context.Context, name string, target ocispec.Descriptor, _ map[string]string) error {
	k.all = append(k.all, Stored{name, target})
	if !slices.ContainsFunc(k.targets, func(d ocispec.Descriptor) bool { return d.Digest == target.Digest }) {
		k.targets = append(k.targets, target)
	}
	return nil
}

// name is one that a target gets.
func (k *keeper) name(target ocispec.Descriptor) string {
	i := slices.IndexFunc(k.all, func(s Stored) bool { return s.Target.Digest == target.Digest })
	return k.all[i].Name
}

// discard has the collector take the layers of what is unpacked.
func (s *Service) discard(ctx context.Context, names *keeper, image Image) error {
	for _, u := range image.Unpacks {
		for _, target := range names.targets {
			if err := archive.DiscardLayers(ctx, s.blobs, target, u.Platform); err != nil {
				return fmt.Errorf("%s was imported and unpacked, but its layers are kept: %w", names.name(target), err)
			}
		}
	}
	return nil
}

// unpackAll unpacks images for each platform that is asked for and that they have; those of image.Import must have it.
func (s *Service) unpackAll(ctx context.Context, names *keeper, image Image) error {
	for _, u := range image.Unpacks {
		to, err := s.snapshotter(u)
		if err != nil {
			return err
		}
		for _, target := range names.targets {
			_, err := archive.UnpackPlatform(ctx, s.blobs, to, target, u.Platform)
			switch {
			case err == nil:
			case image.Import != nil:
				return fmt.Errorf("%s was not imported, as it cannot be unpacked for %s: %w", names.name(target), platforms.FormatAll(u.Platform), err)
			case !errdefs.IsNotFound(err):
				return err
			}
		}
	}
	return nil
}

// Export writes the images that image names as an archive (see archive.Export).
func (s *Service) Export(ctx context.Context, w io.Writer, image Image, o archive.ExportOptions, progress func(Progress)) error {
	t := newTracker("", progress)
	defer t.end()
	return s.leased(ctx, "export "+image.Name, func(ctx context.Context) error {
		found, err := s.lookup(ctx, image)
		if err != nil {
			return err
		}
		t.say(Progress{Event: "Exporting"})
		var list []archive.Image
		for _, i := range found {
			list = append(list, archive.Image{Name: i.Name, Target: i.Target})
		}
		if err := archive.Export(ctx, s.blobs, w, list, o); err != nil {
			return err
		}
		t.say(Progress{Event: "Completed export"})
		return nil
	})
}
