package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// quick is a configuration whose waits a test can afford.
func quick() Config {
	return Config{StallTimeout: 30 * time.Second, MaxRetryAfter: 10 * time.Second, BreakFor: time.Minute, DialTimeout: 10 * time.Second, Attempts: 3}
}

// client is a Registry that is closed with the test.
func client(t *testing.T, cfg Config) *Registry {
	t.Helper()
	r := New(cfg)
	t.Cleanup(r.Close)
	return r
}

// repository is one that there is no error with.
func repository(t *testing.T, r *Registry, ref string, o Options) *Repository {
	t.Helper()
	p, err := r.Repository(ref, o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// random is n bytes that do not compress, the same for each seed.
func random(seed int64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.New(rand.NewSource(seed)).Read(b)
	return b
}

func describe(mediaType string, data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

// picture is a small image, whole.
type picture struct {
	config, layer, manifest ocispec.Descriptor
	data                    map[digest.Digest][]byte
}

func paint(t *testing.T, layer []byte) picture {
	t.Helper()
	config := []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["` + digest.FromBytes(layer).String() + `"]}}`)
	p := picture{config: describe(ocispec.MediaTypeImageConfig, config), layer: describe(ocispec.MediaTypeImageLayer, layer)}
	manifest := encode(t, ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: p.config, Layers: []ocispec.Descriptor{p.layer}})
	p.manifest = describe(ocispec.MediaTypeImageManifest, manifest)
	p.data = map[digest.Digest][]byte{p.config.Digest: config, p.layer.Digest: layer, p.manifest.Digest: manifest}
	return p
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// hang pushes an image.
func (p picture) hang(t *testing.T, repo *Repository) {
	t.Helper()
	for _, d := range []ocispec.Descriptor{p.layer, p.config, p.manifest} {
		if err := repo.Push(context.Background(), d, bytes.NewReader(p.data[d.Digest])); err != nil {
			t.Fatal(err)
		}
	}
}

// all reads content to its end.
func all(repo *Repository, desc ocispec.Descriptor, offset int64) ([]byte, error) {
	r, err := repo.Fetch(context.Background(), desc, offset)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// same is a test of content, without printing megabytes.
func same(t *testing.T, what string, got []byte, err error, want []byte) {
	t.Helper()
	if err != nil {
		t.Errorf("%s: %v", what, err)
	} else if !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes that are not the %d expected", what, len(got), len(want))
	}
}

// hostDir writes files of host directories, "docker.io/hosts.toml" and others.
func hostDir(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
