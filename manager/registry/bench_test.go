package registry

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/managerd/managerd/test/regproxy"
)

// BenchmarkFetch compares a blob of 64 MiB as this package reads it, verified and not, with oras-go and with net/http alone.
func BenchmarkFetch(b *testing.B) {
	ctx := context.Background()
	server := regproxy.Start(b, regproxy.Options{})
	r := New(quick())
	b.Cleanup(r.Close)
	repo, err := r.Repository(server.Addr+"/a:b", Options{})
	if err != nil {
		b.Fatal(err)
	}
	layer := random(1, 64<<20)
	desc := describe(ocispec.MediaTypeImageLayer, layer)
	if err := repo.Push(ctx, desc, bytes.NewReader(layer)); err != nil {
		b.Fatal(err)
	}
	oras := &remote.Repository{Reference: registry.Reference{Registry: server.Addr, Repository: "a"}, PlainHTTP: true, Client: http.DefaultClient}
	b.Cleanup(http.DefaultClient.CloseIdleConnections)
	for _, way := range []struct {
		name string
		open func() (io.ReadCloser, error)
	}{
		{"verified", func() (io.ReadCloser, error) { return repo.Fetch(ctx, desc, 0) }},
		{"range", func() (io.ReadCloser, error) { return repo.FetchRange(ctx, desc, 0, desc.Size) }},
		{"oras", func() (io.ReadCloser, error) { return oras.Fetch(ctx, desc) }},
		{"http", func() (io.ReadCloser, error) {
			resp, err := http.Get(server.URL() + "/v2/a/blobs/" + desc.Digest.String())
			if err != nil {
				return nil, err
			}
			return resp.Body, nil
		}},
	} {
		b.Run(way.name, func(b *testing.B) {
			b.SetBytes(desc.Size)
			b.ReportAllocs()
			for range b.N {
				body, err := way.open()
				if err != nil {
					b.Fatal(err)
				}
				if n, err := io.Copy(io.Discard, body); n != desc.Size || err != nil {
					b.Fatal(n, err)
				}
				if err := body.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
