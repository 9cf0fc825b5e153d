package checkpoints

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/diff"
)

// blobs is a content store in memory.
type blobs map[digest.Digest][]byte

func (b blobs) Open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	data, ok := b[d.Digest]
	if !ok {
		return nil, errdefs.ErrNotFound
	}
	return io.NopCloser(bytes.NewReader(data)), nil
}

func (b blobs) Create(context.Context, string) (diff.Writer, error) { return &blob{all: b}, nil }

type blob struct {
	bytes.Buffer
	all blobs
}

func (b *blob) Digest() digest.Digest { return digest.FromBytes(b.Bytes()) }
func (b *blob) Close() error          { return nil }

func (b *blob) Commit(_ context.Context, size int64, expected digest.Digest, _ map[string]string) error {
	if size != int64(b.Len()) || expected != b.Digest() {
		return errdefs.ErrFailedPrecondition
	}
	b.all[expected] = bytes.Clone(b.Bytes())
	return nil
}

// TestSaveUnpack: what is unpacked is what was saved, and the spec is whole.
func TestSaveUnpack(t *testing.T) {
	ctx, b, dir := context.Background(), blobs{}, t.TempDir()
	files := map[string]string{"inventory.img": "inventory", "pages-1.img": string(make([]byte, 100_000)), "descriptors.json": "[]"}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	spec := &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: []byte("{}")}
	ds, err := Save(ctx, b, "c1", dir, spec)
	if err != nil || len(ds) != 2 || ds[0].MediaType != MediaTypeCriu || ds[1].MediaType != MediaTypeSpec {
		t.Fatalf("%v, %v", ds, err)
	}
	got := &anypb.Any{}
	if err := proto.Unmarshal(b[digest.Digest(ds[1].Digest)], got); err != nil || !proto.Equal(got, spec) {
		t.Errorf("spec %v, %v", got, err)
	}
	out := filepath.Join(t.TempDir(), "out")
	if err := Unpack(ctx, b, ds[0], out); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(out)
	if err != nil || len(entries) != len(files) {
		t.Errorf("%v, %v", entries, err)
	}
	for name, want := range files {
		if data, err := os.ReadFile(filepath.Join(out, name)); err != nil || string(data) != want {
			t.Errorf("%s: %d bytes, %v", name, len(data), err)
		}
	}
}

// TestUnpackRefuses: nothing but files, and nothing outside of the directory.
func TestUnpackRefuses(t *testing.T) {
	ctx := context.Background()
	for name, headers := range map[string][]tar.Header{
		"outside":      {{Name: "../evil", Typeflag: tar.TypeReg}},
		"absolute":     {{Name: "/evil", Typeflag: tar.TypeReg}},
		"parent":       {{Name: "..", Typeflag: tar.TypeReg}},
		"itself":       {{Name: ".", Typeflag: tar.TypeReg}},
		"below":        {{Name: "a/b", Typeflag: tar.TypeReg}},
		"link":         {{Name: "a", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}},
		"hard link":    {{Name: "a", Typeflag: tar.TypeLink, Linkname: "/etc/passwd"}},
		"device":       {{Name: "a", Typeflag: tar.TypeChar}},
		"directory":    {{Name: "a", Typeflag: tar.TypeDir}},
		"after a file": {{Name: "a", Typeflag: tar.TypeReg}, {Name: "../evil", Typeflag: tar.TypeReg}},
	} {
		var data bytes.Buffer
		w := tar.NewWriter(&data)
		for _, h := range headers {
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		d := digest.FromBytes(data.Bytes())
		root := t.TempDir()
		err := Unpack(ctx, blobs{d: data.Bytes()}, &types.Descriptor{MediaType: MediaTypeCriu, Digest: d.String()}, filepath.Join(root, "out"))
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
		if entries, err := os.ReadDir(root); err != nil || len(entries) != 1 {
			t.Errorf("%s: %v, %v", name, entries, err)
		}
	}
	for name, c := range map[string]struct {
		d  *types.Descriptor
		is func(error) bool
	}{
		"other type": {&types.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("").String()}, errdefs.IsInvalidArgument},
		"no digest":  {&types.Descriptor{MediaType: MediaTypeCriu, Digest: "x"}, errdefs.IsInvalidArgument},
		"no blob":    {&types.Descriptor{MediaType: MediaTypeCriu, Digest: digest.FromString("none").String()}, errdefs.IsNotFound},
	} {
		if err := Unpack(ctx, blobs{}, c.d, filepath.Join(t.TempDir(), "out")); !c.is(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	torn := []byte("no tar at all")
	d := digest.FromBytes(torn)
	err := Unpack(ctx, blobs{d: torn}, &types.Descriptor{MediaType: MediaTypeCriu, Digest: d.String()}, filepath.Join(t.TempDir(), "out"))
	if !errdefs.IsInvalidArgument(err) || errors.Is(err, io.EOF) {
		t.Errorf("torn: %v", err)
	}
}
