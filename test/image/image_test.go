package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"path"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestLayout reads the tar back: every blob is what its name says, and index, manifest, config and layers agree.
func TestLayout(t *testing.T) {
	for _, c := range []Compression{None, Gzip, Zstd} {
		t.Run("compression="+string(c), func(t *testing.T) {
			o := Options{
				Name: "example.org/a/b:v1", Compression: c,
				Layers: [][]File{{{Name: "etc/motd", Body: "hi", Mode: 0o644}}, {{Name: "etc/.wh.motd"}, {Name: "d", Mode: fs.ModeDir | 0o700}}},
			}
			var a, b bytes.Buffer
			if err := WriteTo(&a, o); err != nil {
				t.Fatal(err)
			}
			if err := WriteTo(&b, o); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(a.Bytes(), b.Bytes()) {
				t.Error("the same options gave two different images")
			}
			files := read(t, &a)
			var index ocispec.Index
			decode(t, files["index.json"], &index)
			if got := index.Manifests[0].Annotations["io.containerd.image.name"]; got != o.Name {
				t.Errorf("name is %q", got)
			}
			if got := index.Manifests[0].Annotations[ocispec.AnnotationRefName]; got != "v1" {
				t.Errorf("ref name is %q", got)
			}
			var m ocispec.Manifest
			decode(t, blob(t, files, index.Manifests[0]), &m)
			var config ocispec.Image
			decode(t, blob(t, files, m.Config), &config)
			if len(m.Layers) != 3 || len(config.RootFS.DiffIDs) != 3 {
				t.Fatalf("%d layers, %d diff ids, want 3", len(m.Layers), len(config.RootFS.DiffIDs))
			}
			for i, l := range m.Layers {
				data := blob(t, files, l)
				if c == None && digest.FromBytes(data) != config.RootFS.DiffIDs[i] {
					t.Errorf("layer %d is not its diff id", i)
				}
			}
		})
	}
}

func read(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if out[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
}

func blob(t *testing.T, files map[string][]byte, d ocispec.Descriptor) []byte {
	t.Helper()
	data, ok := files[path.Join("blobs/sha256", d.Digest.Encoded())]
	if !ok || int64(len(data)) != d.Size || digest.FromBytes(data) != d.Digest {
		t.Fatalf("blob %s is missing or not what its descriptor says", d.Digest)
	}
	return data
}

func decode(t *testing.T, data []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatal(err)
	}
}
