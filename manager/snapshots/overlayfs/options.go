package overlayfs

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Options is what the snapshotter can be told.
type Options struct {
	Mount         []string // for every overlay mount
	UpperdirLabel bool     // LabelUpper is told of each snapshot
	SyncRemove    bool     // removals are answered when the files are gone
	SlowChown     bool     // clients may copy an image to change its owners
}

// LabelUpper is the label with the directory of what a snapshot changed, as containerd calls it.
const LabelUpper = "containerd.io/snapshot/overlay.upperdir"

// volatile is the option not to sync anything, see Backend.fresh.
const volatile = "volatile"

// checked says whether the options are ones that are to be given.
func (o Options) checked() error {
	for _, opt := range o.Mount {
		switch k, _, _ := strings.Cut(opt, "="); k {
		case "":
			return fmt.Errorf("mount_options has an empty one: %w", errdefs.ErrInvalidArgument)
		case "lowerdir", "upperdir", "workdir", "lowerdir+", "uidmap", "gidmap", "ro", "rw":
			return fmt.Errorf("mount_options has %q, which each snapshot has of its own: %w", opt, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// join is what is needed and what is asked for, of which the latter counts.
func join(needed, asked []string) (all []string, isVolatile bool) {
	for _, n := range needed {
		name, _, _ := strings.Cut(n, "=")
		if !slices.ContainsFunc(asked, func(a string) bool { k, _, _ := strings.Cut(a, "="); return k == name }) {
			all = append(all, n)
		}
	}
	for _, a := range asked {
		if a == volatile {
			isVolatile = true
		} else {
			all = append(all, a)
		}
	}
	return all, isVolatile
}
