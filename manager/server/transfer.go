package server

import (
	"context"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/config"
	"github.com/managerd/managerd/manager/images"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/registry"
	"github.com/managerd/managerd/manager/snapshots/overlayfs"
	"github.com/managerd/managerd/manager/transfer"
)

// buildTransfer makes what pulls and pushes, and its client of registries.
func (s *Server) buildTransfer(p *parts) error {
	p.registry = registry.New(s.registryConfig())
	s.closers = append(s.closers, func() error { p.registry.Close(); return nil })
	names := images.NewStore(s.db)
	names.Tell(s.db)
	p.transfer = transfer.New(transfer.Config{
		Content: p.content, Images: names, Snapshots: p.snapshots, Leases: leases.NewStore(s.db), Isolated: s.cfg.ContentSharing == "isolated",
		Downloads: s.cfg.Transfer.Downloads, Ranges: s.cfg.Transfer.Ranges, Uploads: s.cfg.Transfer.Uploads,
		PartSize: int64(s.cfg.Transfer.PartSize), Log: s.log,
	})
	return nil
}

// registryConfig is the configuration as package registry takes it.
func (s *Server) registryConfig() registry.Config {
	c := &s.cfg.Registry
	paths := append(filepath.SplitList(c.ConfigPath), filepath.SplitList(s.cfg.Transfer.ConfigPath)...) // CRI's before the default ones
	old := registry.Legacy{
		Mirrors: map[string][]string{}, TLS: map[string]registry.LegacyTLS{}, Auths: map[string]registry.LegacyAuth{}, Headers: c.Old.Headers,
	}
	for name, m := range c.Old.Mirrors {
		old.Mirrors[name] = m.Endpoint
	}
	for where, a := range c.Old.Auths {
		old.Auths[where] = legacyAuth(a)
	}
	for host, h := range c.Old.Configs {
		if t := h.TLS; t != nil {
			old.TLS[host] = registry.LegacyTLS{CAFile: t.CAFile, CertFile: t.CertFile, KeyFile: t.KeyFile, InsecureSkipVerify: t.InsecureSkipVerify}
		}
		if h.Auth != nil {
			old.Auths[host] = legacyAuth(*h.Auth)
		}
	}
	return registry.Config{
		ConfigPath: paths, Legacy: old, DockerConfig: c.DockerConfig, Logger: s.log,
		DialTimeout: config.Delay(c.DialTimeout), StallTimeout: config.Delay(c.StallTimeout),
		MaxRetryAfter: config.Delay(c.MaxRetryAfter), BreakFor: config.Delay(c.BreakFor),
		Attempts: c.Attempts, ReceiveBuffer: s.cfg.Transfer.ReceiveBuffer, ManifestLimit: int64(c.ManifestLimit), ChunkSize: int64(c.ChunkSize),
	}
}

func legacyAuth(a config.OldAuth) registry.LegacyAuth {
	return registry.LegacyAuth{Username: a.Username, Password: a.Password, Auth: a.Auth, IdentityToken: a.IdentityToken}
}

// snapshotterLabel on a namespace names the snapshotter for those who name none.
const snapshotterLabel = "containerd.io/defaults/snapshotter"

// snapshotterOf is the one that the namespace of ctx has by default.
func (s *Server) snapshotterOf(ctx context.Context) (string, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return "", err
	}
	labels, err := metadata.NewNamespaces(s.db).Labels(ns)
	if err != nil && !errdefs.IsNotFound(err) {
		return "", err
	}
	if name := labels[snapshotterLabel]; name != "" {
		return name, nil
	}
	return overlayfs.Name, nil
}
