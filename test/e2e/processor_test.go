package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	wire "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/test/regproxy"
)

const encryptedLayer = ocispec.MediaTypeImageLayerGzip + "+encrypted"

// secret is an image with one layer that is none of the known kinds.
type secret struct {
	ref   string
	layer ocispec.Descriptor
	text  string // of its file "secret"
	tar   string // the image as an archive
}

// packed gives a gzip layer with the files, and its diff ID.
func packed(t *testing.T, files map[string][]byte) ([]byte, digest.Digest) {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(files[name])), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := z.Write(plain.Bytes()); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), digest.FromBytes(plain.Bytes())
}

// makeSecret pushes an image whose layer encrypt has made of a gzip layer, with the annotations that it gives, and writes it
// as an archive as well.
func makeSecret(t *testing.T, registry *regproxy.Registry, mediaType string, encrypt func(plain []byte) ([]byte, map[string]string)) *secret {
	t.Helper()
	s := &secret{ref: registry.Addr + "/secret:latest", text: "the secret is out\n", tar: filepath.Join(t.TempDir(), "secret.tar")}
	ballast := make([]byte, 700_000)
	_, _ = rand.NewChaCha8([32]byte{5}).Read(ballast)
	plain, id := packed(t, map[string][]byte{"secret": []byte(s.text), "ballast": ballast})
	data, annotations := encrypt(plain)
	blobs := map[digest.Digest][]byte{}
	put := func(mediaType, tag string, data []byte) ocispec.Descriptor {
		d := upload(t, registry.URL(), "secret", mediaType, tag, data)
		blobs[d.Digest] = data
		return d
	}
	s.layer = put(mediaType, "", data)
	s.layer.Annotations = annotations
	encode := func(v any) []byte {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	config := put(ocispec.MediaTypeImageConfig, "", encode(ocispec.Image{
		Platform: platforms.DefaultSpec(), RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{id}}}))
	target := put(ocispec.MediaTypeImageManifest, "latest", encode(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{s.layer}}))
	target.Annotations = map[string]string{"io.containerd.image.name": s.ref}

	f, err := os.Create(s.tar)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	entry := func(name string, data []byte) {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	entry(ocispec.ImageLayoutFile, encode(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}))
	for d, data := range blobs {
		entry("blobs/sha256/"+d.Encoded(), data)
	}
	entry(ocispec.ImageIndexFile, encode(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{target}}))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return s
}

// get has the daemon pull the image, or import it.
func (s *secret) get(t *testing.T, u *user, how string) error {
	t.Helper()
	m := newMover(t, u.Daemon)
	if how == "pull" {
		_, err := m.move(plain(s.ref), stored(s.ref))
		return err
	}
	id, stream, err := m.stream("import")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(s.tar)
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() { sent <- send(stream, f) }()
	to := stored("")
	to.ExtraReferences = []*wire.ImageReference{{Name: "import", IsPrefix: true, AllowOverwrite: true}}
	_, err = m.move(&wire.ImageImportStream{Stream: id}, to)
	<-sent
	_ = f.Close()
	return err
}

// decoded fails the test unless the image is there and unpacked, and removes it.
func (s *secret) decoded(t *testing.T, u *user) {
	t.Helper()
	dir := t.TempDir()
	u.mctl("images", "mount", s.ref, dir)
	text, err := os.ReadFile(filepath.Join(dir, "secret"))
	u.mctl("images", "unmount", "--rm", dir)
	if err != nil || string(text) != s.text {
		t.Errorf("%q, %v", text, err)
	}
	u.mctl("images", "rm", "--sync", s.ref)
}

// nothing fails the test unless there are no images, snapshots, content, writes and leases.
func (u *user) nothing() {
	u.t.Helper()
	for _, list := range [][]string{{"images", "ls"}, {"snapshots", "ls"}, {"content", "ls"}, {"content", "active"}, {"leases", "ls"}} {
		until(u.t, "no "+list[0]+" left", func() bool { // what a transfer held goes behind its answer
			u.mctl("content", "prune")
			return rows(u.ctr(list...)) == 0
		})
	}
}

