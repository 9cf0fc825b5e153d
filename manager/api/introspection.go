package api

import (
	"context"
	"fmt"
	"os"

	api "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/manager/introspection"
	"github.com/managerd/managerd/manager/metadata"
)

// RuntimeInfo asks the runtime at path (empty: the default one) about itself; options are what it would be given.
type RuntimeInfo func(ctx context.Context, path string, options *anypb.Any) (*types.RuntimeInfo, error)

// Introspection serves containerd.services.introspection.v1.Introspection.
type Introspection struct {
	api.UnimplementedIntrospectionServer
	plugins *introspection.Registry
	uuid    string
	runtime RuntimeInfo
}

// NewIntrospection serves the registry of the daemon with this UUID.
func NewIntrospection(r *introspection.Registry, uuid string, runtime RuntimeInfo) *Introspection {
	return &Introspection{plugins: r, uuid: uuid, runtime: runtime}
}

// Register adds the service to a server.
func (a *Introspection) Register(s *grpc.Server) { api.RegisterIntrospectionServer(s, a) }

// Plugins lists the parts of the daemon.
func (a *Introspection) Plugins(_ context.Context, r *api.PluginsRequest) (*api.PluginsResponse, error) {
	found, err := a.plugins.List(r.Filters...)
	if err != nil {
		return nil, toGRPC(err)
	}
	resp := &api.PluginsResponse{}
	for _, p := range found {
		resp.Plugins = append(resp.Plugins, pluginToWire(p))
	}
	return resp, nil
}

// Server says which daemon this is.
func (a *Introspection) Server(context.Context, *emptypb.Empty) (*api.ServerResponse, error) {
	return &api.ServerResponse{UUID: a.uuid, Pid: uint64(os.Getpid()), Pidns: introspection.PIDNamespace()}, nil
}

// PluginInfo describes one plugin. Only runtimes know more than the list says: a RuntimeRequest is answered with a
// RuntimeInfo.
func (a *Introspection) PluginInfo(ctx context.Context, r *api.PluginInfoRequest) (*api.PluginInfoResponse, error) {
	p, err := a.plugins.Get(r.Type, r.ID)
	if err != nil {
		return nil, toGRPC(err)
	}
	resp := &api.PluginInfoResponse{Plugin: pluginToWire(p)}
	if r.Options == nil {
		return resp, nil
	}
	if p.Type != introspection.TypeRuntime || !typeurl.Is(r.Options, &types.RuntimeRequest{}) {
		return nil, toGRPC(fmt.Errorf("plugin %s cannot be asked for %s: %w", p.Name(), r.Options.TypeUrl, errdefs.ErrInvalidArgument))
	}
	var ask types.RuntimeRequest
	if err := typeurl.UnmarshalTo(r.Options, &ask); err != nil {
		return nil, toGRPC(fmt.Errorf("runtime request: %w: %w", err, errdefs.ErrInvalidArgument))
	}
	info, err := a.runtime(ctx, ask.RuntimePath, ask.Options)
	if err != nil {
		return nil, toGRPC(err)
	}
	if resp.Extra, err = typeurl.MarshalAnyToProto(info); err != nil {
		return nil, toGRPC(err)
	}
	return resp, nil
}

func pluginToWire(p introspection.Plugin) *api.Plugin {
	w := &api.Plugin{Type: p.Type, ID: p.ID, Requires: p.Requires, Exports: p.Exports, Capabilities: p.Capabilities}
	if warning := p.Warning(); warning != "" { // the API has no word for it
		w.Exports = metadata.With(p.Exports, "warning", warning)
	}
	for _, name := range p.Platforms {
		if spec, err := platforms.Parse(name); err == nil {
			w.Platforms = append(w.Platforms, &types.Platform{OS: spec.OS, Architecture: spec.Architecture, Variant: spec.Variant})
		}
	}
	switch {
	case p.Err == nil:
	case p.Skipped():
		// Clients know by these words that it is the machine that cannot, and that nothing is wrong with the daemon.
		w.InitErr = status.Convert(toGRPC(fmt.Errorf("%w: skip plugin", p.Err))).Proto()
	default:
		w.InitErr = status.Convert(toGRPC(p.Err)).Proto()
	}
	return w
}
