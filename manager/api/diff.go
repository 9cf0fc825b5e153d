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
	differs []Differ
}

// NewDiff asks the differs in their order.
func NewDiff(differs ...Differ) *Diff { return &Diff{differs: differs} }

// Register adds the service to a server.
func (a *Diff) Register(s *grpc.Server) { api.RegisterDiffServer(s, a) }

// Apply unpacks a layer.
func (a *Diff) Apply(ctx context.Context, r *api.ApplyRequest) (*api.ApplyResponse, error) {
	return inOrder(a.differs, func(d Differ) (*api.ApplyResponse, error) { return d.Apply(ctx, r) })
}

// Diff makes a layer of what differs.
func (a *Diff) Diff(ctx context.Context, r *api.DiffRequest) (*api.DiffResponse, error) {
	return inOrder(a.differs, func(d Differ) (*api.DiffResponse, error) { return d.Diff(ctx, r) })
}

// Walking is the Differ of this daemon.
type Walking struct{ content diff.Content }

// NewWalking reads layers from content and writes them there (see archive/local).
func NewWalking(content diff.Content) Walking { return Walking{content} }

// Apply unpacks a layer.
func (w Walking) Apply(ctx context.Context, r *api.ApplyRequest) (*api.ApplyResponse, error) {
	if _, err := namespaces.Required(ctx); err != nil {
		return nil, err
	}
	d, err := diff.Apply(ctx, w.content, descriptorFromWire(r.Diff), r.Mounts, diff.ApplyOptions{Sync: r.SyncFs})
	if err != nil {
		return nil, err
	}
	return &api.ApplyResponse{Applied: descriptorToWire(d)}, nil
}

// Diff makes a layer of what differs.
func (w Walking) Diff(ctx context.Context, r *api.DiffRequest) (*api.DiffResponse, error) {
	if _, err := namespaces.Required(ctx); err != nil {
		return nil, err
	}
	d, err := diff.Diff(ctx, w.content, r.Left, r.Right, diff.Options{MediaType: r.MediaType, Ref: r.Ref, Labels: r.Labels})
	if err != nil {
		return nil, err
	}
	return &api.DiffResponse{Diff: descriptorToWire(d)}, nil
}
