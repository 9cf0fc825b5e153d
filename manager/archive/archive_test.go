package archive_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/native"
	"github.com/managerd/managerd/manager/snapshots/overlayfs"
	"github.com/managerd/managerd/shimapi/mount"
	"github.com/managerd/managerd/test/image"
)

func TestImportAndUnpack(t *testing.T) {
	for _, c := range []image.Compression{image.None, image.Gzip, image.Zstd} {
		t.Run("c"+string(c), func(t *testing.T) {
			both(t, func(t *testing.T, e *env) {
				name := "example.com/busybox:c" + string(c)
				list, err := archive.Import(e.ctx, e.content, e.images, bytes.NewReader(busybox(t, image.Options{Name: name, Compression: c, Layers: extra})), archive.ImportOptions{Labels: map[string]string{"l": "1"}})
				if err != nil {
					t.Fatal(err)
				}
				if len(list) != 1 || list[0].Name != name {
					t.Fatalf("imported %+v", list)
				}
				img, err := e.names.Get(e.ctx, name)
				if err != nil || img.Target.Digest != list[0].Target.Digest || img.Labels["l"] != "1" {
					t.Fatalf("%+v, %v", img, err)
				}
				var chains []string
				for _, sn := range []string{overlayfs.Name, native.Name} {
					// Twice, and many at once.
					var wg sync.WaitGroup
					var mu sync.Mutex
					for range 4 {
						wg.Go(func() {
							chain, err := archive.Unpack(e.ctx, e.content, e.snapshots(sn), img.Target)
							if err != nil {
								t.Error(err)
							}
							mu.Lock()
							chains = append(chains, chain)
							mu.Unlock()
						})
					}
					wg.Wait()
					s, err := e.store.Snapshotter(sn)
					if err != nil {
						t.Fatal(err)
					}
					if err := s.Walk(e.ctx, filters.Always, func(i snapshots.Info) error {
						if i.Kind == snapshots.Active {
							t.Errorf("%s: %+v was left", sn, i)
						}
						return nil
					}); err != nil {
						t.Fatal(err)
					}
					m, err := s.View(e.ctx, "view"+string(c), chains[0], nil)
					if err != nil {
						t.Fatal(err)
					}
					if err := mount.WithTemp(m, func(root string) error {
						if b, err := os.ReadFile(filepath.Join(root, "data/g")); err != nil || string(b) != "2" {
							t.Errorf("%q, %v", b, err)
						}
						if _, err := os.Lstat(filepath.Join(root, "data/f")); !errors.Is(err, os.ErrNotExist) {
							t.Errorf("data/f: %v", err)
						}
						_, err := os.Stat(filepath.Join(root, "bin/busybox"))
						return err
					}); err != nil {
						t.Error(err)
					}
				}
				for _, chain := range chains {
					if chain != chains[0] {
						t.Errorf("chains: %v", chains)
					}
				}
				labelled(t, e, img.Target, chains[0])
				if n := e.ingests(t); n != 0 {
					t.Errorf("%d ingests were left", n)
				}
			})
		})
	}
}

