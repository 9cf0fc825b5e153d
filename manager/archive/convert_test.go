package archive_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/diff"
)

// put writes a blob.
func (e *env) put(t *testing.T, mediaType string, data []byte) ocispec.Descriptor {
	t.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	w, err := e.content.Create(e.ctx, "put-"+d.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write(data)
	if err == nil {
		err = w.Commit(e.ctx, d.Size, d.Digest, nil)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return d
}

func (e *env) putJSON(t *testing.T, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return e.put(t, mediaType, data)
}

func packed(t *testing.T, c diff.Compression, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := diff.Compress(c, &b)
	if err != nil {
		t.Fatal(err)
	}
	_, err = z.Write(data)
	if err := errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

const (
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar"
	dockerForeign  = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
)

// dockerImage writes an image of Docker's media types, with a layer twice, and one that is not to be distributed.
func (e *env) dockerImage(t *testing.T, name string) ocispec.Descriptor {
	t.Helper()
	one, two := layerOf(t, name), layerOf(t, "shared")
	first := e.put(t, dockerLayer+".gzip", packed(t, diff.Gzip, one))
	second := e.put(t, dockerLayer+".gzip", packed(t, diff.Gzip, two))
	second.Annotations = map[string]string{"io.github.containers.zstd-chunked.manifest-checksum": "x", "kept": "y"}
	foreign := ocispec.Descriptor{MediaType: dockerForeign, Digest: digest.FromString("elsewhere"), Size: 9, URLs: []string{"https://example.com/l"}}
	m := ocispec.Manifest{MediaType: dockerManifest, Layers: []ocispec.Descriptor{first, second, second, foreign}}
	m.SchemaVersion = 2
	m.Config = e.put(t, dockerConfig, configOf(t, one, two, two, []byte("elsewhere")))
	return e.putJSON(t, dockerManifest, m)
}

// dockerList writes an index of images for platforms; that for s390x is not there.
func (e *env) dockerList(t *testing.T) ocispec.Descriptor {
	t.Helper()
	index := ocispec.Index{MediaType: dockerIndex}
	index.SchemaVersion = 2
	for _, arch := range []string{"amd64", "arm64", "s390x"} {
		d := ocispec.Descriptor{MediaType: dockerManifest, Digest: digest.FromString("nowhere"), Size: 7}
		if arch != "s390x" {
			d = e.dockerImage(t, arch)
		}
		d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		index.Manifests = append(index.Manifests, d)
	}
	about := e.putJSON(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest, Config: e.put(t, ocispec.MediaTypeEmptyJSON, []byte("{}")),
		Layers: []ocispec.Descriptor{e.put(t, "application/vnd.in-toto+json", []byte(`{"a":1}`))},
	})
	about.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	about.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": index.Manifests[0].Digest.String()}
	index.Manifests = append(index.Manifests, about)
	return e.putJSON(t, dockerIndex, index)
}

// TestConvert: what is inside of layers stays the same, whatever they are packed as.
func TestConvert(t *testing.T) {
	both(t, func(t *testing.T, e *env) {
		target := e.dockerImage(t, "file")
		for _, c := range []struct {
			o     archive.ConvertOptions
			types [5]string // of the manifest, the config, the first two layers, and the foreign one
		}{
			{archive.ConvertOptions{OCI: true}, [5]string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig,
				ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerGzip, "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"}},
			{archive.ConvertOptions{OCI: true, Layers: new(diff.Zstd)}, [5]string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig,
				ocispec.MediaTypeImageLayerZstd, ocispec.MediaTypeImageLayerZstd, "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"}},
			{archive.ConvertOptions{Layers: new(diff.None)}, [5]string{dockerManifest, dockerConfig, dockerLayer, dockerLayer, dockerForeign}},
			{archive.ConvertOptions{Layers: new(diff.Zstd)}, [5]string{dockerManifest, dockerConfig, dockerLayer + ".zstd", dockerLayer + ".zstd", dockerForeign}},
		} {
			got, err := archive.Convert(e.ctx, e.content, target, c.o)
			if err != nil {
				t.Fatal(err)
			}
			var m ocispec.Manifest
			read(t, e, got, &m)
			if is := [5]string{got.MediaType, m.Config.MediaType, m.Layers[0].MediaType, m.Layers[1].MediaType, m.Layers[3].MediaType}; is != c.types || m.MediaType != got.MediaType {
				t.Errorf("%+v: types are %q, want %q", c.o, is, c.types)
			}
			labels, err := e.content.Labels(e.ctx, got.Digest)
			if err != nil || labels["containerd.io/gc.ref.content.config"] != m.Config.Digest.String() || labels["containerd.io/gc.ref.content.l.1"] != m.Layers[1].Digest.String() {
				t.Errorf("labels of the manifest: %v, %v", labels, err)
			}
			if m.Layers[1].Digest != m.Layers[2].Digest || m.Layers[1].Annotations["kept"] != "y" {
				t.Errorf("layers are %+v", m.Layers)
			}
			if chunked := len(m.Layers[1].Annotations) > 1; chunked == (c.o.Layers != nil) {
				t.Errorf("%+v: annotations are %v", c.o, m.Layers[1].Annotations)
			}
			for i, want := range [][]byte{layerOf(t, "file"), layerOf(t, "shared")} {
				r, err := e.content.Open(e.ctx, m.Layers[i])
				if err != nil {
					t.Fatal(err)
				}
				raw, err := io.ReadAll(r)
				if err := errors.Join(err, r.Close()); err != nil || digest.FromBytes(raw) != m.Layers[i].Digest || int64(len(raw)) != m.Layers[i].Size {
					t.Fatalf("layer %d is not what its descriptor says: %v", i, err)
				}
				plain, as, err := diff.Decompress(bytes.NewReader(raw))
				if err != nil {
					t.Fatal(err)
				}
				data, err := io.ReadAll(plain)
				if err := errors.Join(err, plain.Close()); err != nil || !bytes.Equal(data, want) {
					t.Errorf("layer %d holds something else: %v", i, err)
				}
				if c.o.Layers != nil && as != *c.o.Layers {
					t.Errorf("layer %d is packed as %q", i, as)
				}
			}
			again, err := archive.Convert(e.ctx, e.content, got, c.o)
			if err != nil || again.Digest != got.Digest || again.MediaType != got.MediaType {
				t.Errorf("once more: %+v, %v", again, err)
			}
		}
		if n := e.ingests(t); n != 0 {
			t.Errorf("%d writes left", n)
		}
	})
}

