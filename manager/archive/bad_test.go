package archive_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/overlayfs"
)

// stack is a store with indexes in indexes: levels of them, each of which names the next one width times, and the last an
// image. It counts what is read.
type stack struct {
	memory
	target ocispec.Descriptor
	reads  map[digest.Digest]int
}

func newStack(t *testing.T, levels, width int) *stack {
	t.Helper()
	s := &stack{memory: memory{data: map[digest.Digest][]byte{}, labels: map[digest.Digest]map[string]string{}}, reads: map[digest.Digest]int{}}
	l := layerOf(t, "f")
	layer := s.add(ocispec.MediaTypeImageLayer, l)
	config := s.json(t, ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: platform()}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.Digest}},
	})
	s.target = s.json(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{layer}})
	for range levels {
		var index ocispec.Index
		for range width {
			index.Manifests = append(index.Manifests, s.target)
		}
		s.target = s.json(t, ocispec.MediaTypeImageIndex, index)
	}
	return s
}

func (s *stack) add(mediaType string, data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	s.data[d] = data
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

func (s *stack) json(t *testing.T, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return s.add(mediaType, data)
}

func (s *stack) Open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	s.reads[d.Digest]++
	return s.memory.Open(ctx, d)
}

// layout is the store as an archive.
func (s *stack) layout(t *testing.T) []byte {
	t.Helper()
	f := newFiles(t)
	f.json("oci-layout", ocispec.ImageLayout{Version: "1.0.0"})
	for _, data := range s.data {
		f.blob(data)
	}
	return f.json("index.json", ocispec.Index{Manifests: []ocispec.Descriptor{s.target}}).bytes()
}

// TestNested: whatever indexes stand in each other, and how often, each is read a few times and no more; too deep is
// refused.
func TestNested(t *testing.T) {
	for name, c := range map[string]struct {
		levels, width int
		words         string // of the error; "": it is an image as any other
	}{
		"in each other":  {8, 1, ""},
		"a wide diamond": {8, 1000, ""},
		"a deep diamond": {40, 2, "more than 8 deep"},
		"1,000 deep":     {1000, 1, "more than 8 deep"},
		"too wide":       {1, 10_001, "the maximum is 10000"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, c.levels, c.width)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for what, fn := range map[string]func() error{
				"import": func() error {
					to := newStack(t, 0, 0)
					_, err := archive.Import(ctx, to, to, bytes.NewReader(s.layout(t)), archive.ImportOptions{})
					s.reads = to.reads
					return err
				},
				"export": func() error {
					return archive.Export(ctx, s, io.Discard, []archive.Image{{Name: "a:1", Target: s.target}, {Name: "b:1", Target: s.target}}, archive.ExportOptions{})
				},
				"export of all": func() error {
					return archive.Export(ctx, s, io.Discard, []archive.Image{{Name: "a:1", Target: s.target}}, archive.ExportOptions{AllPlatforms: true})
				},
				"convert": func() error {
					_, err := archive.Convert(ctx, s, s.target, archive.ConvertOptions{OCI: true, Platforms: []ocispec.Platform{{OS: "linux", Architecture: platform()}}})
					return err
				},
				"inspect": func() error { _, err := archive.Inspect(ctx, s, s.target); return err },
				"config":  func() error { _, _, err := archive.Config(ctx, s, s.target); return err },
			} {
				s.reads = map[digest.Digest]int{}
				err := fn()
				if c.words == "" && err != nil || c.words != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.words)) {
					t.Errorf("%s: %v", what, err)
				}
				for d, n := range s.reads {
					if n > 4 {
						t.Errorf("%s reads %s %d times", what, d, n)
					}
				}
			}
			_, err := archive.Tree(ctx, s, s.target)
			if s.reads[s.target.Digest] > 8 || name == "in each other" && err != nil || name != "in each other" && !errdefs.IsInvalidArgument(err) {
				t.Errorf("all parts: %v", err)
			}
		})
	}
}

// TestMissingPlatform: who asks for a platform that an image does not have is told which one that is, and which it has.
func TestMissingPlatform(t *testing.T) {
	s := newStack(t, 0, 0)
	var index ocispec.Index
	for _, arch := range []string{"s390x", "amd64", "amd64"} {
		m := s.target
		m.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		index.Manifests = append(index.Manifests, m)
	}
	target := s.json(t, ocispec.MediaTypeImageIndex, index)
	arm := ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
	riscv := ocispec.Platform{OS: "linux", Architecture: "riscv64"}
	for what, fn := range map[string]func() error{
		"unpack linux/arm64/v8": func() error {
			_, err := archive.UnpackPlatform(t.Context(), s, nil, target, arm)
			return err
		},
		"export linux/riscv64 or linux/arm64/v8": func() error {
			return archive.Export(t.Context(), s, io.Discard, []archive.Image{{Name: "a:1", Target: target}}, archive.ExportOptions{Platforms: []ocispec.Platform{riscv, arm}})
		},
		"convert linux/riscv64": func() error {
			_, err := archive.Convert(t.Context(), s, target, archive.ConvertOptions{Platforms: []ocispec.Platform{riscv}})
			return err
		},
	} {
		err := fn()
		_, asked, _ := strings.Cut(what, " ")
		if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "no image for "+asked+",") || !strings.Contains(err.Error(), "linux/amd64, linux/s390x") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// endless gives zeros for ever, or as many as it is told.
type endless struct{ left int64 }

func (e *endless) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n := len(p)
	if e.left > 0 {
		n = int(min(int64(n), e.left))
		e.left -= int64(n)
	}
	clear(p[:n])
	return n, nil
}

