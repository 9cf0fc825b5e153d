package diff_test

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/diff"
)

// TestLimits: a layer that becomes too much is given up, wherever that is.
func TestLimits(t *testing.T) {
	// 1.2 GiB of zeros behind the archive, in some KiB.
	var bomb bytes.Buffer
	z, err := zstd.NewWriter(&bomb)
	if err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 1<<20)
	parts := []io.Reader{bytes.NewReader(layerTar(t, "f"))}
	for range 1200 {
		parts = append(parts, bytes.NewReader(zeros))
	}
	if _, err := io.Copy(z, io.MultiReader(parts...)); err != nil || z.Close() != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		data   []byte
		limits diff.Limits
		want   string // "": it is applied
	}{
		"ratio":         {bomb.Bytes(), diff.Limits{Ratio: 1000}, "more than 1000 times as many (max_layer_ratio)"},
		"bytes":         {bomb.Bytes(), diff.Limits{Bytes: 10 << 20}, "more than 10485760 bytes when it is unpacked"},
		"entries":       {gz(t, layerTar(t, "f", "g")), diff.Limits{Entries: 1}, "more than 1 entries"},
		"ratio, small":  {gz(t, append(layerTar(t, "f"), zeros...)), diff.Limits{Ratio: 2, Bytes: 10 << 20, Entries: 10}, ""},
		"without limit": {gz(t, layerTar(t, "f")), diff.Limits{}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			blobs := newBlobs()
			_, err := diff.Apply(t.Context(), blobs, blobs.add(ocispec.MediaTypeImageLayerZstd, c.data), bind(t.TempDir()), diff.ApplyOptions{Limits: c.limits})
			if c.want == "" && err != nil || c.want != "" && (!errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), c.want)) {
				t.Error(err)
			}
		})
	}
}
