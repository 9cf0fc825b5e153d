package command_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/test/regproxy"
)

// multi writes an archive with an image multi:1 for these platforms of Linux, without layers.
func multi(t *testing.T, archs ...string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(name, mediaType string, v any) ocispec.Descriptor {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		if name == "" {
			name = "blobs/sha256/" + d.Digest.Encoded()
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: d.Size}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
		return d
	}
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	index.SchemaVersion = 2
	for _, arch := range archs {
		p := ocispec.Platform{OS: "linux", Architecture: arch}
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
		m.SchemaVersion = 2
		m.Config = add("", ocispec.MediaTypeImageConfig, ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers"}})
		d := add("", m.MediaType, m)
		d.Platform = &p
		index.Manifests = append(index.Manifests, d)
	}
	d := add("", index.MediaType, index)
	d.Annotations = map[string]string{"io.containerd.image.name": "multi:1"}
	add("index.json", "", ocispec.Index{Manifests: []ocispec.Descriptor{d}})
	add("oci-layout", "", ocispec.ImageLayout{Version: "1.0.0"})
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "multi.tar")
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestPlatforms: what is done with an image for several platforms is done for those that are named.
func TestPlatforms(t *testing.T) {
	w := newWorld(t)
	file := multi(t, "amd64", "arm64", "s390x")
	w.ok("images", "import", "--label", "k=v", "--no-unpack", file)
	const name = "docker.io/library/multi:1"
	if out := w.ok("images", "ls", "-q", "labels.k==v"); out != name+"\n" {
		t.Errorf("labelled: %q", out)
	}
	platforms := func(name string) (out []string) {
		for _, p := range w.inspect(name).Children {
			if p.Present {
				out = append(out, p.Platform)
			}
		}
		return out
	}
	w.ok("images", "convert", "--platform", "linux/arm64", "--platform", "linux/s390x", name, "local/two:1")
	if got := platforms("local/two:1"); !slices.Equal(got, []string{"linux/arm64", "linux/s390x"}) {
		t.Errorf("converted for %q", got)
	}
	w.ok("images", "convert", "--all-platforms", "--uncompress", name, "local/all:1")
	if got := platforms("local/all:1"); len(got) != 3 {
		t.Errorf("converted for %q", got)
	}
	w.fails(1, []string{name, "not found"}, "images", "convert", "--platform", "linux/mips", name, "local/none:1")

	out := filepath.Join(t.TempDir(), "out.tar")
	w.ok("images", "export", "--platform", "linux/s390x", out, name)
	w.ok("images", "rm", "--sync", name, "local/two:1", "local/all:1")
	w.ok("images", "import", "--no-unpack", out)
	if got := platforms(name); !slices.Equal(got, []string{"linux/s390x"}) {
		t.Errorf("exported for %q", got)
	}
	w.fails(1, []string{"not found"}, "images", "export", "--platform", "linux/arm64", out, name)
	w.fails(2, []string{"linux/a/b/c"}, "images", "export", "--platform", "linux/a/b/c", out, name)
	for _, args := range [][]string{{"export", "--platform", "linux/arm64", "--all-platforms", out, name}, {"convert", "--platform", "linux/arm64", "--all-platforms", name, "x:1"}} {
		w.fails(2, []string{"--platform", "--all-platforms"}, append([]string{"images"}, args...)...)
	}
}

// TestImportNames: names by digest, and unpacking for the platforms that are named.
func TestImportNames(t *testing.T) {
	w := newWorld(t)
	w.ok("images", "rm", "--sync", busybox)
	file := multi(t, "amd64", "arm64")
	names := func(flags ...string) []string {
		w.ok(append(append([]string{"images", "import", "--no-unpack", "--base-name", "local/x"}, flags...), file)...)
		got := strings.Fields(w.ok("images", "ls", "-q"))
		w.ok(append([]string{"images", "rm", "--sync"}, got...)...)
		slices.Sort(got)
		return got
	}
	const name = "docker.io/library/multi:1"
	if got := names("--digests"); len(got) != 2 || got[0] != name || !strings.HasPrefix(got[1], "local/x@sha256:") {
		t.Errorf("--digests: %q", got)
	}
	if got := names("--digests", "--skip-digest-for-named"); !slices.Equal(got, []string{name}) {
		t.Errorf("--skip-digest-for-named: %q", got)
	}
	w.fails(2, []string{"--digests"}, "images", "import", "--skip-digest-for-named", file)
	if out := w.ok("images", "import", "--all-platforms", "--platform", "linux/arm64", "--platform", "linux/amd64", file); !strings.Contains(out, "unpacked") {
		t.Errorf("import says %q", out)
	}
	w.fails(1, []string{name, "linux/mips"}, "images", "import", "--platform", "linux/mips", file)
}

// TestMetadataOnly: the manifests and configs for all platforms come from a registry, and no layers.
func TestMetadataOnly(t *testing.T) {
	w := newWorld(t)
	server := regproxy.Start(t, regproxy.Options{})
	w.ok("images", "import", "--no-unpack", multi(t, "amd64", "arm64", "s390x"))
	several, one := server.Addr+"/several:1", server.Addr+"/one:1"
	w.loud("images", "push", "--plain-http", several, "docker.io/library/multi:1")
	w.loud("images", "push", "--plain-http", one, busybox)
	w.ok("images", "rm", "--sync", "docker.io/library/multi:1", busybox)
	for name, blobs := range map[string]int{several: 7, one: 2} {
		out := w.loud("content", "fetch", "--metadata-only", "--plain-http", "--label", "k=v", name)
		if got := strings.Fields(w.ok("content", "ls", "-q")); len(got) != blobs || !strings.Contains(out, name+" sha256:") {
			t.Errorf("%s: %d blobs, not %d: %s", name, len(got), blobs, out)
		}
		if got := w.ok("images", "ls", "-q", "labels.k==v"); got != name+"\n" {
			t.Errorf("labelled: %q", got)
		}
		w.ok("content", "prune", "references") // what is referred to stays
		if got := strings.Fields(w.ok("content", "ls", "-q")); len(got) != blobs {
			t.Errorf("%s: %d blobs are left of %d", name, len(got), blobs)
		}
		w.ok("images", "rm", "--sync", name)
		if got := w.ok("content", "ls", "-q"); got != "" {
			t.Errorf("%s leaves %s", name, got)
		}
	}
	if _, errs, status := w.mctl("content", "fetch", "--metadata-only", "--plain-http", server.Addr+"/nothing:1"); status != 1 || !strings.Contains(errs, "404") {
		t.Errorf("an image that there is not: %d, %s", status, errs)
	}
	if got := w.ok("leases", "ls", "-q"); got != "" {
		t.Errorf("leases are left: %s", got)
	}
}