// bomb is the beginning of an archive with an entry of zeros, in a zstd frame (RFC 8878) of blocks that say "131,072 times".
func bomb(t *testing.T, size int) []byte {
	t.Helper()
	var head bytes.Buffer
	if err := tar.NewWriter(&head).WriteHeader(&tar.Header{Name: "repositories", Typeflag: tar.TypeReg, Size: int64(size)}); err != nil {
		t.Fatal(err)
	}
	const raw, repeated, window = 0, 1, 128 << 10
	out := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 7 << 3}
	block := func(kind, size int, data ...byte) {
		h := size<<3 | kind<<1
		out = append(append(out, byte(h), byte(h>>8), byte(h>>16)), data...)
	}
	block(raw, head.Len(), head.Bytes()...)
	for range size / window {
		block(repeated, window, 0)
	}
	return out
}

// TestImportEndless: an archive that does not end, or that becomes much more than it is, is given up.
func TestImportEndless(t *testing.T) {
	whole := oci(t, nil, nil)
	huge := append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 21 << 3}, make([]byte, 100)...) // a frame with a window of 2 GiB
	for name, c := range map[string]struct {
		in    io.Reader
		want  error
		words string
	}{
		"padding":     {io.MultiReader(bytes.NewReader(whole), &endless{left: -1}), errdefs.ErrInvalidArgument, "follow its end"},
		"a bomb":      {bytes.NewReader(bomb(t, 1<<30+1<<28)), errdefs.ErrResourceExhausted, "times as many"},
		"zstd window": {bytes.NewReader(huge), errdefs.ErrInvalidArgument, "zstd"},
		"a manifest": {bytes.NewReader(oci(t, nil, func(f *files, _ *ocispec.Manifest, d *ocispec.Descriptor) {
			if d != nil { // its descriptor says that it is small
				d.Digest = f.blob(bytes.Repeat([]byte(" "), 100<<20)).Digest
			}
		})), errdefs.ErrInvalidArgument, fmt.Sprint(8 << 20)},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, 0, 0)
			_, err := archive.Import(t.Context(), s, s, c.in, archive.ImportOptions{})
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("%v, want %v with %q", err, c.want, c.words)
			}
			if s.open != 0 {
				t.Errorf("%d writes were left open", s.open)
			}
		})
	}
}

// linksOf is a layer of entries without content.
func linksOf(t *testing.T, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestUnpackRefuses(t *testing.T) {
	both(t, func(t *testing.T, e *env) {
		for name, c := range map[string]struct {
			layer []byte
			diff  []byte
			words string
		}{
			"escape":        {layerOf(t, "../../escape"), nil, "escape"},
			"hard link out": {linksOf(t, tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "../../../../../etc/passwd"}), nil, "passwd"},
			"link swapped": {linksOf(t, tar.Header{Name: "d", Typeflag: tar.TypeDir, Mode: 0o755}, tar.Header{Name: "d", Typeflag: tar.TypeSymlink, Linkname: "/etc"},
				tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "d/passwd"}), nil, "passwd"},
			"zstd window":   {[]byte("\x28\xb5\x2f\xfd\x00\xa8" + strings.Repeat("\x00", 600)), nil, "zstd"},
			"wrong diff ID": {layerOf(t, "a"), []byte("other"), "config says"},
			"no tar":        {bytes.Repeat([]byte("x"), 2000), nil, "no tar"},
			"cut short":     {layerOf(t, "a")[:300], nil, "cut short"},
		} {
			data := oci(t, nil, func(f *files, m *ocispec.Manifest, d *ocispec.Descriptor) {
				if d != nil {
					return
				}
				if c.diff == nil {
					c.diff = c.layer
				}
				m.Layers[0].Digest, m.Layers[0].Size = f.blob(c.layer).Digest, int64(len(c.layer))
				config := f.blob(configOf(t, c.diff))
				m.Config.Digest, m.Config.Size = config.Digest, config.Size
			})
			list, err := archive.Import(e.ctx, e.content, e.images, bytes.NewReader(data), archive.ImportOptions{})
			if err != nil {
				t.Fatal(name, err)
			}
			_, err = archive.Unpack(e.ctx, e.content, e.snapshots(overlayfs.Name), list[0].Target)
			if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("%s: %v", name, err)
			}
			s, _ := e.store.Snapshotter(overlayfs.Name)
			if err := s.Walk(e.ctx, filters.Always, func(i snapshots.Info) error { t.Errorf("%s: %+v was left", name, i); return nil }); err != nil {
				t.Error(err)
			}
		}
	})
}
