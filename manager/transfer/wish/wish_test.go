package wish_test

import (
	"context"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
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