// TestConvertIndex: of an index the images for the platforms stay.
func TestConvertIndex(t *testing.T) {
	e := newEnv(t, false)
	target := e.dockerList(t)
	platforms := func(d ocispec.Descriptor) (out []string) {
		var index ocispec.Index
		read(t, e, d, &index)
		labels, err := e.content.Labels(e.ctx, d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		refs := slices.Sorted(maps.Values(labels))
		for _, m := range index.Manifests {
			out = append(out, m.Platform.Architecture)
			if !slices.Contains(refs, m.Digest.String()) {
				t.Errorf("nothing keeps %s: %v", m.Digest, labels)
			}
		}
		return out
	}
	arm := []ocispec.Platform{{OS: "linux", Architecture: "arm64"}}
	for _, c := range []struct {
		o    archive.ConvertOptions
		want []string
	}{
		{archive.ConvertOptions{OCI: true}, []string{platform()}},
		{archive.ConvertOptions{Layers: new(diff.Zstd), Platforms: arm}, []string{"arm64"}},
		{archive.ConvertOptions{Platforms: append(arm, ocispec.Platform{OS: "linux", Architecture: "amd64"})}, []string{"amd64", "arm64"}},
	} {
		got, err := archive.Convert(e.ctx, e.content, target, c.o)
		if err != nil {
			t.Fatal(err)
		}
		if is := platforms(got); !slices.Equal(is, c.want) {
			t.Errorf("%+v: platforms are %q", c.o, is)
		}
	}
	for _, c := range []struct {
		o    archive.ConvertOptions
		want error
	}{
		{archive.ConvertOptions{OCI: true, AllPlatforms: true}, errdefs.ErrNotFound},
		{archive.ConvertOptions{OCI: true, Platforms: []ocispec.Platform{{OS: "linux", Architecture: "mips"}}}, errdefs.ErrNotFound},
	} {
		if _, err := archive.Convert(e.ctx, e.content, target, c.o); !errors.Is(err, c.want) {
			t.Errorf("%+v: %v", c.o, err)
		}
	}

	// All of it, with what is said about one of the images.
	var index ocispec.Index
	read(t, e, target, &index)
	index.Manifests = slices.DeleteFunc(index.Manifests, func(d ocispec.Descriptor) bool { return d.Platform.Architecture == "s390x" })
	got, err := archive.Convert(e.ctx, e.content, e.putJSON(t, dockerIndex, index), archive.ConvertOptions{OCI: true, AllPlatforms: true})
	if err != nil {
		t.Fatal(err)
	}
	var all ocispec.Index
	read(t, e, got, &all)
	if len(all.Manifests) != 3 || all.MediaType != ocispec.MediaTypeImageIndex || all.Manifests[2].Annotations["vnd.docker.reference.digest"] != all.Manifests[0].Digest.String() {
		t.Errorf("the index is %+v", all)
	}
}

// altered gives a blob with its last byte changed.
type altered struct {
	archive.Content
	which digest.Digest
}

func (a altered) Open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	r, err := a.Content.Open(ctx, d)
	if err != nil || d.Digest != a.which {
		return r, err
	}
	data, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		return nil, err
	}
	data[len(data)-1] ^= 1
	return io.NopCloser(bytes.NewReader(data)), nil
}

