// Package overlay knows how the snapshotters that stack layers ask for an overlay mount.
package overlay

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/types"

	"github.com/managerd/managerd/shimapi/mount"
)

// Needed gives the options without which this kernel's overlayfs does not do for layers.
func Needed() []string { return needed("/sys/module/overlay/parameters", inUserns()) }

func needed(parameters string, userns bool) []string {
	var out []string
	if _, err := os.Stat(filepath.Join(parameters, "index")); err == nil {
		out = append(out, "index=off") // the index refuses to mount a layer in two overlays at once
	}
	if userns {
		return append(out, "userxattr") // which excludes metacopy
	}
	if v, err := os.ReadFile(filepath.Join(parameters, "metacopy")); err == nil && strings.TrimSpace(string(v)) == "Y" {
		out = append(out, "metacopy=off") // a layer must have the data of the files that it changes
	}
	return out
}

// inUserns: the initial user namespace is the one that maps everything onto itself.
func inUserns() bool {
	m, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return false
	}
	f := strings.Fields(string(m))
	return len(f) != 3 || f[0] != "0" || f[1] != "0" || f[2] != "4294967295"
}

// Mount is the mount. An empty upper makes it read-only; lower is escaped already (mount.Escape), and joined.
func Mount(options []string, work, upper, lower string) *types.Mount {
	o := append([]string{}, options...)
	if upper != "" {
		o = append(o, "workdir="+mount.Escape(work), "upperdir="+mount.Escape(upper))
	}
	return &types.Mount{Type: "overlay", Source: "overlay", Options: append(o, "lowerdir="+lower)}
}
