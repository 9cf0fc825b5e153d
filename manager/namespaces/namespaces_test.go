package namespaces

import (
	"context"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/metadata"
)

func TestWith(t *testing.T) {
	ctx := metadata.AppendToOutgoingContext(context.Background(), "other", "1", Header, "old")
	ctx = ttrpc.WithMetadata(ctx, ttrpc.MD{"other": {"2"}})
	before, _ := metadata.FromOutgoingContext(ctx)
	got := With(With(ctx, "one"), "two")
	if ns, err := Required(got); ns != "two" || err != nil {
		t.Errorf("%q, %v", ns, err)
	}
	md, _ := metadata.FromOutgoingContext(got)
	if v := md.Get(Header); len(v) != 1 || v[0] != "two" || len(md.Get("other")) != 1 {
		t.Errorf("gRPC sends %v", md)
	}
	tmd, _ := ttrpc.GetMetadata(got)
	if v, _ := tmd.Get(TTRPCHeader); len(v) != 1 || v[0] != "two" || len(tmd["other"]) != 1 {
		t.Errorf("ttrpc sends %v", tmd)
	}
	if v := before.Get(Header); len(v) != 1 || v[0] != "old" {
		t.Errorf("the first context was changed: %v", before)
	}
	if tmd, _ := ttrpc.GetMetadata(ctx); len(tmd) != 1 {
		t.Errorf("the first context was changed: %v", tmd)
	}
}

func TestFrom(t *testing.T) {
	incoming := func(kv ...string) context.Context {
		return metadata.NewIncomingContext(context.Background(), metadata.Pairs(kv...))
	}
	for _, c := range []struct {
		name string
		ctx  context.Context
		want string // "" for none
	}{
		{"nothing", context.Background(), ""},
		{"gRPC", incoming(Header, "a"), "a"},
		{"gRPC without", incoming("x", "a"), ""},
		{"gRPC empty", incoming(Header, ""), ""},
		{"ttrpc", ttrpc.WithMetadata(context.Background(), ttrpc.MD{TTRPCHeader: {"b"}}), "b"},
		{"ours over the client's", With(incoming(Header, "a"), "c"), "c"},
		{"ours empty", With(incoming(Header, "a"), ""), ""},
	} {
		if ns, ok := From(c.ctx); ns != c.want || ok != (c.want != "") {
			t.Errorf("%s: %q, %t", c.name, ns, ok)
		}
	}
}

func TestRequired(t *testing.T) {
	if _, err := Required(context.Background()); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "namespace is required") {
		t.Errorf("none: %v", err)
	}
	for _, bad := range []string{"a/b", "..", "a b", strings.Repeat("a", 77)} {
		if _, err := Required(With(context.Background(), bad)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "namespace") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
