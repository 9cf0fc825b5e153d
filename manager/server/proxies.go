package server

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/api"
	"github.com/managerd/managerd/manager/config"
	"github.com/managerd/managerd/manager/introspection"
	"github.com/managerd/managerd/manager/peer"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/proxy"
)

// proxyTypes are the types of the plugins that are other programs, by what the configuration calls them.
var proxyTypes = map[string]string{
	"snapshot": introspection.TypeSnapshotter, "content": introspection.TypeContent, "diff": introspection.TypeDiff, "sandbox": introspection.TypeSandbox,
}

// proxied is a plugin that is another program.
func (s *Server) proxied(ctx context.Context, p *parts, name string, cfg config.Proxy, platform []string) plugin {
	out := plugin{Plugin: introspection.Plugin{Requires: []string{introspection.TypeMetadata}}}
	switch cfg.Type {
	case "snapshot":
		out = s.snapshotter(ctx, p, name, platform, func(string) (snapshots.Backend, error) {
			return proxy.New(proxy.Options{Name: name, Address: cfg.Address, Owner: "managerd:" + s.cfg.Root})
		})
	case "diff":
		out.build = func() error {
			other, err := peer.New(name, cfg.Address)
			if err != nil {
				return err
			}
			s.closers = append(s.closers, other.Close)
			p.differ(name, api.NewProxyDiffer(other))
			return nil
		}
	default:
		out.build = func() error {
			return fmt.Errorf("proxy plugins of type %s are not used: %w", cfg.Type, errdefs.ErrNotImplemented)
		}
	}
	if cfg.Platform != "" {
		platform = []string{cfg.Platform}
	}
	exports := map[string]string{}
	maps.Copy(exports, cfg.Exports)
	exports["address"] = cfg.Address
	out.Type, out.ID, out.Platforms, out.Exports = proxyTypes[cfg.Type], name, platform, exports
	out.Capabilities, out.capabilities = cfg.Capabilities, nil
	return out
}

// differ adds one that the diff service may use.
func (p *parts) differ(name string, d api.Differ) {
	if p.differs == nil {
		p.differs = map[string]api.Differ{}
	}
	p.differs[name] = d
}

// buildDiff serves layers by the differs that are configured, in that order.
func (s *Server) buildDiff(p *parts) error {
	var order []api.Differ
	for _, name := range s.cfg.Differs {
		d, ok := p.differs[name]
		if !ok {
			return fmt.Errorf("the diff service is to use differ %q, there are %s: %w",
				name, strings.Join(slices.Sorted(maps.Keys(p.differs)), ", "), errdefs.ErrInvalidArgument)
		}
		order = append(order, d)
	}
	api.NewDiff(order...).Register(s.grpc)
	return nil
}
