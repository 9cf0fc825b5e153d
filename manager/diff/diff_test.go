package diff_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/shimapi/mount"
)

// blobs is a content store in memory.
type blobs struct {
	data   map[digest.Digest][]byte
	labels map[digest.Digest]map[string]string
}

func newBlobs() *blobs {
	return &blobs{map[digest.Digest][]byte{}, map[digest.Digest]map[string]string{}}
}

func (b *blobs) add(mediaType string, data []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	b.data[d.Digest] = data
	return d
}

func (b *blobs) Open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	data, ok := b.data[d.Digest]
	if !ok {
		return nil, fmt.Errorf("content %s: %w", d.Digest, errdefs.ErrNotFound)
	}
	return io.NopCloser(bytes.NewReader(data)), nil
}

func (b *blobs) Create(context.Context, string) (diff.Writer, error) { return &blobWriter{b: b}, nil }

type blobWriter struct {
	bytes.Buffer
	b *blobs
}

func (w *blobWriter) Digest() digest.Digest { return digest.FromBytes(w.Bytes()) }
func (w *blobWriter) Close() error          { return nil }
func (w *blobWriter) Commit(_ context.Context, size int64, d digest.Digest, labels map[string]string) error {
	if size != int64(w.Len()) || d != w.Digest() {
		return errdefs.ErrFailedPrecondition
	}
	w.b.data[d], w.b.labels[d] = bytes.Clone(w.Bytes()), labels
	return nil
}

func layerTar(t testing.TB, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f, Mode: 0o644, Size: int64(len(f))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zst(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func bind(dir string, options ...string) []*types.Mount {
	return []*types.Mount{{Type: "bind", Source: dir, Options: append([]string{"rbind"}, options...)}}
}

// overlay makes the directories of one, and gives its mounts and upper directory.
func overlay(t *testing.T, lower ...string) (mounts []*types.Mount, upper string) {
	t.Helper()
	upper, work := t.TempDir(), t.TempDir()
	return []*types.Mount{{Type: "overlay", Source: "overlay", Options: []string{
		"index=off", "workdir=" + work, "upperdir=" + upper, "lowerdir=" + strings.Join(lower, ":"),
	}}}, upper
}

func TestApply(t *testing.T) {
	plain := layerTar(t, "a", "dir/b")
	padded := append(bytes.Clone(plain), make([]byte, 10240)...)
	two := append(gz(t, plain[:700]), gz(t, plain[700:])...)
	for name, c := range map[string]struct {
		mediaType string
		data      []byte
		raw       []byte
	}{
		"plain":          {ocispec.MediaTypeImageLayer, plain, plain},
		"padded":         {ocispec.MediaTypeImageLayer, padded, padded},
		"gzip":           {ocispec.MediaTypeImageLayerGzip, gz(t, plain), plain},
		"gzip, padded":   {ocispec.MediaTypeImageLayerGzip, gz(t, padded), padded},
		"gzip members":   {ocispec.MediaTypeImageLayerGzip, two, plain},
		"zstd":           {ocispec.MediaTypeImageLayerZstd, zst(t, plain), plain},
		"zstd skippable": {ocispec.MediaTypeImageLayerZstd, append([]byte{0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 1, 2}, zst(t, plain)...), plain},
		"docker":         {"application/vnd.docker.image.rootfs.diff.tar.gzip", gz(t, plain), plain},
		"docker, plain":  {"application/vnd.docker.image.rootfs.diff.tar", plain, plain},
		"type that lies": {ocispec.MediaTypeImageLayerGzip, zst(t, plain), plain},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBlobs()
			root := t.TempDir()
			got, err := diff.Apply(context.Background(), b, b.add(c.mediaType, c.data), bind(root, "rw"), diff.ApplyOptions{Sync: true})
			if err != nil {
				t.Fatal(err)
			}
			if got.Digest != digest.FromBytes(c.raw) || got.Size != int64(len(c.raw)) || got.MediaType != ocispec.MediaTypeImageLayer {
				t.Errorf("applied %+v", got)
			}
			if body, err := os.ReadFile(filepath.Join(root, "dir/b")); err != nil || string(body) != "dir/b" {
				t.Errorf("%q, %v", body, err)
			}
		})
	}
}

