package transfer

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/platforms"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/events"
	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/images"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/registry"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/native"
)

// env is a daemon's stores, and a registry with what a test puts there.
type env struct {
	t   *testing.T
	ctx context.Context
	*Service
	reg *fakeRegistry
}

// within bounds every test.
const within = time.Minute

func newEnv(t *testing.T, policy string) *env {
	t.Helper()
	return newEnvIn(t, policy, t.TempDir())
}

func newEnvIn(t *testing.T, policy, dir string) *env {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	db, err := metadata.Open(filepath.Join(dir, "metadata.db"))
	must(err)
	t.Cleanup(func() { _ = db.Close() })
	x := events.NewExchange()
	blobs, err := content.New(dir, policy, db, x)
	must(err)
	ctx, cancel := context.WithTimeout(namespaces.With(context.Background(), "test"), within)
	t.Cleanup(cancel)
	backend, err := native.New(filepath.Join(dir, "native"))
	must(err)
	store, err := snapshots.NewStore(ctx, db, x, map[string]snapshots.Backend{native.Name: backend})
	must(err)
	t.Cleanup(func() { _ = store.Close() })
	return &env{t: t, ctx: ctx, reg: newFakeRegistry(t), Service: New(Config{
		Content: blobs, Images: images.NewStore(db), Snapshots: store, Leases: leases.NewStore(db),
		Isolated: policy == content.Isolated, PartSize: 64 << 10,
	})}
}

// remote opens a repository of the registry with the daemon's own client.
func (e *env) remote(ref string) Remote {
	e.t.Helper()
	r, err := e.open(ref)
	if err != nil {
		e.t.Fatal(err)
	}
	return r
}

func (e *env) open(ref string) (Remote, error) {
	c := registry.New(registry.Config{Attempts: 1, StallTimeout: 10 * time.Second})
	e.t.Cleanup(c.Close)
	return c.Repository(ref, registry.Options{})
}

func (e *env) name(repo string) string { return e.reg.host + "/" + repo }

// pull pulls, and gives the last that was told of each name.
func (e *env) pull(ctx context.Context, repo string, i Image) (map[string]Progress, error) {
	e.t.Helper()
	told := map[string]Progress{}
	i.Name = e.name(repo)
	_, err := e.Pull(ctx, i.Name, e.remote(i.Name), i, func(p Progress) { told[p.Name] = p })
	return told, err
}

func (e *env) here(ctx context.Context, desc ocispec.Descriptor) bool {
	_, err := e.cfg.Content.Info(ctx, desc.Digest)
	return err == nil
}

func (e *env) labels(d digest.Digest) map[string]string {
	e.t.Helper()
	i, err := e.cfg.Content.Info(e.ctx, d)
	if err != nil {
		e.t.Fatal(err)
	}
	return i.Labels
}

// clean fails the test when there are leases, or ingests.
func (e *env) clean(ingests int) {
	e.t.Helper()
	e.leases(0)
	if s, err := e.cfg.Content.ListStatuses(e.ctx, filters.Always); err != nil || len(s) != ingests {
		e.t.Errorf("ingests: %+v, %v", s, err)
	}
}

// leases fails the test unless there are n, and gives what they keep.
func (e *env) leases(n int) (kept []string) {
	e.t.Helper()
	all, err := e.cfg.Leases.List(e.ctx, filters.Always)
	if err != nil || len(all) != n {
		e.t.Errorf("leases: %v, %v", all, err)
	}
	for _, l := range all {
		held, err := e.cfg.Leases.ListResources(e.ctx, l.ID)
		if err != nil {
			e.t.Error(err)
		}
		for _, r := range held {
			kept = append(kept, r.Type+" "+r.ID)
		}
	}
	return kept
}

// fakeRegistry serves what it was given, by the OCI distribution spec, and counts.
type fakeRegistry struct {
	host string

	mu       sync.Mutex
	blobs    map[digest.Digest][]byte
	types    map[digest.Digest]string // of manifests
	tags     map[string]digest.Digest // by REPO:TAG
	sent     map[digest.Digest]int64  // bytes
	requests map[digest.Digest]int
	active   int
	most     int // of active
	mounts   []string
	hide     string // a repository that has nothing yet

	// serve, if not nil, answers for a blob instead; false: it has not.
	serve func(w http.ResponseWriter, r *http.Request, d digest.Digest, data []byte) bool
}

func newFakeRegistry(t *testing.T) *fakeRegistry {
	f := &fakeRegistry{blobs: map[digest.Digest][]byte{}, types: map[digest.Digest]string{}, tags: map[string]digest.Digest{}, sent: map[digest.Digest]int64{}, requests: map[digest.Digest]int{}}
	s := httptest.NewServer(f)
	t.Cleanup(s.Close)
	f.host = strings.TrimPrefix(s.URL, "http://")
	return f
}

