package config

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// Plugins in version 1 had short names (containerd's PLUGINS.md, "Version 1"); these are the ones that could be configured
// or disabled.
var shortNames = map[string]string{
	"cri": "io.containerd.grpc.v1.cri", "containers": "io.containerd.grpc.v1.containers", "content": "io.containerd.content.v1.content",
	"diff": "io.containerd.grpc.v1.diff", "events": "io.containerd.grpc.v1.events", "healthcheck": "io.containerd.grpc.v1.healthcheck",
	"images": "io.containerd.grpc.v1.images", "introspection": "io.containerd.grpc.v1.introspection", "leases": "io.containerd.grpc.v1.leases",
	"namespaces": "io.containerd.grpc.v1.namespaces", "snapshots": "io.containerd.grpc.v1.snapshots", "tasks": "io.containerd.grpc.v1.tasks",
	"version": "io.containerd.grpc.v1.version", "scheduler": "io.containerd.gc.v1.scheduler", "opt": "io.containerd.internal.v1.opt",
	"restart": "io.containerd.internal.v1.restart", "bolt": "io.containerd.metadata.v1.bolt", "cgroups": "io.containerd.monitor.v1.cgroups",
	"linux": "io.containerd.runtime.v1.linux", "walking": "io.containerd.differ.v1.walking", "aufs": snapshotterType + ".aufs",
	"btrfs": snapshotterType + ".btrfs", "devmapper": snapshotterType + ".devmapper", "native": snapshotterType + ".native",
	"overlayfs": snapshotterType + ".overlayfs", "zfs": snapshotterType + ".zfs",
}

// Migrate writes a file of version 1 or 2 as one of the current version. Comments are not carried over. name is the
// file's, for errors; those wrap InvalidArgument.
func Migrate(data []byte, name string) ([]byte, error) {
	f, err := parse(data, name)
	if err != nil {
		return nil, err
	}
	version := int64(1)
	if v, ok := f.tree["version"]; ok {
		if version, ok = v.(int64); !ok {
			return nil, fmt.Errorf("%s: version must be an integer, not %s: %w", f.at("version"), describe(v), errdefs.ErrInvalidArgument)
		}
	}
	if version > Version {
		return nil, f.checkVersion(true)
	}
	if version < oldestVersion {
		for _, list := range []string{"disabled_plugins", "required_plugins"} {
			names, _ := f.tree[list].([]any)
			for i, n := range names {
				if s, ok := n.(string); ok {
					names[i] = longName(s)
				}
			}
		}
		if plugins, ok := f.tree["plugins"].(map[string]any); ok {
			long := map[string]any{}
			for n, v := range plugins {
				l := longName(n)
				if _, twice := long[l]; twice {
					return nil, fmt.Errorf("%s: plugins %s and %s are the same: %w", f.at("plugins", n), n, l, errdefs.ErrInvalidArgument)
				}
				long[l] = v
			}
			f.tree["plugins"] = long
		}
	}
	f.tree["version"] = int64(Version)
	var out bytes.Buffer
	e := toml.NewEncoder(&out)
	e.SetIndentTables(true)
	if err := e.Encode(f.tree); err != nil {
		return nil, fmt.Errorf("%s: cannot write it as version %d: %w", name, Version, err)
	}
	return out.Bytes(), nil
}

func longName(s string) string {
	if long, ok := shortNames[s]; ok && !strings.Contains(s, ".") {
		return long
	}
	return s
}
