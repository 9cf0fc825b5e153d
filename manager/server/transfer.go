package server

import (
	"context"
	"path/filepath"

	"github.com/containerd/errdefs"

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
	p.registry = registry.New(registry.Config{ConfigPath: filepath.SplitList(s.cfg.Transfer.ConfigPath), Logger: s.log})
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