// labelled checks what the collector needs.
func labelled(t *testing.T, e *env, target ocispec.Descriptor, chain string) {
	t.Helper()
	m, err := e.blobs.Info(e.ctx, target.Digest)
	if err != nil {
		t.Fatal(err)
	}
	var manifest ocispec.Manifest
	read(t, e, target, &manifest)
	if m.Labels["containerd.io/gc.ref.content.config"] != manifest.Config.Digest.String() {
		t.Errorf("manifest: %v", m.Labels)
	}
	for i, l := range manifest.Layers {
		if m.Labels[fmt.Sprint("containerd.io/gc.ref.content.l.", i)] != l.Digest.String() {
			t.Errorf("layer %d: %v", i, m.Labels)
		}
		info, err := e.blobs.Info(e.ctx, l.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if u := info.Labels["containerd.io/uncompressed"]; (u == "") != (l.MediaType == ocispec.MediaTypeImageLayer) {
			t.Errorf("layer %d, %s: uncompressed is %q", i, l.MediaType, u)
		}
	}
	c, err := e.blobs.Info(e.ctx, manifest.Config.Digest)
	if err != nil || c.Labels["containerd.io/gc.ref.snapshot.overlayfs"] != chain || c.Labels["containerd.io/gc.ref.snapshot.native"] != chain {
		t.Errorf("config: %v, %v", c.Labels, err)
	}
}

func read(t *testing.T, e *env, d ocispec.Descriptor, v any) {
	t.Helper()
	r, err := e.content.Open(e.ctx, d)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	if err := json.NewDecoder(r).Decode(v); err != nil {
		t.Fatal(err)
	}
}

func TestImportDocker(t *testing.T) {
	both(t, func(t *testing.T, e *env) {
		var packed bytes.Buffer
		z := gzip.NewWriter(&packed)
		if _, err := z.Write(dockerSave(t)); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		list, err := archive.Import(e.ctx, e.content, e.images, &packed, archive.ImportOptions{Base: "base"})
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, i := range list {
			names = append(names, i.Name)
			chain, err := archive.Unpack(e.ctx, e.content, e.snapshots(overlayfs.Name), i.Target)
			if err != nil {
				t.Fatal(err)
			}
			s, _ := e.store.Snapshotter(overlayfs.Name)
			m, err := s.View(e.ctx, "v"+i.Name, chain, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := mount.WithTemp(m, func(root string) error {
				_, err := os.Stat(filepath.Join(root, "a"))
				return err
			}); err != nil {
				t.Error(err)
			}
		}
		want := []string{"docker.io/library/busybox:one", "example.com/x/y:1", "base@" + list[2].Target.Digest.String()}
		if !slices.Equal(names, want) {
			t.Errorf("names: %q, want %q", names, want)
		}
		var m ocispec.Manifest
		read(t, e, list[0].Target, &m)
		if m.Config.MediaType != ocispec.MediaTypeImageConfig || len(m.Layers) != 2 || m.Layers[0].MediaType != ocispec.MediaTypeImageLayer {
			t.Errorf("%+v", m)
		}
	})
}

func TestNames(t *testing.T) {
	e := newEnv(t, false)
	for _, c := range []struct {
		annotations map[string]string
		want        string
	}{
		{map[string]string{"io.containerd.image.name": "example.com/a:1", ocispec.AnnotationRefName: "x"}, "example.com/a:1"},
		{map[string]string{"io.containerd.image.name": "busybox"}, "docker.io/library/busybox:latest"},
		{map[string]string{ocispec.AnnotationRefName: "v1"}, "base:v1"},
		{map[string]string{ocispec.AnnotationRefName: "quay.io/a/b:2"}, "quay.io/a/b:2"},
		{map[string]string{ocispec.AnnotationRefName: "busybox:2"}, "docker.io/library/busybox:2"},
		{nil, "base@sha256:"},
	} {
		list, err := archive.Import(e.ctx, e.content, e.images, bytes.NewReader(oci(t, c.annotations, nil)), archive.ImportOptions{Base: "base", Index: "all"})
		if err != nil {
			t.Fatal(err)
		}
		if len(list) != 2 || !strings.HasPrefix(list[0].Name, c.want) || list[1].Name != "all" || list[1].Target.MediaType != ocispec.MediaTypeImageIndex {
			t.Errorf("%v: %+v", c.annotations, list)
		}
		if _, err := archive.Unpack(e.ctx, e.content, e.snapshots(overlayfs.Name), list[1].Target); err != nil {
			t.Error(err)
		}
	}
}

func TestImportRefuses(t *testing.T) {
	spoil := func(change func(f *files, m *ocispec.Manifest, d *ocispec.Descriptor)) []byte {
		return oci(t, nil, change)
	}
	whole := oci(t, nil, nil)
	other := digest.FromString("other")
	for name, c := range map[string]struct {
		data  []byte
		want  error
		words string
	}{
		"empty":          {nil, errdefs.ErrInvalidArgument, "no image archive"},
		"no tar":         {bytes.Repeat([]byte("x"), 3000), errdefs.ErrInvalidArgument, "no tar"},
		"no image":       {newFiles(t).add("hello", []byte("x")).bytes(), errdefs.ErrInvalidArgument, "no image archive"},
		"cut short":      {whole[:1500], errdefs.ErrInvalidArgument, "cut short"},
		"cut in a blob":  {whole[:2100], errdefs.ErrInvalidArgument, "cut short"},
		"dot dot":        {newFiles(t).add("../x", []byte("x")).bytes(), errdefs.ErrInvalidArgument, `"../x"`},
		"absolute":       {newFiles(t).add("/x", []byte("x")).bytes(), errdefs.ErrInvalidArgument, `"/x"`},
		"link out":       {newFiles(t).link("x", "../../etc/passwd").bytes(), errdefs.ErrInvalidArgument, "leaves"},
		"absolute link":  {newFiles(t).link("x", "/etc/passwd").bytes(), errdefs.ErrInvalidArgument, "absolute"},
		"blob name":      {newFiles(t).add("blobs/sha256/nonsense", []byte("x")).bytes(), errdefs.ErrInvalidArgument, "none of a blob"},
		"digest":         {newFiles(t).add("blobs/sha256/"+other.Encoded(), []byte("x")).bytes(), errdefs.ErrFailedPrecondition, other.Encoded()},
		"index twice":    {newFiles(t).add("index.json", []byte("{}")).add("index.json", []byte("{}")).bytes(), errdefs.ErrInvalidArgument, "twice"},
		"no layout":      {newFiles(t).add("index.json", []byte("{}")).bytes(), errdefs.ErrInvalidArgument, "oci-layout"},
		"layout version": {newFiles(t).add("index.json", []byte("{}")).add("oci-layout", []byte(`{"imageLayoutVersion":"9"}`)).bytes(), errdefs.ErrInvalidArgument, `"9"`},
		"bad index":      {newFiles(t).add("index.json", []byte("[")).add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)).bytes(), errdefs.ErrInvalidArgument, "index.json"},
		"no images":      {newFiles(t).add("index.json", []byte("{}")).add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)).bytes(), errdefs.ErrInvalidArgument, "no images"},
		"missing layer": {spoil(func(_ *files, m *ocispec.Manifest, d *ocispec.Descriptor) {
			if d == nil {
				m.Layers[0].Digest = other
			}
		}), errdefs.ErrNotFound, other.String()},
		"bad digest": {spoil(func(_ *files, m *ocispec.Manifest, d *ocispec.Descriptor) {
			if d == nil {
				m.Layers[0].Digest = "sha256:../../x"
			}
		}), errdefs.ErrInvalidArgument, "digest"},
		"missing manifest": {spoil(func(_ *files, _ *ocispec.Manifest, d *ocispec.Descriptor) {
			if d != nil {
				d.Digest = other
			}
		}), errdefs.ErrNotFound, other.String()},
		"manifest is a layer": {spoil(func(_ *files, m *ocispec.Manifest, d *ocispec.Descriptor) {
			if d != nil {
				d.Digest, d.Size = m.Layers[0].Digest, m.Layers[0].Size
			}
		}), errdefs.ErrInvalidArgument, "no JSON"},
		"media type": {spoil(func(_ *files, _ *ocispec.Manifest, d *ocispec.Descriptor) {
			if d != nil {
				d.MediaType = "text/plain"
			}
		}), errdefs.ErrInvalidArgument, "text/plain"},
		"huge manifest": {spoil(func(_ *files, _ *ocispec.Manifest, d *ocispec.Descriptor) {
			if d != nil {
				d.Size = 1 << 40
			}
		}), errdefs.ErrInvalidArgument, "maximum"},
		"image name": {oci(t, map[string]string{"io.containerd.image.name": "UPPER//x"}, nil), errdefs.ErrInvalidArgument, "UPPER"},
		"docker, missing layer": {
			newFiles(t).add("c.json", configOf(t, nil)).json("manifest.json", []map[string]any{{"Config": "c.json", "Layers": []string{"no.tar"}}}).bytes(),
			errdefs.ErrInvalidArgument, "no.tar",
		},
		"docker, link loop": {
			newFiles(t).link("a", "b").link("b", "a").add("c.json", configOf(t, nil)).json("manifest.json", []map[string]any{{"Config": "c.json", "Layers": []string{"a"}}}).bytes(),
			errdefs.ErrInvalidArgument, "nowhere",
		},
		"docker, layers": {
			newFiles(t).add("c.json", configOf(t)).add("l", []byte("x")).json("manifest.json", []map[string]any{{"Config": "c.json", "Layers": []string{"l"}}}).bytes(),
			errdefs.ErrInvalidArgument, "0 layers",
		},
		"docker, bad json": {newFiles(t).add("manifest.json", []byte("{")).bytes(), errdefs.ErrInvalidArgument, "manifest.json"},
	} {
		t.Run(name, func(t *testing.T) {
			both(t, func(t *testing.T, e *env) {
				list, err := archive.Import(e.ctx, e.content, e.images, bytes.NewReader(c.data), archive.ImportOptions{})
				if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) {
					t.Errorf("%v, %v\nwant %v with %q", list, err, c.want, c.words)
				}
				if n := e.ingests(t); n != 0 {
					t.Errorf("%d ingests were left", n)
				}
				all, err := e.names.List(e.ctx, filters.Always)
				if err != nil || len(all) != 0 {
					t.Errorf("images: %v, %v", all, err)
				}
			})
		})
	}
}