func TestApplyRefuses(t *testing.T) {
	plain := layerTar(t, strings.Repeat("n", 90), "b")
	packed, packedZ := gz(t, plain), zst(t, plain)
	corrupt := bytes.Clone(packed)
	corrupt[len(corrupt)-6] ^= 1 // the checksum
	for name, c := range map[string]struct {
		mediaType string
		data      []byte
		mounts    []*types.Mount
		want      error
		words     string
	}{
		"gzip cut short":    {ocispec.MediaTypeImageLayerGzip, packed[:len(packed)-20], nil, errdefs.ErrInvalidArgument, "cut short"},
		"gzip, no checksum": {ocispec.MediaTypeImageLayerGzip, packed[:len(packed)-8], nil, errdefs.ErrInvalidArgument, "cut short"},
		"gzip, header only": {ocispec.MediaTypeImageLayerGzip, packed[:5], nil, errdefs.ErrInvalidArgument, "cut short"},
		"gzip corrupt":      {ocispec.MediaTypeImageLayerGzip, corrupt, nil, errdefs.ErrInvalidArgument, "damaged"},
		"gzip and garbage":  {ocispec.MediaTypeImageLayerGzip, append(bytes.Clone(packed), "garbage garbage"...), nil, errdefs.ErrInvalidArgument, "damaged"},
		"zstd cut short":    {ocispec.MediaTypeImageLayerZstd, packedZ[:len(packedZ)-10], nil, errdefs.ErrInvalidArgument, "cut short"},
		"zstd window":       {ocispec.MediaTypeImageLayerZstd, append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 21 << 3}, make([]byte, 600)...), nil, errdefs.ErrInvalidArgument, "damaged"},
		"tar cut short":     {ocispec.MediaTypeImageLayer, plain[:600], nil, errdefs.ErrInvalidArgument, "cut short"},
		"tar in gzip short": {ocispec.MediaTypeImageLayerGzip, gz(t, plain[:600]), nil, errdefs.ErrInvalidArgument, "cut short"},
		"no tar":            {ocispec.MediaTypeImageLayer, []byte(strings.Repeat("x", 2000)), nil, errdefs.ErrInvalidArgument, "no tar"},
		"escape":            {ocispec.MediaTypeImageLayer, layerTar(t, "../../escape"), nil, errdefs.ErrInvalidArgument, `"../../escape"`},
		"media type":        {ocispec.MediaTypeImageConfig, plain, nil, errdefs.ErrNotImplemented, "media type"},
		"read-only":         {ocispec.MediaTypeImageLayer, plain, bind("/nowhere", "ro"), errdefs.ErrFailedPrecondition, "read-only"},
		"missing mount":     {ocispec.MediaTypeImageLayer, plain, bind("/nowhere"), unix.ENOENT, "/nowhere"},
		"no mounts":         {ocispec.MediaTypeImageLayer, plain, []*types.Mount{}, errdefs.ErrInvalidArgument, "no mounts"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBlobs()
			if c.mounts == nil {
				c.mounts = bind(t.TempDir(), "rw")
			}
			d := b.add(c.mediaType, c.data)
			_, err := diff.Apply(context.Background(), b, d, c.mounts, diff.ApplyOptions{})
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), d.Digest.String()) {
				t.Errorf("error: %v\nwant %v, with %q", err, c.want, c.words)
			}
		})
	}
	b := newBlobs()
	_, err := diff.Apply(context.Background(), b, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("x")}, bind(t.TempDir()), diff.ApplyOptions{})
	if !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("missing blob: %v", err)
	}
}

