package archive

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ExportOptions says what goes into an archive.
type ExportOptions struct {
	// AllPlatforms takes every image of an index, and fails when one is not there; otherwise those for this machine's.
	AllPlatforms bool
	// Platforms takes those for any of these instead.
	Platforms []ocispec.Platform
	// NoDocker leaves manifest.json out, by which docker load of old finds images.
	NoDocker bool
	// NoForeign leaves out layers that are not to be distributed.
	NoForeign bool
}

func (o *ExportOptions) wanted() wanted {
	if len(o.Platforms) > 0 {
		return anyOf(o.Platforms...)
	}
	return here()
}

// Export writes images as the tar of an OCI layout, each blob once and verified. NotFound when a part of an image is not
// there. The archive is ended, w is not closed.
func Export(ctx context.Context, c Content, w io.Writer, images []Image, o ExportOptions) error {
	e := &exporter{
		walker: newWalker(ctx, c), o: o, want: o.wanted(), out: tar.NewWriter(w), done: map[string]error{}, written: map[digest.Digest]bool{},
	}
	if err := e.run(images); err != nil {
		return fmt.Errorf("cannot export: %w", err)
	}
	return nil
}

type exporter struct {
	*walker
	o       ExportOptions
	want    wanted
	out     *tar.Writer
	done    map[string]error // indexes and manifests, by key
	written map[digest.Digest]bool
}

func (e *exporter) run(images []Image) error {
	if len(images) == 0 {
		return invalid("no image was named")
	}
	if err := e.file(ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}); err != nil {
		return err
	}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	docker := []dockerImage{}
	byConfig := map[string]int{}
	for _, i := range images {
		if err := e.tree(i.Target, 0); err != nil {
			return fmt.Errorf("image %s: %w", i.Name, err)
		}
		d := i.Target
		d.Annotations = maps.Clone(d.Annotations)
		if d.Annotations == nil {
			d.Annotations = map[string]string{}
		}
		d.Annotations[annotationName] = i.Name
		if tag := tagOf(i.Name); tag != "" {
			d.Annotations[ocispec.AnnotationRefName] = tag
		}
		index.Manifests = append(index.Manifests, d)
		if e.o.NoDocker {
			continue
		}
		entry, err := e.docker(i)
		if err != nil {
			return fmt.Errorf("image %s: %w", i.Name, err)
		}
		if entry == nil {
			continue
		}
		if at, ok := byConfig[entry.Config]; ok {
			docker[at].RepoTags = append(docker[at].RepoTags, entry.RepoTags...)
			continue
		}
		byConfig[entry.Config] = len(docker)
		docker = append(docker, *entry)
	}
	if err := e.file(ocispec.ImageIndexFile, index); err != nil {
		return err
	}
	if len(docker) > 0 {
		if err := e.file(dockerManifestFile, docker); err != nil {
			return err
		}
	}
	return e.out.Close()
}

// tree writes desc and what it refers to.
func (e *exporter) tree(desc ocispec.Descriptor, depth int) error {
	if err := deep(depth); err != nil {
		return err
	}
	err, done := e.done[key(desc)]
	if done {
		return err
	}
	n, err := e.node(desc)
	if err == nil && isManifest(desc.MediaType) {
		err = e.manifest(n)
	} else if err == nil {
		err = e.index(n, depth)
	}
	e.done[key(desc)] = err
	return err
}

func (e *exporter) manifest(n *node) error {
	for _, part := range n.parts() {
		if e.o.NoForeign && !Distributable(part.MediaType) {
			continue
		}
		if err := e.blob(part); err != nil {
			return err
		}
	}
	return e.blob(n.desc)
}

func (e *exporter) index(n *node, depth int) error {
	found := 0
	var missing error
	var has []string
	for _, m := range n.manifests {
		if !e.o.AllPlatforms && m.Platform != nil && !e.want.Match(*m.Platform) {
			if !attests(m) {
				has = append(has, platforms.FormatAll(*m.Platform))
			}
			continue
		}
		err := e.tree(m, depth+1)
		if errdefs.IsNotFound(err) && !e.o.AllPlatforms {
			missing = err
			continue
		}
		if err != nil {
			return err
		}
		found++
	}
	if found == 0 && missing != nil {
		return missing
	}
	if found == 0 && len(n.manifests) > 0 {
		return lacks(n.desc.Digest, e.want.name, has)
	}
	return e.blob(n.desc)
}

// blob copies one out of the content store, and fails when it is not what its digest says.
func (e *exporter) blob(desc ocispec.Descriptor) (err error) {
	if e.written[desc.Digest] {
		return nil
	}
	r, err := e.c.Open(e.ctx, desc)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	h := header(blobPath(desc.Digest), desc.Size)
	if err := e.out.WriteHeader(h); err != nil {
		return err
	}
	v := desc.Digest.Verifier()
	n, err := io.CopyBuffer(io.MultiWriter(e.out, v), struct{ io.Reader }{io.LimitReader(r, desc.Size+1)}, make([]byte, 512<<10))
	if errors.Is(err, tar.ErrWriteTooLong) || err == nil && n != desc.Size || err == nil && !v.Verified() {
		return fmt.Errorf("content %s is damaged: %w", desc.Digest, errdefs.ErrDataLoss)
	}
	if err != nil {
		return fmt.Errorf("cannot copy %s: %w", desc.Digest, err)
	}
	e.written[desc.Digest] = true
	return nil
}

// docker describes an image for manifest.json: nil when it is not one that docker load takes.
func (e *exporter) docker(i Image) (*dockerImage, error) {
	n, err := e.resolve(i.Target, e.want)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !isConfig(n.config.MediaType) || !e.written[n.config.Digest] {
		return nil, nil
	}
	d := &dockerImage{Config: blobPath(n.config.Digest), RepoTags: []string{}}
	if named, err := reference.ParseNormalizedNamed(i.Name); err == nil && tagOf(i.Name) != "" {
		d.RepoTags = []string{reference.FamiliarString(named)}
	}
	for _, l := range n.layers {
		d.Layers = append(d.Layers, blobPath(l.Digest))
	}
	return d, nil
}

func (e *exporter) file(name string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := e.out.WriteHeader(header(name, int64(len(data)))); err != nil {
		return err
	}
	_, err = e.out.Write(data)
	return err
}

func header(name string, size int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o444, Size: size}
}

func blobPath(d digest.Digest) string {
	return path.Join(ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}
