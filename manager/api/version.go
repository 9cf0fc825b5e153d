package api

import (
	"context"

	api "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Version serves containerd.services.version.v1.Version.
type Version struct {
	api.UnimplementedVersionServer
	version, revision string
}

// NewVersion says version and revision.
func NewVersion(version, revision string) *Version {
	return &Version{version: version, revision: revision}
}

// Register adds the service to a server.
func (a *Version) Register(s *grpc.Server) { api.RegisterVersionServer(s, a) }

// Version says which code runs.
func (a *Version) Version(context.Context, *emptypb.Empty) (*api.VersionResponse, error) {
	return &api.VersionResponse{Version: a.version, Revision: a.revision}, nil
}
