package transfer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/snapshots/native"
)

// TestPull: an image of several layers, one of them large, is there with its labels, unpacked, and named.
func TestPull(t *testing.T) {
	e := newEnv(t, content.Shared)
	b := e.reg.image("a/b:latest", platforms.DefaultSpec(), 1, 1000, 1<<20, 1000)
	told, err := e.pull(e.ctx, "a/b:latest", Image{Labels: map[string]string{"x": "y"}, Unpacks: unpackHere()})
	if err != nil {
		t.Fatal(err)
	}
	i, err := e.cfg.Images.Get(e.ctx, e.name("a/b:latest"))
	if err != nil || i.Target.Digest != b.manifest.Digest || i.Labels["x"] != "y" {
		t.Errorf("%+v, %v", i, err)
	}
	chain := identity.ChainID(append([]digest.Digest{}, b.ids...))
	source := labelSource + e.reg.host
	for d, want := range map[digest.Digest]map[string]string{
		b.manifest.Digest: {
			labelConfig: b.config.Digest.String(), labelLayer + "0": b.layers[0].Digest.String(),
			labelLayer + "1": b.layers[1].Digest.String(), labelLayer + "2": b.layers[2].Digest.String(), source: "a/b",
		},
		b.config.Digest:    {"containerd.io/gc.ref.snapshot.native": chain.String(), source: "a/b"},
		b.layers[1].Digest: {"containerd.io/uncompressed": b.ids[1].String(), source: "a/b"},
	} {
		if got := e.labels(d); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("labels of %s: %v, not %v", d, got, want)
		}
	}
	s, err := e.cfg.Snapshots.Snapshotter(native.Name)
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := s.View(e.ctx, "look", chain.String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(filepath.Join(mounts[0].Source, "f2")); err != nil || fi.Size() != 1<<20 {
		t.Errorf("%v, %v", fi, err)
	}
	if n := e.reg.requests[b.layers[1].Digest]; n < 4 {
		t.Errorf("the large layer came by %d requests", n)
	}
	for _, l := range b.layers {
		p := told["layer-"+l.Digest.String()]
		if p.Event != eventExtracted || p.Progress != l.Size || p.Total != l.Size || len(p.Parents) != 1 || p.Parents[0] != "manifest-"+b.manifest.Digest.String() {
			t.Errorf("%+v", p)
		}
		if n := e.reg.bytes(l.Digest); n != l.Size {
			t.Errorf("%d bytes of %s came, it has %d", n, l.Digest, l.Size)
		}
	}
	if p := told["manifest-"+b.manifest.Digest.String()]; p.Event != eventComplete || p.Parents[0] != e.name("a/b:latest") {
		t.Errorf("%+v", p)
	}
	if told[e.name("a/b:latest")].Event != "saved" || !strings.HasPrefix(told[""].Event, "Completed pull from OCI Registry (") {
		t.Errorf("%+v, %+v", told[e.name("a/b:latest")], told[""])
	}
	e.clean(0)

	// Again, from another repository: nothing comes twice.
	e.reg.tags["c/d:1"] = b.manifest.Digest
	if told, err = e.pull(e.ctx, "c/d:1", Image{}); err != nil {
		t.Fatal(err)
	}
	if p := told["layer-"+b.layers[1].Digest.String()]; p.Event != eventExists || e.reg.bytes(b.layers[1].Digest) != b.layers[1].Size {
		t.Errorf("%+v, %d bytes", p, e.reg.bytes(b.layers[1].Digest))
	}
	if got := e.labels(b.layers[1].Digest)[source]; got != "a/b,c/d" {
		t.Errorf("source %q", got)
	}
}

// TestPullApplies: a layer is unpacked before all of it, and of those above it, has come.
func TestPullApplies(t *testing.T) {
	e := newEnv(t, content.Shared)
	b := e.reg.image("a:1", platforms.DefaultSpec(), 10, 100_000, 500_000)
	unpacked := make(chan struct{})
	var once sync.Once
	e.reg.serve = func(w http.ResponseWriter, r *http.Request, d digest.Digest, data []byte) bool {
		if d != b.layers[1].Digest || strings.HasPrefix(r.Header.Get("Range"), "bytes=0-") {
			return false
		}
		// The end of the upper layer comes only when the lower one is a snapshot.
		s, err := e.cfg.Snapshots.Snapshotter(native.Name)
		if err != nil {
			return false
		}
		for r.Context().Err() == nil {
			if _, err := s.Stat(e.ctx, b.ids[0].String()); err == nil {
				once.Do(func() { close(unpacked) })
				return false
			}
		}
		return true
	}
	if _, err := e.pull(e.ctx, "a:1", Image{Unpacks: unpackHere()}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-unpacked:
	default:
		t.Error("nothing was held back: the test shows nothing")
	}
	e.clean(0)
}

