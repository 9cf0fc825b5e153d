package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/test/harness"
)

// nested is the archive of an image in indexes: levels of them, each of which names the next one width times.
func nested(t *testing.T, levels, width int) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	file := func(name string, data []byte) {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	blob := func(mediaType string, data []byte) ocispec.Descriptor {
		d := digest.FromBytes(data)
		file("blobs/sha256/"+d.Encoded(), data)
		return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
	}
	text := func(v any) []byte {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	var empty bytes.Buffer
	if err := tar.NewWriter(&empty).Close(); err != nil {
		t.Fatal(err)
	}
	layer := blob(ocispec.MediaTypeImageLayer, empty.Bytes())
	config := blob(ocispec.MediaTypeImageConfig, text(ocispec.Image{Platform: platforms.DefaultSpec(), RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.Digest}}}))
	d := blob(ocispec.MediaTypeImageManifest, text(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{layer}}))
	for range levels {
		d = blob(ocispec.MediaTypeImageIndex, text(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: slices.Repeat([]ocispec.Descriptor{d}, width)}))
	}
	d.Annotations = map[string]string{"io.containerd.image.name": "example.org/nested:1"}
	file("oci-layout", text(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}))
	file("index.json", text(ocispec.Index{Manifests: []ocispec.Descriptor{d}}))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "nested.tar")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestNestedIndexes: an index that names the next one a thousand times, and that the next, is an image as any other, from
// its import to its end; indexes that are deeper than any image has them are refused.
func TestNestedIndexes(t *testing.T) {
	const name = "example.org/nested:1"
	u := newUser(t)
	before := u.mctl("content", "ls", "-q")
	for _, path := range []string{nested(t, 40, 2), nested(t, 100, 1)} {
		_, err := harness.Output(u.Mctl("images", "import", path))
		if err == nil {
			t.Fatal("it is imported")
		}
		has(t, err.Error(), "more than 8 deep")
	}
	u.mctl("images", "import", nested(t, 8, 1000))
	has(t, u.mctl("images", "ls"), name)
	check := row(t, u.mctl("images", "check"), name)
	has(t, strings.Join(check, " "), "complete")
	u.mctl("images", "usage", "name=="+name)
	u.mctl("images", "export", filepath.Join(t.TempDir(), "out.tar"), name)
	u.mctl("images", "convert", "--zstd", name, "example.org/converted:1")
	u.mctl("images", "rm", "--sync", name, "example.org/converted:1")
	u.mctl("content", "prune")
	for _, d := range strings.Fields(u.mctl("content", "ls", "-q")) {
		if !strings.Contains(before, d) {
			t.Errorf("content %s was left", d)
		}
	}
}
