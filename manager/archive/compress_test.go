package archive_test

import (
	"bytes"
	"encoding/json"
	"io"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/manager/snapshots/overlayfs"
)

// TestImportCompressed: plain layers of docker save become gzip layers when that is asked for, a layer that two images have
// one blob; what is inside stays.
func TestImportCompressed(t *testing.T) {
	both(t, func(t *testing.T, e *env) {
		list, err := archive.Import(e.ctx, e.content, e.images, bytes.NewReader(dockerSave(t)), archive.ImportOptions{Compress: true})
		if err != nil {
			t.Fatal(err)
		}
		layers := map[digest.Digest]bool{}
		for _, i := range list {
			r, err := e.content.Open(e.ctx, i.Target)
			if err != nil {
				t.Fatal(err)
			}
			var m ocispec.Manifest
			if err := json.NewDecoder(r).Decode(&m); err != nil {
				t.Fatal(err)
			}
			_ = r.Close()
			for _, l := range m.Layers {
				layers[l.Digest] = true
				if l.MediaType != ocispec.MediaTypeImageLayerGzip {
					t.Errorf("%s: layer of type %s", i.Name, l.MediaType)
				}
				labels, err := e.content.Labels(e.ctx, l.Digest)
				if err != nil || labels[diff.LabelUncompressed] == "" {
					t.Errorf("labels %v, %v", labels, err)
				}
				r, err := e.content.Open(e.ctx, l)
				if err != nil {
					t.Fatal(err)
				}
				plain, kind, err := diff.Decompress(r)
				if err != nil || kind != diff.Gzip {
					t.Fatalf("packed by %q, %v", kind, err)
				}
				data, err := io.ReadAll(plain)
				if got := digest.FromBytes(data); err != nil || got.String() != labels[diff.LabelUncompressed] {
					t.Errorf("inside is %s, %v", got, err)
				}
				_ = r.Close()
			}
			if _, err := archive.Unpack(e.ctx, e.content, e.snapshots(overlayfs.Name), i.Target); err != nil {
				t.Error(err)
			}
		}
		if len(layers) != 2 {
			t.Errorf("%d layers, not 2", len(layers))
		}
	})
}