// TestPullResumes: what a connection brought before it broke is not asked for again, nor is there an image of a part.
func TestPullResumes(t *testing.T) {
	e := newEnv(t, content.Shared)
	b := e.reg.image("a:1", platforms.DefaultSpec(), 20, 1000, 2_000_000)
	large := b.layers[1]
	e.reg.serve = firstBytes(large.Digest, 700_000)
	if _, err := e.pull(e.ctx, "a:1", Image{Unpacks: unpackHere()}); err == nil || !strings.Contains(err.Error(), large.Digest.String()) {
		t.Fatalf("%v", err)
	}
	if _, err := e.cfg.Images.Get(e.ctx, e.name("a:1")); !errdefs.IsNotFound(err) {
		t.Errorf("an image of a part: %v", err)
	}
	st, err := e.cfg.Content.Status(e.ctx, "layer-"+large.Digest.String())
	if err != nil || st.Offset < 600_000 || st.Total != large.Size {
		t.Errorf("%+v, %v", st, err)
	}
	if kept := e.leases(1); !slices.Contains(kept, "content "+b.layers[0].Digest.String()) || !slices.Contains(kept, "ingests layer-"+large.Digest.String()) {
		t.Errorf("for the next attempt only %v is kept", kept)
	}
	// As a daemon leaves it that was killed while it unpacked.
	if _, err := e.cfg.Leases.Create(e.ctx, e.killed(), nil); err != nil {
		t.Fatal(err)
	}
	half := leases.Resource{ID: "extract-1 x", Type: leases.Snapshots + native.Name}
	if err := e.cfg.Leases.AddResource(e.ctx, e.killed(), half); err != nil {
		t.Fatal(err)
	}
	e.reg.serve = func(_ http.ResponseWriter, _ *http.Request, d digest.Digest, _ []byte) bool {
		if held, err := e.cfg.Leases.ListResources(e.ctx, e.killed()); d == large.Digest && (err != nil || len(held) > 0) {
			t.Errorf("a snapshot that nobody unpacks into is kept: %v, %v", held, err)
		}
		return false
	}
	if _, err := e.pull(e.ctx, "a:1", Image{Unpacks: unpackHere()}); err != nil {
		t.Fatal(err)
	}
	if again := e.reg.bytes(large.Digest) - large.Size; again > 100_000 {
		t.Errorf("%d bytes came twice", again)
	}
	e.clean(0)
}

// killed is a lease of an earlier pull of the image a:1.
func (e *env) killed() string {
	sum := sha256.Sum256([]byte("pull " + e.name("a:1")))
	return "transfer-" + hex.EncodeToString(sum[:8]) + "-killed"
}

// TestPullOnce: several pulls at the same time, of several namespaces, fetch a blob once.
func TestPullOnce(t *testing.T) {
	for _, c := range []struct {
		policy string
		times  int64
	}{{content.Shared, 1}, {content.Isolated, 3}} {
		t.Run(c.policy, func(t *testing.T) {
			e := newEnv(t, c.policy)
			b := e.reg.image("a:1", platforms.DefaultSpec(), 30, 1000, 1_000_000)
			var pulls sync.WaitGroup
			for i := range 9 {
				pulls.Go(func() {
					ctx := namespaces.With(e.ctx, fmt.Sprintf("n%d", i%3))
					if _, err := e.pull(ctx, "a:1", Image{Unpacks: unpackHere()}); err != nil {
						t.Error(err)
					}
				})
			}
			pulls.Wait()
			for _, l := range b.layers {
				if n := e.reg.bytes(l.Digest); n != c.times*l.Size {
					t.Errorf("%d bytes of a layer of %d came, not %d times", n, l.Size, c.times)
				}
				for i := range 3 {
					if !e.here(namespaces.With(e.ctx, fmt.Sprintf("n%d", i)), l) {
						t.Errorf("namespace n%d lacks a layer", i)
					}
				}
			}
			for i := range 3 {
				e.ctx = namespaces.With(e.ctx, fmt.Sprintf("n%d", i))
				e.clean(0)
			}
		})
	}
}

