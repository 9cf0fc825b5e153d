package wish_test

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/metadata"

	"github.com/managerd/managerd/manager/transfer/wish"
)

// received is the context of the request that is made with ctx.
func received(ctx context.Context) context.Context {
	md, _ := metadata.FromOutgoingContext(ctx)
	return metadata.NewIncomingContext(context.Background(), md)
}

// TestWish: what is wanted arrives; what is not known is not passed over.
func TestWish(t *testing.T) {
	for _, w := range []wish.Wish{
		{}, {MetadataOnly: true}, {Concurrent: 7, Foreign: true},
		{Target: &ocispec.Descriptor{MediaType: "application/é", Digest: digest.FromString("x")}},
	} {
		ctx, err := wish.With(context.Background(), w)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := wish.From(received(ctx)); err != nil || !reflect.DeepEqual(got, w) {
			t.Errorf("%+v became %+v, %v", w, got, err)
		}
	}
	for text, word := range map[string]string{`{"newer":1}`: "newer", "x": "managerd-transfer", `{"concurrent":-1}`: "-1", `{"concurrent":100000}`: "100000"} {
		ctx := metadata.AppendToOutgoingContext(context.Background(), "managerd-transfer-bin", text)
		if _, err := wish.From(received(ctx)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestFile: what is opened is what was found, or nothing.
func TestFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, []byte("it"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	i, ok := wish.File(f)
	if !ok {
		t.Fatal("a regular file is none")
	}
	opened, err := i.Open()
	if err != nil {
		t.Fatal(err)
	}
	if data, err := io.ReadAll(opened); err != nil || string(data) != "it" || opened.Close() != nil {
		t.Errorf("%q, %v", data, err)
	}
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	for what, put := range map[string]func() error{
		"nothing":        func() error { return nil },
		"another file":   func() error { return os.WriteFile(path, []byte("other"), 0o600) },
		"a pipe":         func() error { return unix.Mkfifo(path, 0o600) },
		"a link to that": func() error { return os.Symlink("nowhere", path) },
	} {
		if err := put(); err != nil {
			t.Fatal(err)
		}
		if f, err := i.Open(); !errdefs.IsNotImplemented(err) || f != nil {
			t.Errorf("%s: %v", what, err)
		}
		_ = os.RemoveAll(path)
	}
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	if _, ok := wish.File(d); ok {
		t.Error("a directory is a regular file")
	}
}
