package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// modern is a registry with the referrers API of OCI's distribution spec 1.1, or without, and how often it was asked for
// something. One that is whole says of a manifest that it has noted its subject.
func modern(t *testing.T, api, whole bool) (addr string, asked func(method, path string) int) {
	t.Helper()
	s := ggcr.New(ggcr.WithReferrersSupport(api), ggcr.Logger(log.New(io.Discard, "", 0)))
	var mu sync.Mutex
	seen := map[string]int{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen[r.Method+" "+r.URL.Path]++
		mu.Unlock()
		if body, err := io.ReadAll(r.Body); err == nil {
			r.Body = io.NopCloser(bytes.NewReader(body))
			var m ocispec.Manifest
			if whole && r.Method == http.MethodPut && json.Unmarshal(body, &m) == nil && m.Subject != nil {
				w.Header().Set("OCI-Subject", m.Subject.Digest.String())
			}
		}
		s.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://"), func(method, path string) (n int) {
		mu.Lock()
		defer mu.Unlock()
		for asked, times := range seen {
			if m, p, _ := strings.Cut(asked, " "); m == method && strings.Contains(p, path) {
				n += times
			}
		}
		return n
	}
}

// TestReferrers: what refers to an image is listed by the API of a registry that has one, by the fallback tag where it has
// none or does not tell of it, and a push makes that tag only there.
func TestReferrers(t *testing.T) {
	for name, c := range map[string]struct{ api, whole, tagged bool }{
		"API": {true, true, false}, "API that does not say so": {true, false, true}, "tag": {false, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			addr, asked := modern(t, c.api, c.whole)
			r := client(t, quick())
			repo := repository(t, r, addr+"/some/where:v1", Options{})
			image := paint(t, random(40, 1000))
			image.hang(t, repo)
			if got, err := repo.Referrers(ctx, image.manifest.Digest, ""); err != nil || len(got) != 0 {
				t.Errorf("before there is one: %+v, %v", got, err)
			}
			want := map[string]ocispec.Descriptor{}
			for _, kind := range []string{"application/x.signature", "application/x.sbom"} {
				config := image.config
				config.MediaType = kind // by which this registry knows the artifact's type
				data := encode(t, ocispec.Manifest{
					Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: kind,
					Config: config, Layers: []ocispec.Descriptor{image.layer}, Subject: &image.manifest, Annotations: map[string]string{"who": kind},
				})
				d := describe(ocispec.MediaTypeImageManifest, data)
				if err := repository(t, r, addr+"/some/where@"+d.Digest.String(), Options{}).Push(ctx, d, bytes.NewReader(data)); err != nil {
					t.Fatal(err)
				}
				want[kind] = d
			}
			for kind, d := range want {
				got, err := repo.Referrers(ctx, image.manifest.Digest, kind)
				if err != nil || len(got) != 1 || got[0].Digest != d.Digest || got[0].Size != d.Size || got[0].ArtifactType != kind || got[0].Annotations["who"] != kind {
					t.Errorf("%s: %+v, %v", kind, got, err)
				}
			}
			if got, err := repo.Referrers(ctx, image.manifest.Digest, ""); err != nil || len(got) != len(want) {
				t.Errorf("all: %+v, %v", got, err)
			}
			if got, err := repo.Referrers(ctx, image.manifest.Digest, "application/x.other"); err != nil || len(got) != 0 {
				t.Errorf("of another kind: %+v, %v", got, err)
			}
			fallback := "/manifests/" + strings.Replace(image.manifest.Digest.String(), ":", "-", 1)
			if n := asked("PUT", fallback); (n > 0) != c.tagged {
				t.Errorf("the fallback tag was written %d times", n)
			}
			if n := asked("GET", "/referrers/"); n == 0 {
				t.Error("the API was not asked")
			}
		})
	}
}