func (f *fakeRegistry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	repo, what, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/manifests/")
	if !ok {
		repo, what, _ = strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/blobs/")
	}
	switch {
	case r.URL.Path == "/v2/":
		return
	case r.Method == http.MethodGet || r.Method == http.MethodHead:
		f.get(w, r, repo, what)
	case r.Method == http.MethodPost:
		d := digest.Digest(r.URL.Query().Get("mount"))
		f.mu.Lock()
		_, have := f.blobs[d]
		if from := r.URL.Query().Get("from"); have && from != "" {
			f.mounts = append(f.mounts, from)
			f.mu.Unlock()
			w.Header().Set("Location", "/v2/"+repo+"/blobs/"+d.String())
			w.WriteHeader(http.StatusCreated)
			return
		}
		f.mu.Unlock()
		w.Header().Set("Location", "/v2/"+repo+"/blobs/uploads/1")
		w.WriteHeader(http.StatusAccepted)
	case r.Method == http.MethodPut:
		data, _ := io.ReadAll(r.Body)
		d := digest.FromBytes(data)
		f.mu.Lock()
		defer f.mu.Unlock()
		f.blobs[d] = data
		if ok {
			f.types[d] = r.Header.Get("Content-Type")
			if !strings.Contains(what, ":") {
				f.tags[repo+":"+what] = d
			}
		}
		w.Header().Set("Location", "/v2/"+repo+"/blobs/"+d.String())
		w.Header().Set("Docker-Content-Digest", d.String())
		w.WriteHeader(http.StatusCreated)
	default:
		w.WriteHeader(http.StatusMethodNotAllowed)
	}
}

func (f *fakeRegistry) get(w http.ResponseWriter, r *http.Request, repo, what string) {
	f.mu.Lock()
	d := digest.Digest(what)
	if t, ok := f.tags[repo+":"+what]; ok {
		d = t
	}
	data, ok := f.blobs[d]
	mediaType, manifest := f.types[d]
	serve := f.serve
	if r.Method == http.MethodGet {
		f.requests[d]++
		f.active++
		f.most = max(f.most, f.active)
		defer func() {
			f.mu.Lock()
			f.active--
			f.mu.Unlock()
		}()
	}
	f.mu.Unlock()
	if !ok || repo == f.hide || manifest != strings.Contains(r.URL.Path, "/manifests/") {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	if mediaType == "" {
		mediaType = "application/octet-stream"
	}
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Docker-Content-Digest", d.String())
	c := &countingWriter{ResponseWriter: w, f: f, d: d}
	if r.Method == http.MethodGet && serve != nil && serve(c, r, d, data) {
		return
	}
	http.ServeContent(c, r, "", time.Time{}, bytes.NewReader(data))
}

type countingWriter struct {
	http.ResponseWriter
	f *fakeRegistry
	d digest.Digest
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.f.mu.Lock()
	c.f.sent[c.d] += int64(n)
	c.f.mu.Unlock()
	return n, err
}

func (c *countingWriter) Flush() { c.ResponseWriter.(http.Flusher).Flush() }

func (f *fakeRegistry) bytes(d digest.Digest) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sent[d]
}

func (f *fakeRegistry) add(mediaType string, data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.blobs[d] = data
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

// manifest adds a manifest or an index; a tag names it.
func (f *fakeRegistry) manifest(tag, mediaType string, v any) ocispec.Descriptor {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	desc := f.add(mediaType, data)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.types[desc.Digest] = mediaType
	if tag != "" {
		f.tags[tag] = desc.Digest
	}
	return desc
}

// layer is a gzip of a tar with one file of random bytes.
func layer(seed int, size int) (packed []byte, id digest.Digest) {
	data := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1}).Read(data)
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	_ = w.WriteHeader(&tar.Header{Name: fmt.Sprintf("f%d", seed), Mode: 0o644, Size: int64(size), Typeflag: tar.TypeReg})
	_, _ = w.Write(data)
	_ = w.Close()
	var out bytes.Buffer
	z, _ := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	_, _ = z.Write(plain.Bytes())
	_ = z.Close()
	return out.Bytes(), digest.FromBytes(plain.Bytes())
}

// built is an image at the registry.
type built struct {
	manifest, config ocispec.Descriptor
	layers           []ocispec.Descriptor
	ids              []digest.Digest
}

// image makes an image of layers of these sizes.
func (f *fakeRegistry) image(tag string, p ocispec.Platform, seed int, sizes ...int) built {
	var b built
	for i, size := range sizes {
		data, id := layer(seed+i, size)
		b.layers = append(b.layers, f.add(ocispec.MediaTypeImageLayerGzip, data))
		b.ids = append(b.ids, id)
	}
	config, _ := json.Marshal(ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: b.ids}})
	b.config = f.add(ocispec.MediaTypeImageConfig, config)
	b.manifest = f.manifest(tag, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: b.config, Layers: b.layers,
	})
	b.manifest.Platform = &p
	return b
}

func (f *fakeRegistry) index(tag string, manifests ...ocispec.Descriptor) ocispec.Descriptor {
	return f.manifest(tag, ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests,
	})
}

func unpackHere() []Unpack {
	return []Unpack{{Platform: platforms.DefaultSpec(), Snapshotter: native.Name}}
}

// firstBytes serves a blob's range up to limit bytes in all, and then breaks the connection.
func firstBytes(d digest.Digest, limit int64) func(http.ResponseWriter, *http.Request, digest.Digest, []byte) bool {
	var mu sync.Mutex
	return func(w http.ResponseWriter, r *http.Request, got digest.Digest, data []byte) bool {
		if got != d {
			return false
		}
		from, to := 0, len(data)
		if spec, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
			a, b, _ := strings.Cut(spec, "-")
			from, _ = strconv.Atoi(a)
			if n, err := strconv.Atoi(b); err == nil {
				to = n + 1
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(data)))
			w.Header().Set("Content-Length", strconv.Itoa(to-from))
			w.WriteHeader(http.StatusPartialContent)
		}
		mu.Lock()
		n := min(limit, int64(to-from))
		limit -= n
		mu.Unlock()
		_, _ = w.Write(data[from : from+int(n)])
		if int(n) < to-from {
			panic(http.ErrAbortHandler)
		}
		return true
	}
}
