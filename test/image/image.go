// Package image makes small, real OCI images out of the machine's static busybox, for tests, the demo and benchmarks:
// nothing is pulled from anywhere.
package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	_ "crypto/sha256" // go-digest finds it by name
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"runtime"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Busybox is where Debian's package busybox-static puts its binary.
const Busybox = "/bin/busybox"

// Compression of an image's layers.
type Compression string

// The layer compressions of the OCI image spec.
const (
	None Compression = ""
	Gzip Compression = "gzip"
	Zstd Compression = "zstd"
)

// File is one entry of an extra layer.
type File struct {
	Name string // relative, slash separated; a whiteout is named as the image spec says (".wh.NAME")
	Body string
	Mode fs.FileMode // permissions; directories carry fs.ModeDir, symbolic links fs.ModeSymlink and their target in Body
}

// Options says what the image looks like. The zero value is a busybox named Default, running sh.
type Options struct {
	Name        string   // reference; empty: Default
	Cmd         []string // empty: sh
	Env         []string // in addition to PATH
	User        string
	WorkingDir  string
	Compression Compression
	Layers      [][]File // further layers above busybox
}

// Default is the name of an image that nobody named.
const Default = "docker.io/library/busybox:latest"

// epoch makes images reproducible: the same options give the same digests.
var epoch = time.Unix(1700000000, 0).UTC()

// Write makes the image and writes it to file as a tar of an OCI image layout, which ctr, mctl, skopeo and podman
// import. An existing file is replaced.
func Write(file string, o Options) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	if err := WriteTo(f, o); err != nil {
		_ = f.Close()
		return fmt.Errorf("cannot make image %s: %w", file, err)
	}
	return f.Close()
}

// WriteTo is Write to a stream.
func WriteTo(w io.Writer, o Options) error {
	if o.Name == "" {
		o.Name = Default
	}
	if len(o.Cmd) == 0 {
		o.Cmd = []string{"sh"}
	}
	base, err := busyboxLayer()
	if err != nil {
		return err
	}
	raw := [][]byte{base}
	for _, files := range o.Layers {
		l, err := layer(files)
		if err != nil {
			return err
		}
		raw = append(raw, l)
	}

	out := tar.NewWriter(w)
	written := map[digest.Digest]bool{}
	put := func(mediaType string, data []byte) (ocispec.Descriptor, error) {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		if written[d.Digest] {
			return d, nil
		}
		written[d.Digest] = true
		return d, entry(out, "blobs/sha256/"+d.Digest.Encoded(), data)
	}
	putJSON := func(mediaType string, v any) (ocispec.Descriptor, error) {
		data, err := json.Marshal(v)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		return put(mediaType, data)
	}

	if err := entry(out, ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"`+ocispec.ImageLayoutVersion+`"}`)); err != nil {
		return err
	}
	config := ocispec.Image{
		Created:  &epoch,
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config: ocispec.ImageConfig{
			Env: append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, o.Env...),
			Cmd: o.Cmd, User: o.User, WorkingDir: o.WorkingDir,
		},
		RootFS: ocispec.RootFS{Type: "layers"},
	}
	var layers []ocispec.Descriptor
	for _, l := range raw {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(l))
		mediaType, data, err := compress(o.Compression, l)
		if err != nil {
			return err
		}
		d, err := put(mediaType, data)
		if err != nil {
			return err
		}
		layers = append(layers, d)
	}
	cd, err := putJSON(ocispec.MediaTypeImageConfig, config)
	if err != nil {
		return err
	}
	versioned := specs.Versioned{SchemaVersion: 2}
	md, err := putJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: versioned, MediaType: ocispec.MediaTypeImageManifest, Config: cd, Layers: layers,
	})
	if err != nil {
		return err
	}
	md.Platform = &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	tag := "latest"
	if i := strings.LastIndexByte(o.Name, ':'); i > strings.LastIndexByte(o.Name, '/') {
		tag = o.Name[i+1:]
	}
	md.Annotations = map[string]string{"io.containerd.image.name": o.Name, ocispec.AnnotationRefName: tag}
	index, err := json.Marshal(ocispec.Index{
		Versioned: versioned, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{md},
	})
	if err != nil {
		return err
	}
	if err := entry(out, ocispec.ImageIndexFile, index); err != nil {
		return err
	}
	return out.Close()
}

func entry(w *tar.Writer, name string, data []byte) error {
	h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), ModTime: epoch, Typeflag: tar.TypeReg}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

func compress(c Compression, raw []byte) (mediaType string, data []byte, err error) {
	var b bytes.Buffer
	var w io.WriteCloser
	switch c {
	case None:
		return ocispec.MediaTypeImageLayer, raw, nil
	case Gzip:
		mediaType, w = ocispec.MediaTypeImageLayerGzip, gzip.NewWriter(&b)
	case Zstd:
		mediaType = ocispec.MediaTypeImageLayerZstd
		if w, err = zstd.NewWriter(&b); err != nil {
			return "", nil, err
		}
	default:
		return "", nil, fmt.Errorf("unknown compression %q", c)
	}
	if _, err := w.Write(raw); err != nil {
		return "", nil, err
	}
	if err := w.Close(); err != nil {
		return "", nil, err
	}
	return mediaType, b.Bytes(), nil
}

// busyboxLayer is a root filesystem: busybox, a link per applet, and the directories and accounts programs expect.
func busyboxLayer() ([]byte, error) {
	bin, err := os.ReadFile(Busybox)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing: apt-get install busybox-static", Busybox)
	}
	if err != nil {
		return nil, err
	}
	list, err := exec.Command(Busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("cannot list busybox's applets: %w", err)
	}
	files := []File{}
	for _, d := range []string{"bin", "dev", "etc", "proc", "root", "run", "sys", "usr", "usr/bin", "var"} {
		files = append(files, File{Name: d, Mode: fs.ModeDir | 0o755})
	}
	files = append(files,
		File{Name: "tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777},
		File{Name: "etc/passwd", Mode: 0o644, Body: "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n"},
		File{Name: "etc/group", Mode: 0o644, Body: "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n"},
		File{Name: "bin/busybox", Mode: 0o755, Body: string(bin)},
	)
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			files = append(files, File{Name: path.Join("bin", applet), Mode: fs.ModeSymlink | 0o777, Body: "busybox"})
		}
	}
	return layer(files)
}

func layer(files []File) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.Name, Mode: int64(f.Mode.Perm()), ModTime: epoch, Typeflag: tar.TypeReg, Format: tar.FormatPAX}
		body := f.Body
		switch {
		case f.Mode&fs.ModeDir != 0:
			h.Typeflag, h.Name, body = tar.TypeDir, strings.TrimSuffix(f.Name, "/")+"/", ""
			if f.Mode&fs.ModeSticky != 0 {
				h.Mode |= 0o1000
			}
		case f.Mode&fs.ModeSymlink != 0:
			h.Typeflag, h.Linkname, body = tar.TypeSymlink, f.Body, ""
		}
		h.Size = int64(len(body))
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, body); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
