package api_test

import (
	"context"
	"net"
	"path/filepath"
	"testing"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/managerd/managerd/manager/api"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/peer"
)

// encrypted is a differ that knows one media type.
type encrypted struct {
	diffapi.UnimplementedDiffServer
}

func (encrypted) Apply(ctx context.Context, r *diffapi.ApplyRequest) (*diffapi.ApplyResponse, error) {
	ns, err := namespaces.Required(ctx)
	switch {
	case err != nil:
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	case r.Diff.MediaType == "encrypted":
		return &diffapi.ApplyResponse{Applied: &types.Descriptor{MediaType: "by " + ns}}, nil
	case r.Diff.MediaType == "broken":
		return nil, status.Error(codes.DataLoss, "it is broken")
	}
	return nil, status.Error(codes.Unimplemented, "what is that")
}

// plain is the differ that is asked after it.
type plain struct{}

func (plain) Apply(context.Context, *diffapi.ApplyRequest) (*diffapi.ApplyResponse, error) {
	return &diffapi.ApplyResponse{Applied: &types.Descriptor{MediaType: "plain"}}, nil
}

func (plain) Diff(context.Context, *diffapi.DiffRequest) (*diffapi.DiffResponse, error) {
	return &diffapi.DiffResponse{Diff: &types.Descriptor{MediaType: "plain"}}, nil
}

// TestDiffers: what one differ does not know the next one is asked for; any other error is the answer.
func TestDiffers(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	diffapi.RegisterDiffServer(srv, encrypted{})
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	stop := func() { srv.Stop(); <-done }
	p, err := peer.New("decoder", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	d := api.NewDiff(api.NewProxyDiffer(p), plain{})
	ctx := namespaces.With(context.Background(), "one")
	apply := func(ctx context.Context, typ string) (string, error) {
		r, err := d.Apply(ctx, &diffapi.ApplyRequest{Diff: &types.Descriptor{MediaType: typ}})
		return r.GetApplied().GetMediaType(), err
	}
	for typ, want := range map[string]string{"encrypted": "by one", "tar": "plain"} {
		if got, err := apply(ctx, typ); err != nil || got != want {
			t.Errorf("%s: %q, %v", typ, got, err)
		}
	}
	if r, err := d.Diff(ctx, &diffapi.DiffRequest{}); err != nil || r.Diff.MediaType != "plain" {
		t.Errorf("%v, %v", r, err)
	}
	_, err = apply(ctx, "broken")
	wantCode(t, err, codes.DataLoss, "it is broken")
	_, err = apply(context.Background(), "tar")
	wantCode(t, err, codes.FailedPrecondition, "namespace")
	stop()
	_, err = apply(ctx, "tar")
	wantCode(t, err, codes.Unavailable, "decoder")
	_, err = api.NewDiff().Diff(ctx, &diffapi.DiffRequest{})
	wantCode(t, err, codes.Unimplemented, "no differ")
}
