package api

import (
	"context"
	"fmt"
	"strings"

	api "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/metadata"
)

// Namespaces serves containerd.services.namespaces.v1.Namespaces.
type Namespaces struct {
	api.UnimplementedNamespacesServer
	store *metadata.Namespaces
}

// NewNamespaces serves store, whose changes events is told of.
func NewNamespaces(store *metadata.Namespaces, events Publisher) *Namespaces {
	store.Tell(events)
	return &Namespaces{store: store}
}

// Register adds the service to a server.
func (a *Namespaces) Register(s *grpc.Server) { api.RegisterNamespacesServer(s, a) }

// Get finds a namespace.
func (a *Namespaces) Get(_ context.Context, r *api.GetNamespaceRequest) (*api.GetNamespaceResponse, error) {
	labels, err := a.store.Labels(r.Name)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.GetNamespaceResponse{Namespace: &api.Namespace{Name: r.Name, Labels: labels}}, nil
}

// List gives the namespaces that match (name, labels.KEY).
func (a *Namespaces) List(_ context.Context, r *api.ListNamespacesRequest) (*api.ListNamespacesResponse, error) {
	f, err := filters.Parse(r.Filter)
	if err != nil {
		return nil, toGRPC(err)
	}
	names, err := a.store.List()
	if err != nil {
		return nil, toGRPC(err)
	}
	resp := &api.ListNamespacesResponse{}
	for _, name := range names {
		labels, err := a.store.Labels(name)
		if errdefs.IsNotFound(err) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, toGRPC(err)
		}
		if f.Match(namespaceFields{name, labels}) {
			resp.Namespaces = append(resp.Namespaces, &api.Namespace{Name: name, Labels: labels})
		}
	}
	return resp, nil
}

type namespaceFields struct {
	name   string
	labels map[string]string
}

func (n namespaceFields) Field(path []string) (string, bool) {
	switch {
	case len(path) == 1 && path[0] == "name":
		return n.name, true
	case len(path) > 1 && path[0] == "labels":
		v, ok := n.labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// Create makes a namespace.
func (a *Namespaces) Create(_ context.Context, r *api.CreateNamespaceRequest) (*api.CreateNamespaceResponse, error) {
	if r.Namespace == nil {
		return nil, toGRPC(fmt.Errorf("no namespace given: %w", errdefs.ErrInvalidArgument))
	}
	n := r.Namespace
	if err := a.store.Create(n.Name, n.Labels); err != nil {
		return nil, toGRPC(err)
	}
	return &api.CreateNamespaceResponse{Namespace: n}, nil
}

// Update changes labels.
func (a *Namespaces) Update(_ context.Context, r *api.UpdateNamespaceRequest) (*api.UpdateNamespaceResponse, error) {
	if r.Namespace == nil {
		return nil, toGRPC(fmt.Errorf("no namespace given: %w", errdefs.ErrInvalidArgument))
	}
	labels, err := a.store.SetLabels(r.Namespace.Name, r.Namespace.Labels, r.UpdateMask.GetPaths()...)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.UpdateNamespaceResponse{Namespace: &api.Namespace{Name: r.Namespace.Name, Labels: labels}}, nil
}

// Delete removes an empty namespace.
func (a *Namespaces) Delete(_ context.Context, r *api.DeleteNamespaceRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.store.Delete(r.Name))
}
