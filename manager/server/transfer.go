package server

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive/local"
	"github.com/managerd/managerd/manager/config"
	"github.com/managerd/managerd/manager/diff"
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
	c := transfer.Config{
		Content: p.content, Images: names, Snapshots: p.snapshots, Leases: leases.NewStore(s.db), Isolated: s.cfg.ContentSharing == "isolated",
		Downloads: s.cfg.Transfer.Downloads, Ranges: s.cfg.Transfer.Ranges, Uploads: s.cfg.Transfer.Uploads,
		PartSize: int64(s.cfg.Transfer.PartSize), Apply: s.applyOptions(), Log: s.log,
	}
	if p.verifier != nil {
		c.Verify = p.verifier.Verify
	}
	differs, err := s.unpackDiffers(p)
	if err != nil {
		return err
	}
	c.Differs = differs
	p.transfer = transfer.New(c)
	return nil
}

// applyOptions says how layers are unpacked.
func (s *Server) applyOptions() diff.ApplyOptions {
	l := s.cfg.Layers
	o := diff.ApplyOptions{Limits: diff.Limits{Bytes: int64(l.MaxBytes), Entries: int64(l.MaxEntries), Ratio: int64(l.MaxRatio)}}
	for _, id := range slices.Sorted(maps.Keys(s.cfg.Processors)) {
		p := s.cfg.Processors[id]
		o.Processors = append(o.Processors, diff.Processor{
			ID: id, Accepts: p.Accepts, Returns: p.Returns, Path: p.Path, Args: p.Args, Env: p.Env, Stall: config.Delay(l.ProcessorStall),
		})
	}
	return o
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

// unpackDiffers says by which differs layers are unpacked: unpack_config's, else those of the diff service that there are.
func (s *Server) unpackDiffers(p *parts) (func(ocispec.Platform, string) []local.Differ, error) {
	there := slices.DeleteFunc(slices.Clone(s.cfg.Differs), func(name string) bool { return p.differs[name] == nil })
	def, err := p.localDiffers(there)
	if err != nil {
		return nil, err
	}
	type entry struct {
		config.Unpack
		differs []local.Differ
	}
	var entries []entry
	for _, u := range s.cfg.Transfer.Unpacks {
		e := entry{u, def}
		if u.Differ != "" {
			if e.differs, err = p.localDiffers([]string{u.Differ}); err != nil {
				return nil, fmt.Errorf("unpack_config %w", err)
			}
		}
		entries = append(entries, e)
	}
	return func(platform ocispec.Platform, snapshotter string) []local.Differ {
		for _, e := range entries {
			if fits(e.Unpack, platform) && (e.Snapshotter == "" || e.Snapshotter == snapshotter) {
				return e.differs
			}
		}
		return def
	}, nil
}

// fits tells whether an entry of unpack_config is for images of the platform.
func fits(u config.Unpack, platform ocispec.Platform) bool {
	if u.Platform == "" {
		return platforms.Default().Match(platform)
	}
	p, err := platforms.Parse(u.Platform)
	return err == nil && platforms.Only(p).Match(platform)
}

// snapshotterOf is the one that images of a platform are unpacked to by default in the namespace of ctx.
func (s *Server) snapshotterOf(ctx context.Context, platform ocispec.Platform) (string, error) {
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
	for _, u := range s.cfg.Transfer.Unpacks {
		if u.Snapshotter != "" && fits(u, platform) {
			return u.Snapshotter, nil
		}
	}
	return overlayfs.Name, nil
}
