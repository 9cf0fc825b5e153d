package server

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/config"
	"github.com/managerd/managerd/manager/introspection"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/snapshots/blockfile"
	"github.com/managerd/managerd/manager/snapshots/btrfs"
	"github.com/managerd/managerd/manager/snapshots/devmapper"
	"github.com/managerd/managerd/manager/snapshots/erofs"
	"github.com/managerd/managerd/manager/snapshots/native"
	"github.com/managerd/managerd/manager/snapshots/overlayfs"
	"github.com/managerd/managerd/manager/snapshots/zfs"
)

// snapshotters is one plugin for each.
func (s *Server) snapshotters(ctx context.Context, p *parts, platform []string) []plugin {
	one := func(name string, open func(root string) (snapshots.Backend, error)) plugin {
		return s.snapshotter(ctx, p, name, platform, open)
	}
	c := s.cfg
	all := []plugin{
		one(overlayfs.Name, func(root string) (snapshots.Backend, error) {
			return overlayfs.New(root, overlayfs.Options{
				Mount: c.Overlayfs.MountOptions, UpperdirLabel: c.Overlayfs.UpperdirLabel,
				SyncRemove: c.Overlayfs.SyncRemove, SlowChown: c.Overlayfs.SlowChown,
			})
		}),
		one(native.Name, func(root string) (snapshots.Backend, error) { return native.New(root) }),
		one(btrfs.Name, func(root string) (snapshots.Backend, error) { return btrfs.New(root) }),
		one(erofs.Name, func(root string) (snapshots.Backend, error) {
			return erofs.New(root, erofs.Options{OverlayMount: c.Erofs.OvlMountOptions})
		}),
		one(blockfile.Name, func(root string) (snapshots.Backend, error) {
			return blockfile.New(root, blockfile.Options{
				Scratch: c.Blockfile.ScratchFile, Recreate: c.Blockfile.RecreateScratch, FSType: c.Blockfile.FSType, Mount: c.Blockfile.MountOptions,
			})
		}),
		one(devmapper.Name, func(root string) (snapshots.Backend, error) {
			d := c.Devmapper
			return devmapper.New(root, devmapper.Options{
				Pool: d.PoolName, BaseSize: config.Size(d.BaseImageSize), AsyncRemove: d.AsyncRemove, Discard: d.DiscardBlocks,
				FSType: d.FSType, FSOptions: strings.Fields(d.FSOptions),
			})
		}),
		one(zfs.Name, func(root string) (snapshots.Backend, error) { return zfs.New(root) }),
		one("aufs", func(string) (snapshots.Backend, error) {
			return nil, fmt.Errorf("aufs was removed from Linux, use overlayfs: %w", errdefs.ErrNotImplemented)
		}),
	}
	for _, name := range c.ProxyNames() {
		all = append(all, s.proxied(ctx, p, name, c.Proxies[name], platform))
	}
	return all
}

// opening is how long a snapshotter may take before the daemon goes on without it, until it is there.
const opening = 500 * time.Millisecond

// snapshotter is the plugin of a backend below the snapshotter's root; all of them share a store.
func (s *Server) snapshotter(ctx context.Context, p *parts, name string, platform []string, open func(root string) (snapshots.Backend, error)) plugin {
	root := s.cfg.SnapshotterRoot(name)
	var backend atomic.Pointer[snapshots.Backend]
	warn := func() string {
		if p.snapshots == nil {
			return ""
		}
		if err := p.snapshots.Pending(name); err != nil {
			return err.Error()
		}
		return ""
	}
	return plugin{
		Plugin: introspection.Plugin{Type: introspection.TypeSnapshotter, ID: name, Platforms: platform,
			Requires: []string{introspection.TypeMetadata}, Exports: map[string]string{"root": root}, Warn: warn},
		capabilities: func() []string {
			b := backend.Load()
			if b == nil {
				return nil
			}
			if c, ok := (*b).(interface{ Capabilities() []string }); ok {
				return c.Capabilities()
			}
			return nil
		},
		build: func() (err error) {
			store := p.snapshots
			if store == nil {
				if store, err = snapshots.NewStore(ctx, s.db, s.db, nil); err != nil {
					return err
				}
			}
			err = store.Open(ctx, name, opening, func() (snapshots.Backend, error) {
				b, err := open(root)
				if err == nil {
					backend.Store(&b)
				}
				return b, err
			}, s.changed)
			if err != nil {
				return err
			}
			if p.snapshots == nil {
				p.snapshots = store
				s.closers = append(s.closers, store.Close)
			}
			return nil
		},
	}
}
