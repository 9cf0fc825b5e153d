package api

import (
	"context"

	api "github.com/containerd/containerd/api/services/leases/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/leases"
)

// Leases serves containerd.services.leases.v1.Leases.
type Leases struct {
	api.UnimplementedLeasesServer
	store   *leases.Store
	collect Collect
}

// NewLeases serves store. collect is called by deletions that ask for it.
func NewLeases(store *leases.Store, collect Collect) *Leases {
	return &Leases{store: store, collect: collect}
}

// Register adds the service to a server.
func (a *Leases) Register(s *grpc.Server) { api.RegisterLeasesServer(s, a) }

func leaseToWire(l leases.Lease) *api.Lease {
	return &api.Lease{ID: l.ID, CreatedAt: timestamppb.New(l.CreatedAt), Labels: l.Labels}
}

// Create makes a lease.
func (a *Leases) Create(ctx context.Context, r *api.CreateRequest) (*api.CreateResponse, error) {
	l, err := a.store.Create(ctx, r.ID, r.Labels)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.CreateResponse{Lease: leaseToWire(l)}, nil
}

// Delete removes a lease, and with Sync what only that kept.
func (a *Leases) Delete(ctx context.Context, r *api.DeleteRequest) (*emptypb.Empty, error) {
	if err := a.store.Delete(ctx, r.ID); err != nil {
		return nil, toGRPC(err)
	}
	return done, toGRPC(a.collect.now(ctx, r.Sync))
}

// List gives the leases that match.
func (a *Leases) List(ctx context.Context, r *api.ListRequest) (*api.ListResponse, error) {
	f, err := filters.ParseAll(r.Filters...)
	if err != nil {
		return nil, toGRPC(err)
	}
	all, err := a.store.List(ctx, f)
	if err != nil {
		return nil, toGRPC(err)
	}
	resp := &api.ListResponse{}
	for _, l := range all {
		resp.Leases = append(resp.Leases, leaseToWire(l))
	}
	return resp, nil
}

// AddResource has a lease keep something.
func (a *Leases) AddResource(ctx context.Context, r *api.AddResourceRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.store.AddResource(ctx, r.ID, leases.Resource{ID: r.Resource.GetID(), Type: r.Resource.GetType()}))
}

// DeleteResource has a lease let go of something.
func (a *Leases) DeleteResource(ctx context.Context, r *api.DeleteResourceRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.store.DeleteResource(ctx, r.ID, leases.Resource{ID: r.Resource.GetID(), Type: r.Resource.GetType()}))
}

// ListResources gives what a lease keeps.
func (a *Leases) ListResources(ctx context.Context, r *api.ListResourcesRequest) (*api.ListResourcesResponse, error) {
	all, err := a.store.ListResources(ctx, r.ID)
	if err != nil {
		return nil, toGRPC(err)
	}
	resp := &api.ListResourcesResponse{}
	for _, res := range all {
		resp.Resources = append(resp.Resources, &api.Resource{ID: res.ID, Type: res.Type})
	}
	return resp, nil
}
