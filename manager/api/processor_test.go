package api_test

import (
	"os"
	"testing"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/diff"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const locked = ocispec.MediaTypeImageLayerGzip + "+locked"

// decoders lets a layer pass when the payload has the key.
var decoders = diff.Processors{{
	ID: "lock", Accepts: []string{locked}, Returns: ocispec.MediaTypeImageLayerGzip,
	Path: "/bin/sh", Args: []string{"-c", `grep -aq "the key" <&3 || { echo "no key" >&2; exit 1; }; cat`},
}}

// TestDiffProcessors: the payload of a request reaches the stream processor, whose failure reaches the client.
func TestDiffProcessors(t *testing.T) {
	ctx, conn := layerServer(t)
	blob := putBlob(t, ctx, conn, layerTar(t, "f"))
	blob.MediaType = locked
	apply := func(key string) (string, error) {
		root := t.TempDir()
		_, err := diffapi.NewDiffClient(conn).Apply(ctx, &diffapi.ApplyRequest{
			Diff: blob, Mounts: []*types.Mount{{Type: "bind", Source: root, Options: []string{"bind", "rw"}}},
			Payloads: map[string]*anypb.Any{"lock": {TypeUrl: "example/key", Value: []byte(key)}},
		})
		return root, err
	}
	root, err := apply("the key")
	wantCode(t, err, codes.OK, "")
	if all, err := os.ReadDir(root); err != nil || len(all) == 0 {
		t.Errorf("%v, %v", all, err)
	}
	_, err = apply("another")
	wantCode(t, err, codes.Unknown, "stream processor lock failed: exit status 1: no key")
}
