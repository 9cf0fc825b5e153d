package overlayfs

import (
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/shimapi/mount"
)

// Labels with the mappings CONTAINER:HOST:SIZE[,...] that a snapshot's layers are to be shown with, as containerd's
// clients write them.
const (
	LabelUIDMapping = "containerd.io/snapshot/uidmapping"
	LabelGIDMapping = "containerd.io/snapshot/gidmapping"
)

// Capabilities as containerd's clients know them: the snapshotter maps IDs; it must not be worked around by a copy.
const (
	capRemap     = "remap-ids"
	capOnlyRemap = "only-remap-ids"
)

// Capabilities is what the plugin list says of the snapshotter.
func (b *Backend) Capabilities() []string {
	var out []string
	if !b.cfg.SlowChown {
		out = append(out, capOnlyRemap)
	}
	if b.remaps {
		out = append(out, capRemap)
	}
	return out
}

// remapOptions are the mount options of a snapshot's mappings.
func (b *Backend) remapOptions(labels map[string]string) []string {
	u, g := labels[LabelUIDMapping], labels[LabelGIDMapping]
	if !b.remaps || u == "" || g == "" {
		return nil
	}
	return []string{"uidmap=" + u, "gidmap=" + g}
}

// remapped is who owns, on the host, what uid and gid own in the layers.
func (b *Backend) remapped(s snapshots.Snapshot, uid, gid int) (int, int, error) {
	u, g := s.Labels[LabelUIDMapping], s.Labels[LabelGIDMapping]
	if !b.remaps || u == "" && g == "" {
		return uid, gid, nil
	}
	if u == "" || g == "" {
		return 0, 0, fmt.Errorf("the labels %s and %s go together: %w", LabelUIDMapping, LabelGIDMapping, errdefs.ErrInvalidArgument)
	}
	uids, err := mount.ParseIDs(LabelUIDMapping, u)
	if err != nil {
		return 0, 0, err
	}
	gids, err := mount.ParseIDs(LabelGIDMapping, g)
	if err != nil {
		return 0, 0, err
	}
	return host(uids, uid), host(gids, gid), nil
}

// host gives the ID on the host; one that is not mapped stays.
func host(maps []syscall.SysProcIDMap, id int) int {
	for _, m := range maps {
		if id >= m.ContainerID && id < m.ContainerID+m.Size {
			return m.HostID + id - m.ContainerID
		}
	}
	return id
}
