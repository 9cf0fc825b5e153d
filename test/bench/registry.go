package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/registry"
)

// depot is Debian's docker-registry on loopback, with the images that are pulled from it, below a directory.
type depot struct {
	dir, addr string
	cmd       *exec.Cmd
}

// newDepot starts a registry. It is to be closed, also when there is an error.
func newDepot(ctx context.Context) (*depot, error) {
	d := &depot{}
	if _, err := exec.LookPath("docker-registry"); err != nil {
		return d, fmt.Errorf("%w (Debian: apt-get install docker-registry)", err)
	}
	var err error
	if d.dir, err = os.MkdirTemp("", "managerd-bench-"); err != nil {
		return d, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return d, err
	}
	d.addr = l.Addr().String()
	if err := l.Close(); err != nil {
		return d, err
	}
	config := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage:\n  filesystem: {rootdirectory: %q}\nhttp:\n  addr: %q\n",
		filepath.Join(d.dir, "storage"), d.addr)
	if err := os.WriteFile(filepath.Join(d.dir, "config.yml"), []byte(config), 0o600); err != nil {
		return d, err
	}
	log, err := os.Create(filepath.Join(d.dir, "log"))
	if err != nil {
		return d, err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command("docker-registry", "serve", filepath.Join(d.dir, "config.yml"))
	cmd.Stdout, cmd.Stderr, cmd.Env = log, log, append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	if err := cmd.Start(); err != nil {
		return d, err
	}
	d.cmd = cmd
	ctx, cancel := context.WithTimeout(ctx, answering)
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.addr+"/v2/", nil)
		if err != nil {
			return d, err
		}
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			return d, resp.Body.Close()
		}
		if ctx.Err() != nil {
			return d, fmt.Errorf("docker-registry does not serve: %w", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (d *depot) close() error {
	if d.cmd != nil {
		_ = d.cmd.Process.Kill()
		_ = d.cmd.Wait() // the error is that it was killed
	}
	return os.RemoveAll(d.dir)
}

// specimen is an image that is pulled and imported.
type specimen struct {
	title   string
	ref     string
	archive string // path of its OCI layout, as a tar
}

// put makes an image of layers of size bytes each, stores it in the registry, and writes its archive.
func (d *depot) put(ctx context.Context, name string, layers, size int) (*specimen, error) {
	s := &specimen{
		title: fmt.Sprintf("%d layers of %d MiB", layers, size>>20), ref: d.addr + "/" + name + ":latest", archive: filepath.Join(d.dir, name+".tar"),
	}
	if layers == 1 {
		s.title = fmt.Sprintf("one layer of %d MiB", size>>20)
	}
	repo, err := registry.New(registry.Config{}).Repository(s.ref, registry.Options{PlainHTTP: true})
	if err != nil {
		return nil, err
	}
	f, err := os.Create(s.archive)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	w := tar.NewWriter(f)
	file := func(name string, data []byte) error {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
			return err
		}
		_, err := w.Write(data)
		return err
	}
	add := func(mediaType string, data []byte) (ocispec.Descriptor, error) {
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		return desc, errors.Join(repo.Push(ctx, desc, bytes.NewReader(data)), file("blobs/sha256/"+desc.Digest.Encoded(), data))
	}
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, RootFS: ocispec.RootFS{Type: "layers"}}
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for i := range layers {
		data, diffID, err := layer(i, size)
		if err != nil {
			return nil, err
		}
		desc, err := add(ocispec.MediaTypeImageLayerGzip, data)
		if err != nil {
			return nil, err
		}
		manifest.Layers, config.RootFS.DiffIDs = append(manifest.Layers, desc), append(config.RootFS.DiffIDs, diffID)
	}
	if manifest.Config, err = addJSON(add, ocispec.MediaTypeImageConfig, config); err != nil {
		return nil, err
	}
	top, err := addJSON(add, manifest.MediaType, manifest)
	if err != nil {
		return nil, err
	}
	top.Annotations = map[string]string{"io.containerd.image.name": s.ref, ocispec.AnnotationRefName: "latest"}
	index, err := json.Marshal(ocispec.Index{Versioned: manifest.Versioned, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{top}})
	if err != nil {
		return nil, err
	}
	err = errors.Join(file("index.json", index), file(ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"1.0.0"}`)), w.Close(), f.Close())
	return s, err
}

func addJSON(add func(string, []byte) (ocispec.Descriptor, error), mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return add(mediaType, data)
}

// layer is a gzipped tar of files of 64 KiB, size bytes in all, of which gzip takes away about half, as of programs.
func layer(seed, size int) (data []byte, diffID digest.Digest, err error) {
	const each = 64 << 10
	rnd := rand.New(rand.NewSource(int64(seed)))
	var out bytes.Buffer
	zip, sum := gzip.NewWriter(&out), sha256.New()
	w := tar.NewWriter(io.MultiWriter(zip, sum))
	content := make([]byte, each)
	for i := range size / each {
		for at := 0; at < each; at += 512 {
			_, _ = rnd.Read(content[at : at+256]) // the other half stays zero
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("layer%d/file%d", seed, i), Mode: 0o644, Size: each}); err != nil {
			return nil, "", err
		}
		if _, err := w.Write(content); err != nil {
			return nil, "", err
		}
	}
	err = errors.Join(w.Close(), zip.Close())
	return out.Bytes(), digest.NewDigest(digest.SHA256, sum), err
}
