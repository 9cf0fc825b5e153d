package api

import (
	"context"
	"fmt"

	api "github.com/containerd/containerd/api/services/mounts/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/mounts"
)

// Mounts serves containerd.services.mounts.v1.Mounts.
type Mounts struct {
	api.UnimplementedMountsServer
	store *mounts.Store
}

// NewMounts serves store.
func NewMounts(store *mounts.Store) *Mounts { return &Mounts{store: store} }

// Register adds the service to a server.
func (a *Mounts) Register(s *grpc.Server) { api.RegisterMountsServer(s, a) }

func activationToWire(a mounts.Activation) *types.ActivationInfo {
	out := &types.ActivationInfo{Name: a.Name, System: a.System, Labels: a.Labels}
	for _, m := range a.Active {
		out.Active = append(out.Active, &types.ActiveMount{Mount: m.Mount, MountedAt: timestamppb.New(m.At), MountPoint: m.Point, Data: m.Data})
	}
	return out
}

// Activate makes mounts.
func (a *Mounts) Activate(ctx context.Context, r *api.ActivateRequest) (*api.ActivateResponse, error) {
	out, err := a.store.Activate(ctx, r.Name, r.Mounts, mounts.Options{Labels: r.Labels, Temporary: r.Temporary})
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.ActivateResponse{Info: activationToWire(out)}, nil
}

// Deactivate takes them away.
func (a *Mounts) Deactivate(ctx context.Context, r *api.DeactivateRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.store.Deactivate(ctx, r.Name))
}

// Info finds an activation.
func (a *Mounts) Info(ctx context.Context, r *api.InfoRequest) (*api.InfoResponse, error) {
	out, err := a.store.Info(ctx, r.Name)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.InfoResponse{Info: activationToWire(out)}, nil
}

// Update changes labels.
func (a *Mounts) Update(ctx context.Context, r *api.UpdateRequest) (*api.UpdateResponse, error) {
	if r.Info.GetName() == "" {
		return nil, toGRPC(fmt.Errorf("no activation given: %w", errdefs.ErrInvalidArgument))
	}
	out, err := a.store.Update(ctx, r.Info.Name, r.Info.Labels, r.UpdateMask.GetPaths()...)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.UpdateResponse{Info: activationToWire(out)}, nil
}

// List streams the activations that match.
func (a *Mounts) List(r *api.ListRequest, stream api.Mounts_ListServer) error {
	f, err := filters.ParseAll(r.Filters...)
	if err != nil {
		return toGRPC(err)
	}
	all, err := a.store.List(stream.Context(), f)
	if err != nil {
		return toGRPC(err)
	}
	for _, i := range all {
		if err := stream.Send(&api.ListMessage{Info: activationToWire(i)}); err != nil {
			return err
		}
	}
	return nil
}
