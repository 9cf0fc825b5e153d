package archive

import (
	"encoding/json"
	"fmt"
	"path"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/diff"
)

// dockerImage is an entry of docker save's manifest.json; the paths are of the archive.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// docker makes OCI manifests of docker save's description. Config and layers are the same bytes in both formats.
func (im *importer) docker() (ocispec.Index, error) {
	var list []dockerImage
	var index ocispec.Index
	if err := json.Unmarshal(im.json[dockerManifestFile], &list); err != nil {
		return index, invalid("%s is malformed: %w", dockerManifestFile, err)
	}
	for _, d := range list {
		desc, err := im.dockerImage(d)
		if err != nil {
			return index, fmt.Errorf("%s: %w", dockerManifestFile, err)
		}
		tags := d.RepoTags
		if len(tags) == 0 {
			tags = []string{""}
		}
		for _, tag := range tags {
			one := desc
			if tag != "" {
				one.Annotations = map[string]string{annotationName: tag}
			}
			index.Manifests = append(index.Manifests, one)
		}
	}
	return index, nil
}

func (im *importer) dockerImage(d dockerImage) (ocispec.Descriptor, error) {
	config, err := im.find(d.Config)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("config: %w", err)
	}
	config.desc.MediaType = ocispec.MediaTypeImageConfig
	var c ocispec.Image
	if err := readJSON(im.ctx, im.content, config.desc, &c); err != nil {
		return ocispec.Descriptor{}, err
	}
	if len(c.RootFS.DiffIDs) != len(d.Layers) {
		return ocispec.Descriptor{}, invalid("config %s speaks of %d layers, the archive has %d", d.Config, len(c.RootFS.DiffIDs), len(d.Layers))
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config.desc, Layers: []ocispec.Descriptor{},
	}
	for _, p := range d.Layers {
		l, err := im.find(p)
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer: %w", err)
		}
		if l.kind == diff.None && im.compress {
			if l, err = im.pack(l); err != nil {
				return ocispec.Descriptor{}, fmt.Errorf("layer %s: %w", p, err)
			}
		}
		l.desc.MediaType = diff.LayerType(l.kind)
		m.Layers = append(m.Layers, l.desc)
	}
	desc, err := im.putJSON(ocispec.MediaTypeImageManifest, m)
	if c.OS != "" && c.Architecture != "" {
		desc.Platform = &ocispec.Platform{OS: c.OS, Architecture: c.Architecture, Variant: c.Variant}
	}
	return desc, err
}

// pack makes a gzip layer of a plain one, once.
func (im *importer) pack(plain blob) (blob, error) {
	if done, ok := im.packed[plain.desc.Digest]; ok {
		return done, nil
	}
	desc, _, err := pack(im.ctx, im.content, plain.desc, diff.Gzip)
	if err != nil {
		return blob{}, err
	}
	im.packed[plain.desc.Digest] = blob{desc, diff.Gzip}
	return im.packed[plain.desc.Digest], nil
}

// find looks up a path of the archive, through its links.
func (im *importer) find(name string) (blob, error) {
	p := path.Clean(name)
	for range 16 {
		if b, ok := im.blobs[p]; ok {
			return b, nil
		}
		target, ok := im.links[p]
		if !ok {
			return blob{}, invalid("the archive has no %q", name)
		}
		p = target
	}
	return blob{}, invalid("the links of %q lead nowhere", name)
}
