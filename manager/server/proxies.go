package server

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/api"
	"github.com/managerd/managerd/manager/archive/local"
	"github.com/managerd/managerd/manager/config"
	"github.com/managerd/managerd/manager/content"
	contentproxy "github.com/managerd/managerd/manager/content/proxy"
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
	case "content":
		out = s.remoteContent(p, name, cfg.Address)
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

// remoteContent is a content store that is another program.
func (s *Server) remoteContent(p *parts, name, address string) plugin {
	var backend atomic.Pointer[contentproxy.Backend]
	return plugin{
		Plugin: introspection.Plugin{Requires: []string{introspection.TypeMetadata}, Warn: func() string {
			if b := backend.Load(); b != nil {
				if err := b.Trouble(); err != nil {
					return err.Error()
				}
			}
			return ""
		}},
		build: func() error {
			if used, err := s.contentStore(); err != nil {
				return err
			} else if used != name {
				return fmt.Errorf("content is kept in %s; to keep it here, name %s in disabled_plugins: %w",
					used, introspection.TypeContent+"."+used, errdefs.ErrFailedPrecondition)
			}
			b, err := contentproxy.New(contentproxy.Options{Name: name, Address: address, Owner: "managerd:" + s.cfg.Root})
			if err != nil {
				return err
			}
			s.closers = append(s.closers, b.Close)
			backend.Store(b)
			p.content, err = content.NewRemote(b, s.cfg.ContentSharing, s.db, s.db)
			s.content = p.content
			return err
		},
	}
}

// localContent is the ID of the content store of this daemon's own files.
const localContent = "content"

// contentStore is the ID of the content store that is used: this daemon's own, or where that is disabled, the only proxy
// plugin of type content.
func (s *Server) contentStore() (string, error) {
	disabled := func(id string) bool {
		return slices.Contains(s.cfg.DisabledPlugins, introspection.TypeContent+"."+id)
	}
	if !disabled(localContent) {
		return localContent, nil
	}
	var there []string
	for _, name := range s.cfg.ProxyNames() {
		if s.cfg.Proxies[name].Type == "content" && !disabled(name) {
			there = append(there, name)
		}
	}
	if len(there) != 1 {
		return "", fmt.Errorf("content can be kept in one place only, there are %s; name the others in disabled_plugins: %w",
			strings.Join(there, ", "), errdefs.ErrFailedPrecondition)
	}
	return there[0], nil
}

// differ adds one that the diff service may use.
func (p *parts) differ(name string, d api.Differ) {
	if p.differs == nil {
		p.differs = map[string]api.Differ{}
	}
	p.differs[name] = d
}

// named gives the differs of these names. Its error is the rest of a sentence.
func (p *parts) named(names []string) (out []api.Differ, err error) {
	for _, name := range names {
		d, ok := p.differs[name]
		if !ok {
			return nil, fmt.Errorf("is to use differ %q, there are %s: %w",
				name, strings.Join(slices.Sorted(maps.Keys(p.differs)), ", "), errdefs.ErrInvalidArgument)
		}
		out = append(out, d)
	}
	return out, nil
}

// localDiffers is named for layers that the daemon unpacks by itself.
func (p *parts) localDiffers(names []string) (out []local.Differ, err error) {
	all, err := p.named(names)
	for _, d := range all {
		other, _ := d.(local.Differ) // nil: it is our own
		out = append(out, other)
	}
	return out, err
}

// buildDiff serves layers by the differs that are configured, in that order.
func (s *Server) buildDiff(p *parts) error {
	order, err := p.named(s.cfg.Differs)
	if err != nil {
		return fmt.Errorf("the diff service %w", err)
	}
	api.NewDiff(order...).Register(s.grpc)
	return nil
}