func TestExport(t *testing.T) {
	both(t, func(t *testing.T, e *env) {
		var list []archive.Image
		for _, name := range []string{"docker.io/library/one:1", "example.com/two:2"} {
			l, err := archive.Import(e.ctx, e.content, e.images, bytes.NewReader(busybox(t, image.Options{Name: name, Compression: image.Gzip, Layers: extra, Env: []string{"N=" + name}})), archive.ImportOptions{})
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, l...)
		}
		var out bytes.Buffer
		if err := archive.Export(e.ctx, e.content, &out, list, archive.ExportOptions{}); err != nil {
			t.Fatal(err)
		}
		seen := map[string]int{}
		var docker []struct{ RepoTags, Layers []string }
		for r := tar.NewReader(bytes.NewReader(out.Bytes())); ; {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if seen[h.Name]++; h.Name == "manifest.json" {
				if err := json.NewDecoder(r).Decode(&docker); err != nil {
					t.Fatal(err)
				}
			}
		}
		for n, times := range seen {
			if times != 1 {
				t.Errorf("%s is there %d times", n, times)
			}
		}
		if len(docker) != 2 || fmt.Sprint(docker[0].RepoTags) != "[one:1]" || fmt.Sprint(docker[1].RepoTags) != "[example.com/two:2]" || len(docker[0].Layers) != 3 {
			t.Errorf("manifest.json: %+v", docker)
		}
		// Into another daemon: the same names for the same digests, by either description.
		for _, only := range []string{"index.json", "manifest.json"} {
			o := newEnv(t, false)
			got, err := archive.Import(o.ctx, o.content, o.images, bytes.NewReader(without(t, out.Bytes(), only)), archive.ImportOptions{})
			if err != nil {
				t.Fatal(only, err)
			}
			if fmt.Sprint(names(got)) != fmt.Sprint(names(list)) {
				t.Errorf("%v, want %v", got, list)
			}
			if only == "manifest.json" && got[1].Target.Digest != list[1].Target.Digest {
				t.Errorf("digest is %s, was %s", got[1].Target.Digest, list[1].Target.Digest)
			}
		}
		err := archive.Export(e.ctx, e.content, io.Discard, []archive.Image{{Name: "x", Target: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x")}}}, archive.ExportOptions{})
		if !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("missing image: %v", err)
		}
	})
}

func names(list []archive.Image) (out []string) {
	for _, i := range list {
		out = append(out, i.Name)
	}
	return out
}

// without copies a tar but for one file.
func without(t *testing.T, data []byte, name string) []byte {
	t.Helper()
	f := newFiles(t)
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return f.bytes()
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Name != name {
			f.add(h.Name, b)
		}
	}
}