// TestStreamProcessor: layers that a program of the configuration decodes are pulled and imported; when it fails, whichever
// way, the error names it and the layer, and nothing is left, no process either.
func TestStreamProcessor(t *testing.T) {
	registry := regproxy.Start(t, regproxy.Options{})
	s := makeSecret(t, registry, encryptedLayer, func(plain []byte) ([]byte, map[string]string) {
		for i := range plain {
			plain[i] ^= 0xff
		}
		return plain, nil
	})
	u := configured(t, `
[plugins."io.containerd.differ.v1.walking"]
processor_stall_timeout = "2s"
[stream_processors."invert"]
accepts = ["`+encryptedLayer+`"]
returns = "`+ocispec.MediaTypeImageLayerGzip+`"
path = "DIR/decoder"
args = ["-m", "DIR/mode"]
env = ["WHO=nobody"]
`)
	mode := func(script string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(u.Dir, "mode"), []byte(script), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	script := "#!/bin/sh\n[ \"$1 $2 $WHO $STREAM_PROCESSOR_MEDIATYPE\" = \"-m " + u.Dir + "/mode nobody " + encryptedLayer + "\" ] || { echo \"called as $*\" >&2; exit 2; }\n. \"$2\"\n"
	if err := os.WriteFile(filepath.Join(u.Dir, "decoder"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	u.start()
	pids := filepath.Join(u.Dir, "pids")
	const decode = "perl -0777 -pe '$_ = ~$_'"
	for _, c := range []struct {
		name, script string
		says         []string
	}{
		{"exit 1", "cat >/dev/null; echo no key for this layer >&2; exit 1", []string{"stream processor invert failed: exit status 1: no key for this layer"}},
		{"exit 1 at once", "echo no key >&2; exit 1", []string{"stream processor invert failed: exit status 1: no key"}},
		{"exit 1 at the end", decode + "; echo it broke >&2; exit 1", []string{"stream processor invert failed: exit status 1: it broke"}},
		{"killed", "kill -9 $$", []string{"stream processor invert failed: signal: killed"}},
		{"hangs", "echo $$ >>" + pids + "; echo waiting >&2; exec sleep 1000", []string{"stream processor invert failed: it did nothing for 2s", "waiting"}},
		{"hangs at the end", "echo $$ >>" + pids + "; " + decode + "; exec sleep 1000", []string{"stream processor invert failed: it did nothing for 2s"}},
		{"garbage", "cat >/dev/null; yes garbage | head -c 300000", []string{"as stream processor invert writes it"}},
		{"nothing", "cat >/dev/null", []string{"holds"}},
		{"cut short", decode + " | head -c 100000", []string{"as stream processor invert writes it", "cut short"}},
	} {
		for _, how := range []string{"pull", "import"} {
			t.Run(c.name+"/"+how, func(t *testing.T) {
				u := &user{Daemon: u.Daemon, t: t}
				mode(c.script)
				err := s.get(t, u, how)
				if err == nil {
					t.Fatal("no error")
				}
				has(t, err.Error(), append(c.says, "layer "+s.layer.Digest.String())...)
				if out := u.ctr("images", "ls"); rows(out) != 0 {
					t.Errorf("an image is left: %s", out)
				}
				if out := u.ctr("snapshots", "ls"); rows(out) != 0 {
					t.Errorf("a snapshot is left: %s", out)
				}
			})
		}
	}
	data, _ := os.ReadFile(pids)
	for _, f := range strings.Fields(string(data)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		await(t, fmt.Sprintf("the end of decoder %d", pid), func() bool {
			name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
			return err != nil || strings.TrimSpace(string(name)) != "sleep"
		})
	}
	for _, how := range []string{"pull", "import"} {
		mode(decode)
		if err := s.get(t, u, how); err != nil {
			t.Fatal(err)
		}
		s.decoded(t, u)
	}
	u.nothing() // what was kept for another attempt, too
	// It is not asked about layers that are some.
	u.ctr("images", "import", archive)
	equal(t, "output", u.ctr("run", "--rm", ref, "c", "echo", "x"), "x\n")
	u.ctr("images", "rm", "--sync", ref)

	u.configure("")
	u.restart(u.Stop)
	err := s.get(t, u, "pull")
	if code(err) != "Unimplemented" {
		t.Fatal(err)
	}
	has(t, err.Error(), "media type", encryptedLayer, "layer "+s.layer.Digest.String())
}
