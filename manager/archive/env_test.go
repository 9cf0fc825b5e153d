package archive_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/managerd/managerd/manager/api"
	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/archive/local"
	"github.com/managerd/managerd/manager/archive/remote"
	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/manager/events"
	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/images"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/native"
	"github.com/managerd/managerd/manager/snapshots/overlayfs"
	"github.com/managerd/managerd/test/image"
)

// env is a daemon's stores, seen from inside or over gRPC.
type env struct {
	ctx       context.Context
	content   archive.Content
	images    archive.Images
	snapshots func(name string) archive.Snapshotter

	blobs *content.Store
	names *images.Store
	store *snapshots.Store
}

func newEnv(t *testing.T, overWire bool) *env {
	t.Helper()
	dir := t.TempDir()
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
	e := &env{ctx: namespaces.With(context.Background(), "test"), names: images.NewStore(db)}
	e.blobs, err = content.New(dir, content.Shared, db, x)
	must(err)
	overlay, err := overlayfs.New(filepath.Join(dir, "overlay"), overlayfs.Options{})
	must(err)
	nat, err := native.New(filepath.Join(dir, "native"))
	must(err)
	e.store, err = snapshots.NewStore(e.ctx, db, x, map[string]snapshots.Backend{overlayfs.Name: overlay, native.Name: nat})
	must(err)
	t.Cleanup(func() { _ = e.store.Close() })
	if !overWire {
		c := local.NewContent(e.blobs)
		e.content, e.images = c, local.NewImages(e.names)
		e.snapshots = func(name string) archive.Snapshotter {
			s, err := local.NewSnapshotter(e.store, name, c, local.Options{})
			must(err)
			return s
		}
		return e
	}
	srv := grpc.NewServer()
	api.NewContent(e.blobs).Register(srv)
	api.NewImages(e.names, x, nil).Register(srv)
	api.NewSnapshots(e.store).Register(srv)
	api.NewDiff(api.NewWalking(local.NewContent(e.blobs), diff.ApplyOptions{})).Register(srv)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	must(err)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "s"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(err)
	t.Cleanup(func() {
		_ = conn.Close()
		srv.Stop()
		<-done
	})
	e.content, e.images = remote.NewContent(conn), remote.NewImages(conn)
	e.snapshots = func(name string) archive.Snapshotter { return remote.NewSnapshotter(conn, name) }
	return e
}

// both runs a test from inside and over the wire.
func both(t *testing.T, fn func(t *testing.T, e *env)) {
	for _, how := range []string{"local", "remote"} {
		t.Run(how, func(t *testing.T) { fn(t, newEnv(t, how == "remote")) })
	}
}

func (e *env) ingests(t *testing.T) int {
	t.Helper()
	s, err := e.blobs.ListStatuses(e.ctx, filters.Always)
	if err != nil {
		t.Fatal(err)
	}
	return len(s)
}

func busybox(t *testing.T, o image.Options) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := image.WriteTo(&b, o); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

var extra = [][]image.File{
	{{Name: "data/", Mode: os.ModeDir | 0o755}, {Name: "data/f", Body: "1", Mode: 0o644}},
	{{Name: "data/.wh.f"}, {Name: "data/g", Body: "2", Mode: 0o644}},
}

// files is a tar in the making.
type files struct {
	t     testing.TB
	order []string
	body  map[string]string
	links map[string]string
}

func newFiles(t testing.TB) *files {
	return &files{t: t, body: map[string]string{}, links: map[string]string{}}
}

func (f *files) add(name string, body []byte) *files {
	f.order = append(f.order, name)
	f.body[name] = string(body)
	return f
}

func (f *files) link(name, target string) *files {
	f.order = append(f.order, name)
	f.links[name] = target
	return f
}

func (f *files) blob(body []byte) ocispec.Descriptor {
	d := digest.FromBytes(body)
	f.add("blobs/sha256/"+d.Encoded(), body)
	return ocispec.Descriptor{Digest: d, Size: int64(len(body))}
}

func (f *files) json(name string, v any) *files {
	b, err := json.Marshal(v)
	if err != nil {
		f.t.Fatal(err)
	}
	return f.add(name, b)
}

func (f *files) bytes() []byte {
	f.t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, n := range f.order {
		h := &tar.Header{Name: n, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(f.body[n]))}
		if to, ok := f.links[n]; ok {
			h.Typeflag, h.Linkname = tar.TypeSymlink, to
		}
		if err := w.WriteHeader(h); err != nil {
			f.t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(w, f.body[n]); err != nil {
				f.t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		f.t.Fatal(err)
	}
	return b.Bytes()
}

func layerOf(t testing.TB, name string) []byte { return newFiles(t).add(name, []byte(name)).bytes() }

func configOf(t testing.TB, layers ...[]byte) []byte {
	c := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.FromBytes(l))
	}
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// dockerSave is an archive as docker made them up to version 24: a layer that is there twice is a link.
func dockerSave(t testing.TB) []byte {
	a, b := layerOf(t, "a"), layerOf(t, "b")
	one, two := configOf(t, a, b), configOf(t, a)
	f := newFiles(t)
	f.add("aaa/VERSION", []byte("1.0")).add("aaa/json", []byte("{}")).add("aaa/layer.tar", a)
	f.add("bbb/layer.tar", b).link("ccc/layer.tar", "../aaa/layer.tar")
	f.add("one.json", one).add("two.json", two)
	f.json("manifest.json", []map[string]any{
		{"Config": "one.json", "RepoTags": []string{"busybox:one", "example.com/x/y:1"}, "Layers": []string{"aaa/layer.tar", "bbb/layer.tar"}},
		{"Config": "two.json", "RepoTags": nil, "Layers": []string{"ccc/layer.tar"}},
	})
	return f.add("repositories", []byte("{}")).bytes()
}

// oci makes an OCI layout of one image with one layer; change may spoil it before the index is written.
func oci(t testing.TB, annotations map[string]string, change func(f *files, m *ocispec.Manifest, d *ocispec.Descriptor)) []byte {
	f := newFiles(t)
	f.json("oci-layout", ocispec.ImageLayout{Version: "1.0.0"})
	l := layerOf(t, "file")
	layer, config := f.blob(l), f.blob(configOf(t, l))
	layer.MediaType, config.MediaType = ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageConfig
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{layer}}
	m.SchemaVersion = 2
	if change != nil {
		change(f, &m, nil)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	d := f.blob(raw)
	d.MediaType, d.Annotations = ocispec.MediaTypeImageManifest, annotations
	if change != nil {
		change(f, &m, &d)
	}
	if _, ok := f.body["index.json"]; !ok {
		f.json("index.json", ocispec.Index{Manifests: []ocispec.Descriptor{d}})
	}
	return f.bytes()
}