// TestPullMends: blobs whose files are lost come again with the next pull, and those alone.
func TestPullMends(t *testing.T) {
	dir := t.TempDir()
	e := newEnvIn(t, content.Shared, dir)
	b := e.reg.image("a:1", platforms.DefaultSpec(), 1, 1000, 2000, 1_000_000)
	pull := func() {
		t.Helper()
		if _, err := e.pull(e.ctx, "a:1", Image{Unpacks: unpackHere()}); err != nil {
			t.Fatal(err)
		}
	}
	pull()
	lost := []ocispec.Descriptor{b.manifest, b.config, b.layers[1], b.layers[2]}
	for _, d := range lost {
		found, err := filepath.Glob(filepath.Join(dir, "*", "blobs", "sha256", d.Digest.Encoded()))
		if err != nil || len(found) != 1 {
			t.Fatalf("%v, %v", found, err)
		}
		if err := os.Remove(found[0]); err != nil {
			t.Fatal(err)
		}
	}
	pull()
	for _, d := range lost {
		r, err := e.cfg.Content.ReaderAt(e.ctx, d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		_ = r.Close()
	}
	for i, times := range []int64{1, 2, 2} {
		if n := e.reg.bytes(b.layers[i].Digest); n != times*b.layers[i].Size {
			t.Errorf("%d bytes of layer %d of %d came, not %d times", n, i, b.layers[i].Size, times)
		}
	}
}

// TestPullHandsOver: when the client that fetches a blob goes away, the others get it all the same.
func TestPullHandsOver(t *testing.T) {
	e := newEnv(t, content.Shared)
	b := e.reg.image("a:1", platforms.DefaultSpec(), 40, 1_000_000)
	first, cancel := context.WithCancel(e.ctx)
	release, started := make(chan struct{}), make(chan struct{}, 100)
	e.reg.serve = func(_ http.ResponseWriter, r *http.Request, d digest.Digest, _ []byte) bool {
		if d == b.layers[0].Digest {
			started <- struct{}{}
			select {
			case <-release:
			case <-r.Context().Done():
			}
		}
		return false
	}
	var pulls sync.WaitGroup
	pulls.Go(func() {
		if _, err := e.pull(first, "a:1", Image{}); err == nil {
			t.Error("a pull that was cancelled went well")
		}
	})
	<-started
	ctx := namespaces.With(e.ctx, "other")
	pulls.Go(func() {
		if _, err := e.pull(ctx, "a:1", Image{Unpacks: unpackHere()}); err != nil {
			t.Error(err)
		}
	})
	key := b.layers[0].Digest.String()
	for joined := false; !joined; {
		e.flights.mu.Lock()
		joined = e.flights.all[key] != nil && e.flights.all[key].wanted == 2
		e.flights.mu.Unlock()
	}
	cancel()
	close(release)
	pulls.Wait()
	if n := e.reg.bytes(b.layers[0].Digest); n != b.layers[0].Size {
		t.Errorf("%d bytes came of %d", n, b.layers[0].Size)
	}
	e.leases(1) // of the pull that was cancelled
}

// TestPullPlatforms: which parts of an index come.
func TestPullPlatforms(t *testing.T) {
	for _, c := range []struct {
		name       string
		image      Image
		full, meta string // of amd, arm
		err        string
	}{
		{"all", Image{}, "amd arm", "", ""},
		{"one", Image{Platforms: []ocispec.Platform{arm}}, "arm", "", ""},
		{"one, all metadata", Image{Platforms: []ocispec.Platform{arm}, AllMetadata: true}, "arm", "amd", ""},
		{"the best", Image{Platforms: []ocispec.Platform{arm, amd}, ManifestLimit: 1}, "arm", "", ""},
		{"the best, all metadata", Image{ManifestLimit: 1, Platforms: []ocispec.Platform{amd, arm}, AllMetadata: true}, "amd", "arm", ""},
		{"none there", Image{Platforms: []ocispec.Platform{{OS: "linux", Architecture: "s390x"}}}, "", "", "no image for linux/s390x"},
		{"none to unpack", Image{Unpacks: []Unpack{{ocispec.Platform{OS: "linux", Architecture: "s390x"}, native.Name}}}, "amd arm", "", "no image for linux/s390x that could be unpacked"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newEnv(t, content.Shared)
			parts := map[string]built{"amd": e.reg.image("", amd, 50, 100), "arm": e.reg.image("", arm, 51, 100)}
			index := e.reg.index("a:1", parts["amd"].manifest, parts["arm"].manifest)
			_, err := e.pull(e.ctx, "a:1", c.image)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) || !errdefs.IsNotFound(err) {
					t.Fatal(err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for name, p := range parts {
				full, meta := strings.Contains(c.full, name), strings.Contains(c.meta, name)
				if e.here(e.ctx, p.manifest) != (full || meta) || e.here(e.ctx, p.config) != (full || meta) || e.here(e.ctx, p.layers[0]) != full {
					t.Errorf("%s: manifest %v, config %v, layer %v", name, e.here(e.ctx, p.manifest), e.here(e.ctx, p.config), e.here(e.ctx, p.layers[0]))
				}
			}
			if l := e.labels(index.Digest); l[labelManifest+"0"] != parts["amd"].manifest.Digest.String() || l[labelManifest+"1"] != parts["arm"].manifest.Digest.String() {
				t.Errorf("%v", l)
			}
		})
	}
}

// TestPullDocker: Docker's media types, and a layer that no registry has.
func TestPullDocker(t *testing.T) {
	e := newEnv(t, content.Shared)
	data, id := layer(60, 100)
	config := e.reg.add("application/vnd.docker.container.image.v1+json", fmt.Appendf(nil, `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[%q]}}`, id))
	foreign := ocispec.Descriptor{MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Digest: digest.FromString("far away"), Size: 8}
	m := e.reg.manifest("", "application/vnd.docker.distribution.manifest.v2+json", ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: "application/vnd.docker.distribution.manifest.v2+json", Config: config,
		Layers: []ocispec.Descriptor{foreign, e.reg.add("application/vnd.docker.image.rootfs.diff.tar.gzip", data)},
	})
	e.reg.manifest("a:1", "application/vnd.docker.distribution.manifest.list.v2+json", ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: "application/vnd.docker.distribution.manifest.list.v2+json", Manifests: []ocispec.Descriptor{m},
	})
	if _, err := e.pull(e.ctx, "a:1", Image{}); err != nil {
		t.Fatal(err)
	}
	if e.here(e.ctx, foreign) || !e.here(e.ctx, config) {
		t.Error("the foreign layer came, or the config did not")
	}
	if l := e.labels(m.Digest); l[labelLayer+"0"] != foreign.Digest.String() {
		t.Errorf("%v", l)
	}
}