// TestConvertRefuses: no image is made of one that is damaged.
func TestConvertRefuses(t *testing.T) {
	e := newEnv(t, false)
	l := layerOf(t, "file")
	layer := e.put(t, ocispec.MediaTypeImageLayer, l)
	image := func(layer ocispec.Descriptor, inside ...[]byte) ocispec.Descriptor {
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{layer}}
		m.SchemaVersion = 2
		m.Config = e.put(t, ocispec.MediaTypeImageConfig, configOf(t, inside...))
		return e.putJSON(t, m.MediaType, m)
	}
	missing := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("nowhere"), Size: 7}
	cut := e.put(t, ocispec.MediaTypeImageLayerGzip, packed(t, diff.Gzip, l)[:40])
	zstd := archive.ConvertOptions{Layers: new(diff.Zstd)}
	for name, c := range map[string]struct {
		content archive.Content
		target  ocispec.Descriptor
		o       archive.ConvertOptions
		want    error
	}{
		"not what the config says": {e.content, image(layer, []byte("x")), zstd, errdefs.ErrInvalidArgument},
		"fewer in the config":      {e.content, image(layer), zstd, errdefs.ErrInvalidArgument},
		"damaged":                  {altered{e.content, layer.Digest}, image(layer, l), zstd, errdefs.ErrFailedPrecondition},
		"cut short":                {e.content, image(cut, l), zstd, errdefs.ErrInvalidArgument},
		"missing":                  {e.content, image(missing, l), zstd, errdefs.ErrNotFound},
		"missing, not packed":      {e.content, image(missing, l), archive.ConvertOptions{OCI: true}, errdefs.ErrNotFound},
		"no image":                 {e.content, layer, zstd, errdefs.ErrInvalidArgument},
	} {
		got, err := archive.Convert(e.ctx, c.content, c.target, c.o)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.target.Digest.String()) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if n := e.ingests(t); n != 0 {
		t.Errorf("%d writes left", n)
	}
}

// TestIndexesInIndexes: an index that stands in others many times costs as much as one, and none may stand too deep.
func TestIndexesInIndexes(t *testing.T) {
	e := newEnv(t, false)
	one := layerOf(t, "file")
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{e.put(t, ocispec.MediaTypeImageLayer, one)}}
	m.SchemaVersion = 2
	m.Config = e.put(t, ocispec.MediaTypeImageConfig, configOf(t, one))
	d := e.putJSON(t, m.MediaType, m)
	d.Platform = &ocispec.Platform{OS: "linux", Architecture: platform()}
	for range 8 {
		index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: slices.Repeat([]ocispec.Descriptor{d}, 20)}
		index.SchemaVersion = 2
		d = e.putJSON(t, index.MediaType, index)
	}
	got, err := archive.Convert(e.ctx, e.content, d, archive.ConvertOptions{Layers: new(diff.Zstd)})
	if err != nil || got.Digest == d.Digest {
		t.Errorf("converted to %+v, %v", got, err)
	}
	if _, err := archive.Tree(e.ctx, e.content, d); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a tree of 20^8 leaves: %v", err)
	}
	deep := e.putJSON(t, ocispec.MediaTypeImageIndex, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d}})
	if _, err := archive.Convert(e.ctx, e.content, deep, archive.ConvertOptions{Layers: new(diff.Zstd)}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("nine deep: %v", err)
	}
	if _, err := archive.Tree(e.ctx, e.content, deep); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("the tree of nine deep: %v", err)
	}
}

// TestTree: all parts are shown, also those that are not there.
func TestTree(t *testing.T) {
	e := newEnv(t, false)
	root, err := archive.Tree(e.ctx, e.content, e.dockerList(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(root.Children) != 4 || !root.Present || root.Children[2].Present || len(root.Children[2].Children) != 0 {
		t.Fatalf("the tree is %+v", root)
	}
	image := root.Children[0]
	if len(image.Children) != 5 || image.Children[0].MediaType != dockerConfig || !image.Children[1].Present || image.Children[4].Present {
		t.Errorf("the first image is %+v", image)
	}
}
