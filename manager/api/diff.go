package api

import (
	"context"

	api "github.com/containerd/containerd/api/services/diff/v1"
	"google.golang.org/grpc"

	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/manager/namespaces"
)

// Diff serves containerd.services.diff.v1.Diff.
type Diff struct {
	api.UnimplementedDiffServer
	content diff.Content
}

// NewDiff reads layers from content and writes them there (see archive/local).
func NewDiff(content diff.Content) *Diff { return &Diff{content: content} }

// Register adds the service to a server.
func (a *Diff) Register(s *grpc.Server) { api.RegisterDiffServer(s, a) }

// Apply unpacks a layer.
func (a *Diff) Apply(ctx context.Context, r *api.ApplyRequest) (*api.ApplyResponse, error) {
	if _, err := namespaces.Required(ctx); err != nil {
		return nil, toGRPC(err)
	}
	d, err := diff.Apply(ctx, a.content, descriptorFromWire(r.Diff), r.Mounts, diff.ApplyOptions{Sync: r.SyncFs})
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.ApplyResponse{Applied: descriptorToWire(d)}, nil
}

// Diff makes a layer of what differs.
func (a *Diff) Diff(ctx context.Context, r *api.DiffRequest) (*api.DiffResponse, error) {
	if _, err := namespaces.Required(ctx); err != nil {
		return nil, toGRPC(err)
	}
	d, err := diff.Diff(ctx, a.content, r.Left, r.Right, diff.Options{MediaType: r.MediaType, Ref: r.Ref, Labels: r.Labels})
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.DiffResponse{Diff: descriptorToWire(d)}, nil
}