// TestPlatforms: of an index, what is there and suits this machine is used.
func TestPlatforms(t *testing.T) {
	e := newEnv(t, false)
	f := newFiles(t)
	f.json("oci-layout", ocispec.ImageLayout{Version: "1.0.0"})
	var index ocispec.Index
	for _, arch := range []string{"s390x", "amd64", "arm64"} {
		l := layerOf(t, arch)
		layer, config := f.blob(l), f.blob(configOf(t, l))
		layer.MediaType, config.MediaType = ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageConfig
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{layer}}
		if arch == "s390x" {
			m.Layers[0].Digest = digest.FromString("not in the archive")
		}
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		d := f.blob(raw)
		d.MediaType, d.Platform = ocispec.MediaTypeImageManifest, &ocispec.Platform{OS: "linux", Architecture: arch}
		index.Manifests = append(index.Manifests, d)
	}
	raw, err := json.Marshal(index)
	if err != nil {
		t.Fatal(err)
	}
	d := f.blob(raw)
	d.MediaType, d.Annotations = ocispec.MediaTypeImageIndex, map[string]string{"io.containerd.image.name": "multi:1"}
	f.json("index.json", ocispec.Index{Manifests: []ocispec.Descriptor{d}})
	list, err := archive.Import(e.ctx, e.content, e.images, bytes.NewReader(f.bytes()), archive.ImportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	chain, err := archive.Unpack(e.ctx, e.content, e.snapshots(overlayfs.Name), list[0].Target)
	if err != nil {
		t.Fatal(err)
	}
	if want := digest.FromBytes(layerOf(t, platform())); chain != want.String() {
		t.Errorf("unpacked %s, want %s", chain, want)
	}
	if err := archive.Export(e.ctx, e.content, io.Discard, list, archive.ExportOptions{}); err != nil {
		t.Error(err)
	}
	if err := archive.Export(e.ctx, e.content, io.Discard, list, archive.ExportOptions{AllPlatforms: true}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("export of a platform that is not there: %v", err)
	}
	named := archive.ExportOptions{Platforms: []ocispec.Platform{{OS: "linux", Architecture: "s390x"}}}
	if err := archive.Export(e.ctx, e.content, io.Discard, list, named); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("export of a platform that is named, and not there: %v", err)
	}
	// A name that is taken gets the labels, and keeps its own.
	for _, label := range []string{"a", "b"} {
		if err := e.images.Put(e.ctx, "multi:1", list[0].Target, map[string]string{label: "1"}); err != nil {
			t.Fatal(err)
		}
	}
	if i, err := e.names.Get(e.ctx, "multi:1"); err != nil || i.Labels["a"] != "1" || i.Labels["b"] != "1" {
		t.Errorf("labels are %v, %v", i.Labels, err)
	}
}