// TestPullNested: an index that stands a thousand times in each of seven others is fetched once.
func TestPullNested(t *testing.T) {
	e := newEnv(t, content.Shared)
	b := e.reg.image("", platforms.DefaultSpec(), 76, 1000)
	d := b.manifest
	for range 8 {
		d = e.reg.index("a:1", slices.Repeat([]ocispec.Descriptor{d}, 1000)...)
	}
	if _, err := e.pull(e.ctx, "a:1", Image{Unpacks: unpackHere()}); err != nil {
		t.Fatal(err)
	}
	for d, n := range e.reg.requests {
		if n > 8 { // in parts
			t.Errorf("%s was asked for %d times", d, n)
		}
	}
}

// linkTo is a layer with a hard link.
func linkTo(target string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	_ = w.WriteHeader(&tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: target}) // a buffer takes everything
	_ = w.Close()
	return b.Bytes()
}

// layered puts an image with one layer.
func (f *fakeRegistry) layered(tag string, data []byte) {
	config := f.add(ocispec.MediaTypeImageConfig, fmt.Appendf(nil, `{"os":"linux","architecture":%q,"rootfs":{"type":"layers","diff_ids":[%q]}}`, platforms.DefaultSpec().Architecture, digest.FromBytes(data)))
	f.manifest(tag, ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config,
		Layers: []ocispec.Descriptor{f.add(ocispec.MediaTypeImageLayer, data)}})
}

