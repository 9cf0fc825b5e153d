package api

import (
	"context"
	"fmt"

	api "github.com/containerd/containerd/api/services/containers/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/containers"
	"github.com/managerd/managerd/manager/filters"
)

// Containers serves containerd.services.containers.v1.Containers.
type Containers struct {
	api.UnimplementedContainersServer
	store *containers.Store
}

// NewContainers serves store, whose changes events is told of.
func NewContainers(store *containers.Store, events Publisher) *Containers {
	store.Tell(events)
	return &Containers{store: store}
}

// Register adds the service to a server.
func (a *Containers) Register(s *grpc.Server) { api.RegisterContainersServer(s, a) }

func containerToWire(c containers.Container) *api.Container {
	return &api.Container{
		ID: c.ID, Labels: c.Labels, Image: c.Image, Runtime: &api.Container_Runtime{Name: c.Runtime.Name, Options: c.Runtime.Options},
		Spec: c.Spec, Snapshotter: c.Snapshotter, SnapshotKey: c.SnapshotKey, Sandbox: c.SandboxID, Extensions: c.Extensions,
		CreatedAt: timestamppb.New(c.CreatedAt), UpdatedAt: timestamppb.New(c.UpdatedAt),
	}
}

func containerFromWire(c *api.Container) containers.Container {
	return containers.Container{
		ID: c.GetID(), Labels: c.GetLabels(), Image: c.GetImage(),
		Runtime: containers.Runtime{Name: c.GetRuntime().GetName(), Options: c.GetRuntime().GetOptions()},
		Spec:    c.GetSpec(), Snapshotter: c.GetSnapshotter(), SnapshotKey: c.GetSnapshotKey(), SandboxID: c.GetSandbox(), Extensions: c.GetExtensions(),
	}
}

// Get finds a container.
func (a *Containers) Get(ctx context.Context, r *api.GetContainerRequest) (*api.GetContainerResponse, error) {
	c, err := a.store.Get(ctx, r.ID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.GetContainerResponse{Container: containerToWire(c)}, nil
}

func (a *Containers) list(ctx context.Context, fs []string) ([]containers.Container, error) {
	f, err := filters.ParseAll(fs...)
	if err != nil {
		return nil, toGRPC(err)
	}
	all, err := a.store.List(ctx, f)
	return all, toGRPC(err)
}

// List gives the containers that match.
func (a *Containers) List(ctx context.Context, r *api.ListContainersRequest) (*api.ListContainersResponse, error) {
	all, err := a.list(ctx, r.Filters)
	if err != nil {
		return nil, err
	}
	resp := &api.ListContainersResponse{}
	for _, c := range all {
		resp.Containers = append(resp.Containers, containerToWire(c))
	}
	return resp, nil
}

// ListStream is List, one message a container.
func (a *Containers) ListStream(r *api.ListContainersRequest, stream api.Containers_ListStreamServer) error {
	all, err := a.list(stream.Context(), r.Filters)
	if err != nil {
		return err
	}
	for _, c := range all {
		if err := stream.Send(&api.ListContainerMessage{Container: containerToWire(c)}); err != nil {
			return err
		}
	}
	return nil
}

// Create adds a container.
func (a *Containers) Create(ctx context.Context, r *api.CreateContainerRequest) (*api.CreateContainerResponse, error) {
	if r.Container == nil {
		return nil, toGRPC(fmt.Errorf("no container given: %w", errdefs.ErrInvalidArgument))
	}
	c, err := a.store.Create(ctx, containerFromWire(r.Container))
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.CreateContainerResponse{Container: containerToWire(c)}, nil
}

// Update changes a container.
func (a *Containers) Update(ctx context.Context, r *api.UpdateContainerRequest) (*api.UpdateContainerResponse, error) {
	if r.Container == nil || r.Container.ID == "" {
		return nil, toGRPC(fmt.Errorf("no container given: %w", errdefs.ErrInvalidArgument))
	}
	c, err := a.store.Update(ctx, containerFromWire(r.Container), r.UpdateMask.GetPaths()...)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.UpdateContainerResponse{Container: containerToWire(c)}, nil
}

// Delete removes a container.
func (a *Containers) Delete(ctx context.Context, r *api.DeleteContainerRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.store.Delete(ctx, r.ID))
}