// TestOverlay: a layer on an overlay deletes by whiteouts that overlayfs understands, and a diff of the result is that
// layer again, whether the whole trees are compared or the upper directory says where to look.
func TestOverlay(t *testing.T) {
	dir := filepath.Dir(t.TempDir()) // which all temporary directories of this test are in, with this also those of Apply and Diff
	t.Setenv("TMPDIR", dir)
	ctx := context.Background()
	b := newBlobs()
	base := t.TempDir()
	if _, err := diff.Apply(ctx, b, b.add(ocispec.MediaTypeImageLayer, layerTar(t, "keep", "gone", "dir/old", "dir/old2", "all/x")), bind(base), diff.ApplyOptions{}); err != nil {
		t.Fatal(err)
	}
	mounts, upper := overlay(t, base)
	second := layerTar(t, "new", ".wh.gone", "dir/.wh..wh..opq", "dir/fresh", ".wh.all")
	if _, err := diff.Apply(ctx, b, b.add(ocispec.MediaTypeImageLayer, second), mounts, diff.ApplyOptions{}); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(upper, "gone"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("the whiteout is %o %d, %v", st.Mode, st.Rdev, err)
	}

	view := bind(base, "ro")
	full := []*types.Mount{{Type: "bind", Source: base, Options: []string{"rbind"}}} // not recognised as what is below: no hint
	var digests []digest.Digest
	for name, lower := range map[string][]*types.Mount{"hint": view, "full": full} {
		for _, mediaType := range []string{ocispec.MediaTypeImageLayer, "", ocispec.MediaTypeImageLayerZstd} {
			d, err := diff.Diff(ctx, b, lower, mounts, diff.Options{MediaType: mediaType, Labels: map[string]string{"mine": "1"}})
			if err != nil {
				t.Fatal(name, err)
			}
			if d.Size != int64(len(b.data[d.Digest])) || b.labels[d.Digest]["mine"] != "1" {
				t.Errorf("%s %s: %+v %v", name, mediaType, d, b.labels[d.Digest])
			}
			raw, err := diff.Apply(ctx, b, d, bind(t.TempDir()), diff.ApplyOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if want := b.labels[d.Digest][diff.LabelUncompressed]; mediaType != ocispec.MediaTypeImageLayer && want != raw.Digest.String() {
				t.Errorf("%s %s: label %s, applied %s", name, mediaType, want, raw.Digest)
			}
			digests = append(digests, raw.Digest)
		}
	}
	for _, d := range digests {
		if d != digests[0] {
			t.Errorf("different ways give different layers: %v", digests)
		}
	}
	// Applied anew, it makes the same tree.
	again, _ := overlay(t, base)
	if _, err := diff.Apply(ctx, b, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digests[0]}, again, diff.ApplyOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := mount.WithTemp(again, func(root string) error {
		for _, p := range []string{"keep", "new", "dir/fresh"} {
			if _, err := os.Stat(filepath.Join(root, p)); err != nil {
				t.Error(err)
			}
		}
		for _, p := range []string{"gone", "all", "dir/old", "dir/old2"} {
			if _, err := os.Lstat(filepath.Join(root, p)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s: %v", p, err)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}

	// Of everything, without a lower tree.
	d, err := diff.Diff(ctx, b, nil, mounts, diff.Options{})
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if _, err := diff.Apply(ctx, b, d, bind(root), diff.ApplyOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "keep")); err != nil {
		t.Error(err)
	}
	if after, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(after, []byte(dir)) {
		t.Errorf("mounts were left: %s", after)
	}
}

// TestDiffReproducible: the same change gives the same blob, however it is packed; with a latest time, whenever it was made.
func TestDiffReproducible(t *testing.T) {
	b := newBlobs()
	base, root := t.TempDir(), t.TempDir()
	body := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	write := func(at time.Time) {
		for i := range 3 {
			p := filepath.Join(root, fmt.Sprint("f", i))
			if err := errors.Join(os.WriteFile(p, body[i:], 0o644), os.Chtimes(p, at, at)); err != nil {
				t.Fatal(err)
			}
		}
	}
	made := func(mediaType string, latest time.Time) digest.Digest {
		d, err := diff.Diff(t.Context(), b, bind(base, "ro"), bind(root), diff.Options{MediaType: mediaType, Latest: latest})
		if err != nil {
			t.Fatal(err)
		}
		return d.Digest
	}
	epoch := time.Unix(1_600_000_000, 0)
	for _, mediaType := range []string{ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd} {
		write(epoch.Add(time.Hour))
		first, clamped := made(mediaType, time.Time{}), made(mediaType, epoch)
		if again := made(mediaType, time.Time{}); again != first {
			t.Errorf("%s: %s, then %s", mediaType, first, again)
		}
		write(epoch.Add(2 * time.Hour))
		if made(mediaType, time.Time{}) == first {
			t.Errorf("%s: the time is not in the layer", mediaType)
		}
		if again := made(mediaType, epoch); again != clamped {
			t.Errorf("%s: %s, then with other times %s", mediaType, clamped, again)
		}
		write(epoch.Add(-time.Hour))
		if made(mediaType, epoch) == clamped {
			t.Errorf("%s: what is older got the latest time", mediaType)
		}
	}
}

// TestDiffWhileMounted: a running container's overlay is compared without mounting its upper directory a second time.
func TestDiffWhileMounted(t *testing.T) {
	base, target := t.TempDir(), t.TempDir()
	mounts, _ := overlay(t, base)
	if err := mount.Mount(mounts, target); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := mount.Unmount(target); err != nil {
			t.Error(err)
		}
	}()
	if err := os.WriteFile(filepath.Join(target, "f"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	b := newBlobs()
	d, err := diff.Diff(context.Background(), b, bind(base, "ro"), mounts, diff.Options{MediaType: ocispec.MediaTypeImageLayer})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b.data[d.Digest], []byte("f\x00")) {
		t.Error("the file is not in the layer")
	}
	if _, err := diff.Diff(context.Background(), b, nil, mounts, diff.Options{MediaType: "text/plain"}); !errors.Is(err, errdefs.ErrNotImplemented) {
		t.Errorf("media type: %v", err)
	}
}

// BenchmarkApply unpacks 64 MiB in 4,000 files.
func BenchmarkApply(b *testing.B) {
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	body := bytes.Repeat([]byte("0123456789abcdef"), 1024)
	for i := range 4000 {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("usr/lib/d%d/f%d", i/50, i), Mode: 0o644, Size: int64(len(body))}); err != nil {
			b.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			b.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	c := newBlobs()
	d := c.add(ocispec.MediaTypeImageLayerGzip, gz(b, raw.Bytes()))
	b.SetBytes(int64(raw.Len()))
	for b.Loop() {
		if _, err := diff.Apply(context.Background(), c, d, bind(b.TempDir()), diff.ApplyOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}