// TestPullBad: what is wrong with an image is said, and leaves neither image nor ingest.
func TestPullBad(t *testing.T) {
	other := bytes.Repeat([]byte("x"), 100)
	for _, c := range []struct {
		name  string
		put   func(e *env)
		kind  func(error) bool
		wants string
	}{
		{"no such tag", func(*env) {}, errdefs.IsNotFound, "404"},
		{"wrong layer", func(e *env) {
			b := e.reg.image("a:1", platforms.DefaultSpec(), 70, 1000)
			l := b.layers[0]
			e.reg.blobs[l.Digest] = bytes.Repeat([]byte("x"), int(l.Size))
		}, errdefs.IsFailedPrecondition, "digest"},
		{"cut layer", func(e *env) {
			b := e.reg.image("a:1", platforms.DefaultSpec(), 71, 1000)
			e.reg.blobs[b.layers[0].Digest] = e.reg.blobs[b.layers[0].Digest][:100]
		}, func(error) bool { return true }, "100"},
		{"missing layer", func(e *env) {
			b := e.reg.image("a:1", platforms.DefaultSpec(), 72, 1000)
			delete(e.reg.blobs, b.layers[0].Digest)
		}, errdefs.IsNotFound, "404"},
		{"layer of an exbibyte", func(e *env) {
			e.reg.manifest("a:1", ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest,
				Config: e.reg.add(ocispec.MediaTypeImageConfig, []byte(`{}`)),
				Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString("huge"), Size: 1 << 60}}})
		}, func(error) bool { return true }, "no room"},
		{"manifest that is none", func(e *env) { e.reg.manifest("a:1", ocispec.MediaTypeImageManifest, "hello") }, errdefs.IsInvalidArgument, "no JSON of that kind"},
		{"manifest that is large", func(e *env) {
			e.reg.manifest("a:1", ocispec.MediaTypeImageManifest, strings.Repeat("x", 5<<20))
		}, errdefs.IsInvalidArgument, "bytes"},
		{"index that is deep", func(e *env) {
			d := e.reg.image("", platforms.DefaultSpec(), 73, 10).manifest
			for range 1000 {
				d = e.reg.index("a:1", d)
			}
		}, errdefs.IsInvalidArgument, "8 deep"},
		{"indexes twice in each other", func(e *env) {
			d := e.reg.image("", platforms.DefaultSpec(), 75, 10).manifest
			for range 40 {
				d = e.reg.index("a:1", d, d)
			}
		}, errdefs.IsInvalidArgument, "8 deep"},
		{"layer that leaves its root", func(e *env) {
			e.reg.layered("a:1", linkTo("../../../../../../etc/passwd"))
		}, errdefs.IsInvalidArgument, "etc/passwd"},
		{"layer with a large window", func(e *env) {
			e.reg.layered("a:1", append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 21 << 3}, make([]byte, 600)...))
		}, errdefs.IsInvalidArgument, "zstd"},
		{"index that is wide", func(e *env) {
			many := make([]ocispec.Descriptor, 3000)
			for i := range many {
				many[i] = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(fmt.Sprint(i)), Size: 5}
			}
			e.reg.index("a:1", many...)
		}, errdefs.IsInvalidArgument, "too many"},
		{"schema 1", func(e *env) {
			e.reg.manifest("a:1", "application/vnd.docker.distribution.manifest.v1+prettyjws", map[string]any{"schemaVersion": 1})
		}, errdefs.IsNotImplemented, "schema 1"},
		{"bad digest", func(e *env) {
			e.reg.manifest("a:1", ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest,
				Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: "sha256:../../etc", Size: 2}})
		}, errdefs.IsInvalidArgument, "../../etc"},
		{"config that lies", func(e *env) {
			data, _ := layer(74, 10)
			config := e.reg.add(ocispec.MediaTypeImageConfig, fmt.Appendf(nil, `{"os":"linux","architecture":%q,"rootfs":{"type":"layers","diff_ids":[%q]}}`, platforms.DefaultSpec().Architecture, digest.FromBytes(other)))
			e.reg.manifest("a:1", ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config,
				Layers: []ocispec.Descriptor{e.reg.add(ocispec.MediaTypeImageLayerGzip, data)}})
		}, errdefs.IsInvalidArgument, "the image's config says"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newEnv(t, content.Shared)
			c.put(e)
			_, err := e.pull(e.ctx, "a:1", Image{Unpacks: unpackHere()})
			if err == nil || !c.kind(err) || !strings.Contains(err.Error(), c.wants) {
				t.Errorf("%v", err)
			}
			if _, err := e.cfg.Images.Get(e.ctx, e.name("a:1")); !errdefs.IsNotFound(err) {
				t.Errorf("there is an image: %v", err)
			}
			switch c.name {
			case "cut layer", "missing layer": // what there is of it may be of use another time
				e.leases(0)
			default:
				e.clean(0)
			}
		})
	}
}
