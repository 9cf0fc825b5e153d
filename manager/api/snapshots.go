package api

import (
	"context"
	"fmt"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/snapshots"
)

// Snapshots serves containerd.services.snapshots.v1.Snapshots.
type Snapshots struct {
	api.UnimplementedSnapshotsServer
	store *snapshots.Store
}

// NewSnapshots serves store, which publishes its events itself.
func NewSnapshots(store *snapshots.Store) *Snapshots { return &Snapshots{store: store} }

// Register adds the service to a server.
func (a *Snapshots) Register(s *grpc.Server) { api.RegisterSnapshotsServer(s, a) }

var snapshotKinds = map[snapshots.Kind]api.Kind{
	snapshots.Active: api.Kind_ACTIVE, snapshots.View: api.Kind_VIEW, snapshots.Committed: api.Kind_COMMITTED,
}

func snapshotToWire(i snapshots.Info) *api.Info {
	return &api.Info{
		Name: i.Name, Parent: i.Parent, Kind: snapshotKinds[i.Kind], Labels: i.Labels,
		CreatedAt: timestamppb.New(i.Created), UpdatedAt: timestamppb.New(i.Updated),
	}
}

// Prepare makes an active snapshot.
func (a *Snapshots) Prepare(ctx context.Context, r *api.PrepareSnapshotRequest) (*api.PrepareSnapshotResponse, error) {
	s, err := a.store.Snapshotter(r.Snapshotter)
	if err != nil {
		return nil, toGRPC(err)
	}
	m, err := s.Prepare(ctx, r.Key, r.Parent, r.Labels)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.PrepareSnapshotResponse{Mounts: m}, nil
}

// View makes a read-only one.
func (a *Snapshots) View(ctx context.Context, r *api.ViewSnapshotRequest) (*api.ViewSnapshotResponse, error) {
	s, err := a.store.Snapshotter(r.Snapshotter)
	if err != nil {
		return nil, toGRPC(err)
	}
	m, err := s.View(ctx, r.Key, r.Parent, r.Labels)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.ViewSnapshotResponse{Mounts: m}, nil
}

// Mounts says how to mount a snapshot.
func (a *Snapshots) Mounts(ctx context.Context, r *api.MountsRequest) (*api.MountsResponse, error) {
	s, err := a.store.Snapshotter(r.Snapshotter)
	if err != nil {
		return nil, toGRPC(err)
	}
	m, err := s.Mounts(ctx, r.Key)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.MountsResponse{Mounts: m}, nil
}

// Commit freezes an active snapshot under a name.
func (a *Snapshots) Commit(ctx context.Context, r *api.CommitSnapshotRequest) (*emptypb.Empty, error) {
	s, err := a.store.Snapshotter(r.Snapshotter)
	if err != nil {
		return nil, toGRPC(err)
	}
	if r.Parent != "" {
		i, err := s.Stat(ctx, r.Key)
		if err != nil {
			return nil, toGRPC(err)
		}
		if i.Parent != r.Parent {
			return nil, toGRPC(fmt.Errorf("cannot commit snapshot %q: it stands on %q and %s cannot move it to %q: %w", r.Key, i.Parent, r.Snapshotter, r.Parent, errdefs.ErrNotImplemented))
		}
	}
	if err := s.Commit(ctx, r.Name, r.Key, r.Labels); err != nil {
		return nil, toGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// Remove deletes a snapshot.
func (a *Snapshots) Remove(ctx context.Context, r *api.RemoveSnapshotRequest) (*emptypb.Empty, error) {
	s, err := a.store.Snapshotter(r.Snapshotter)
	if err != nil {
		return nil, toGRPC(err)
	}
	if err := s.Remove(ctx, r.Key); err != nil {
		return nil, toGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// Stat describes a snapshot.
func (a *Snapshots) Stat(ctx context.Context, r *api.StatSnapshotRequest) (*api.StatSnapshotResponse, error) {
	s, err := a.store.Snapshotter(r.Snapshotter)
	if err != nil {
		return nil, toGRPC(err)
	}
	i, err := s.Stat(ctx, r.Key)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.StatSnapshotResponse{Info: snapshotToWire(i)}, nil
}

// Update changes labels.
func (a *Snapshots) Update(ctx context.Context, r *api.UpdateSnapshotRequest) (*api.UpdateSnapshotResponse, error) {
	s, err := a.store.Snapshotter(r.Snapshotter)
	if err != nil {
		return nil, toGRPC(err)
	}
	i, err := s.Update(ctx, snapshots.Info{Name: r.Info.GetName(), Labels: r.Info.GetLabels()}, r.UpdateMask.GetPaths()...)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.UpdateSnapshotResponse{Info: snapshotToWire(i)}, nil
}

// List streams the snapshots that match.
func (a *Snapshots) List(r *api.ListSnapshotsRequest, stream api.Snapshots_ListServer) error {
	s, err := a.store.Snapshotter(r.Snapshotter)
	if err != nil {
		return toGRPC(err)
	}
	f, err := filters.ParseAll(r.Filters...)
	if err != nil {
		return toGRPC(err)
	}
	var page []*api.Info
	err = s.Walk(stream.Context(), f, func(i snapshots.Info) error {
		if page = append(page, snapshotToWire(i)); len(page) < entries {
			return nil
		}
		full := page
		page = nil
		return stream.Send(&api.ListSnapshotsResponse{Info: full})
	})
	if err == nil && len(page) > 0 {
		err = stream.Send(&api.ListSnapshotsResponse{Info: page})
	}
	return toGRPC(err)
}

// Usage counts what a snapshot takes.
func (a *Snapshots) Usage(ctx context.Context, r *api.UsageRequest) (*api.UsageResponse, error) {
	s, err := a.store.Snapshotter(r.Snapshotter)
	if err != nil {
		return nil, toGRPC(err)
	}
	u, err := s.Usage(ctx, r.Key)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.UsageResponse{Size: u.Size, Inodes: u.Inodes}, nil
}

// Cleanup frees storage that no snapshot uses.
func (a *Snapshots) Cleanup(ctx context.Context, r *api.CleanupRequest) (*emptypb.Empty, error) {
	s, err := a.store.Snapshotter(r.Snapshotter)
	if err != nil {
		return nil, toGRPC(err)
	}
	if err := s.Cleanup(ctx); err != nil {
		return nil, toGRPC(err)
	}
	return &emptypb.Empty{}, nil
}
