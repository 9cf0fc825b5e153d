package e2e

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	wire "github.com/containerd/containerd/api/types/transfer"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/test/harness"
)

// TestTransferPairs: of all pairs of containerd's types, those that its transfer service moves are tried, and the others
// refused with the names of both.
func TestTransferPairs(t *testing.T) {
	d := harness.Test(t, bin)
	m := newMover(t, d)
	all := []proto.Message{
		&wire.OCIRegistry{}, &wire.ImageStore{}, &wire.ImageImportStream{Stream: "nosuch"}, &wire.ImageExportStream{Stream: "nosuch"},
		&wire.ContainerPath{ContainerID: "c", Path: "/"}, &wire.ReadStream{Stream: "nosuch"}, &wire.WriteStream{Stream: "nosuch"},
	}
	name := func(m proto.Message) string { return string(m.ProtoReflect().Descriptor().Name()) }
	// What is tried fails for want of what these empty ones name.
	moved := map[string]string{
		"OCIRegistry ImageStore": "InvalidArgument", "ImageStore OCIRegistry": "InvalidArgument", "ImageStore ImageStore": "NotFound",
		"ImageImportStream ImageStore": "NotFound", "ImageStore ImageExportStream": "NotFound", "ImageImportStream ImageExportStream": "NotFound",
	}
	for _, from := range all {
		for _, to := range all {
			pair := name(from) + " " + name(to)
			want := moved[pair]
			delete(moved, pair)
			if want == "" {
				want = "Unimplemented"
			}
			_, err := m.move(from, to)
			if code(err) != want {
				t.Errorf("%s: %v, not %s", pair, err, want)
			}
			if says := fmt.Sprintf("from containerd.types.transfer.%s to containerd.types.transfer.%s", name(from), name(to)); want == "Unimplemented" && !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v", pair, err)
			}
		}
	}
	if len(moved) > 0 {
		t.Errorf("not tried: %v", moved)
	}

	// What goes in comes out.
	in, s, err := m.stream("in")
	if err != nil {
		t.Fatal(err)
	}
	out, r, err := m.stream("out")
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("echo"), 100_000)
	sent, received := make(chan error, 1), make(chan error, 1)
	var got bytes.Buffer
	go func() { sent <- send(s, bytes.NewReader(data)) }()
	go func() { received <- receive(r, &got) }()
	if _, err := m.move(&wire.ImageImportStream{Stream: in}, &wire.ImageExportStream{Stream: out}); err != nil {
		t.Fatal(err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if err := <-received; err != nil || !bytes.Equal(got.Bytes(), data) {
		t.Errorf("%d bytes came back, %v", got.Len(), err)
	}
}
