package archive_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"runtime"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/diff"
)

func platform() string { return runtime.GOARCH }

// memory is content and images in memory.
type memory struct {
	data   map[digest.Digest][]byte
	labels map[digest.Digest]map[string]string
	open   int
}

func (m *memory) Open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	b, ok := m.data[d.Digest]
	if !ok {
		return nil, fmt.Errorf("content %s: %w", d.Digest, errdefs.ErrNotFound)
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

func (m *memory) Create(context.Context, string) (diff.Writer, error) {
	m.open++
	return &memoryWriter{m: m}, nil
}

func (m *memory) Keep(ctx context.Context, d digest.Digest) error {
	_, err := m.Labels(ctx, d)
	return err
}

func (m *memory) Labels(_ context.Context, d digest.Digest) (map[string]string, error) {
	if _, ok := m.data[d]; !ok {
		return nil, fmt.Errorf("content %s: %w", d, errdefs.ErrNotFound)
	}
	return m.labels[d], nil
}

func (m *memory) SetLabels(_ context.Context, d digest.Digest, labels map[string]string) error {
	if _, ok := m.data[d]; !ok {
		return fmt.Errorf("content %s: %w", d, errdefs.ErrNotFound)
	}
	m.labels[d] = labels
	return nil
}

func (m *memory) Put(context.Context, string, ocispec.Descriptor, map[string]string) error {
	return nil
}

type memoryWriter struct {
	bytes.Buffer
	m *memory
}

func (w *memoryWriter) Digest() digest.Digest { return digest.FromBytes(w.Bytes()) }
func (w *memoryWriter) Close() error          { w.m.open--; return nil }
func (w *memoryWriter) Commit(context.Context, int64, digest.Digest, map[string]string) error {
	w.m.data[w.Digest()] = bytes.Clone(w.Bytes())
	return nil
}

// FuzzImport: no archive makes Import panic or leave a write open; what it accepts can be exported.
func FuzzImport(f *testing.F) {
	whole := oci(f, map[string]string{ocispec.AnnotationRefName: "v1"}, nil)
	f.Add(whole)
	f.Add(whole[:len(whole)/2])
	f.Add(dockerSave(f))
	f.Add(newFiles(f).add("../x", []byte("x")).link("l", "../..").bytes())
	f.Add(newFiles(f).add("manifest.json", []byte(`[{"Config":"a","Layers":["a","b"]}]`)).link("a", "b").link("b", "a").bytes())
	f.Add([]byte{0x1f, 0x8b, 8, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		m := &memory{data: map[digest.Digest][]byte{}, labels: map[digest.Digest]map[string]string{}}
		list, err := archive.Import(context.Background(), m, m, bytes.NewReader(data), archive.ImportOptions{})
		if m.open != 0 {
			t.Errorf("%d writes were left open", m.open)
		}
		if err != nil {
			return
		}
		if err := archive.Export(context.Background(), m, io.Discard, list, archive.ExportOptions{}); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsDataLoss(err) {
			t.Errorf("what was imported cannot be exported: %v", err)
		}
	})
}
