package chaos

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/test/harness"
)

// shelf is a registry of one image: what is asked for by digest or by tag, as a registry answers it.
type shelf struct {
	blobs  map[string][]byte // by digest, and the manifest by its tag too
	kinds  map[string]string
	layers []digest.Digest
}

func newShelf(content string) (*shelf, error) {
	s := &shelf{blobs: map[string][]byte{}, kinds: map[string]string{}}
	var packed bytes.Buffer
	zip, sum := gzip.NewWriter(&packed), sha256.New()
	w := tar.NewWriter(io.MultiWriter(zip, sum))
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "file", Mode: 0o644, Size: int64(len(content))})
	if err == nil {
		_, err = io.WriteString(w, content)
	}
	if err := errors.Join(err, w.Close(), zip.Close()); err != nil {
		return nil, err
	}
	layer := s.put(ocispec.MediaTypeImageLayerGzip, packed.Bytes())
	s.layers = append(s.layers, layer.Digest)
	config, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.NewDigest(digest.SHA256, sum)}},
	})
	if err != nil {
		return nil, err
	}
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: s.put(ocispec.MediaTypeImageConfig, config), Layers: []ocispec.Descriptor{layer},
	})
	if err != nil {
		return nil, err
	}
	top := s.put(ocispec.MediaTypeImageManifest, manifest)
	s.blobs["latest"], s.kinds["latest"] = manifest, top.MediaType
	return s, nil
}

func (s *shelf) put(mediaType string, data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	s.blobs[d.String()], s.kinds[d.String()] = data, mediaType
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

func (s *shelf) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	data, there := s.blobs[name]
	if !there {
		if r.URL.Path != "/v2/" {
			http.NotFound(w, r)
		}
		return
	}
	w.Header().Set("Content-Type", s.kinds[name])
	w.Header().Set("Docker-Content-Digest", digest.FromBytes(data).String())
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
}

// pull pulls an image that nobody has, and removes it.
func (r *run) pull() error {
	s, err := newShelf("of " + r.id)
	if err != nil {
		return err
	}
	server := httptest.NewServer(s)
	defer server.Close()
	ref := strings.TrimPrefix(server.URL, "http://") + "/" + r.id + ":latest"
	command := func(args ...string) error {
		out, err := harness.Output(r.d.Mctl(args...))
		if err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return nil
	}
	for deadline := time.Now().Add(patience); ; {
		if err = command("images", "pull", ref); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return err
		}
	}
	if err := command("images", "check", "name=="+ref); err != nil {
		return err
	}
	if err := command("content", "get", s.layers[0].String()); err != nil {
		return err
	}
	return command("images", "rm", "--sync", ref)
}
