package api

import (
	"context"
	"fmt"

	api "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/errdefs"
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
type Walking struct {
	content diff.Content
	options diff.ApplyOptions
}

// NewWalking reads layers from content and writes them there (see archive/local). Every Apply has the options, besides
// those of its request.
func NewWalking(content diff.Content, options diff.ApplyOptions) Walking {
	return Walking{content, options}
}

// Apply unpacks a layer.
func (w Walking) Apply(ctx context.Context, r *api.ApplyRequest) (*api.ApplyResponse, error) {
	if _, err := namespaces.Required(ctx); err != nil {
		return nil, err
	}
	o := w.options
	o.Sync, o.Payloads = o.Sync || r.SyncFs, r.Payloads
	d, err := diff.Apply(ctx, w.content, descriptorFromWire(r.Diff), r.Mounts, o)
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
	o := diff.Options{MediaType: r.MediaType, Ref: r.Ref, Labels: r.Labels}
	if r.SourceDateEpoch != nil {
		if err := r.SourceDateEpoch.CheckValid(); err != nil {
			return nil, fmt.Errorf("source date epoch: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		o.Latest = r.SourceDateEpoch.AsTime()
	}
	d, err := diff.Diff(ctx, w.content, r.Left, r.Right, o)
	if err != nil {
		return nil, err
	}
	return &api.DiffResponse{Diff: descriptorToWire(d)}, nil
}
