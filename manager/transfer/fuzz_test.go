package transfer

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzManifest: a manifest or an index of a stranger is either refused with InvalidArgument, or all that it names can be
// asked for.
func FuzzManifest(f *testing.F) {
	const d = `"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0`
	for _, s := range []string{
		`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json",` + d + `},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar",` + d + `}]}`,
		`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json",` + d + `,"platform":{"os":"linux","architecture":"arm","variant":"v7"}}]}`,
		`{"manifests":[{` + d + `}],"layers":[{"size":-1}],"config":{"digest":"sha256:00"}}`,
		`{"manifests":null,"layers":{}}`, `[]`, `null`, ``, `{"layers":[null]}`, `{"manifests":[{"digest":"md5:x","size":1e99}]}`,
	} {
		f.Add(true, []byte(s))
		f.Add(false, []byte(s))
	}
	f.Fuzz(func(t *testing.T, index bool, data []byte) {
		desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(data), Size: int64(len(data))}
		if index {
			desc.MediaType = ocispec.MediaTypeImageIndex
		}
		n, err := parse(desc, data)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatal(err)
			}
			return
		}
		for _, c := range n.children() {
			if c.Digest.Validate() != nil || c.Size < 0 {
				t.Errorf("%+v was let through", c)
			}
		}
		whole, meta := Image{ManifestLimit: 1, AllMetadata: true}.choice(n)
		if n.manifests != nil && len(whole)+len(meta) != len(n.manifests) {
			t.Errorf("%d and %d of %d manifests", len(whole), len(meta), len(n.manifests))
		}
		for k, v := range n.references() {
			if digest.Digest(v).Validate() != nil {
				t.Errorf("label %s=%q", k, v)
			}
		}
	})
}
