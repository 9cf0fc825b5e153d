package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
)

// unpackKey is the array of tables, in the section of the transfer service, that says how images are unpacked.
const unpackKey = "unpack_config"

// Unpack is how images for a platform are unpacked to a snapshotter.
type Unpack struct {
	Platform    string // empty: this machine's
	Snapshotter string // empty: any
	Differ      string // the only one that is asked; empty: those of the diff service
}

// unpacks takes the array; that of a later file counts whole. false: path is of something else.
func (l *loader) unpacks(f *file, path []string, v any) (bool, error) {
	if !slices.Equal(path, in(transferSection, unpackKey)) {
		return false, nil
	}
	wrong := func(format string, args ...any) (bool, error) {
		return true, fmt.Errorf("%s: %s "+format+": %w", append(append([]any{f.at(path...), joined(path)}, args...), errdefs.ErrInvalidArgument)...)
	}
	list, ok := v.([]any)
	if !ok {
		return wrong("must be an array of tables, not %s", describe(v))
	}
	l.cfg.Transfer.Unpacks = nil
	for i, e := range list {
		table, ok := e.(map[string]any)
		if !ok {
			return wrong("must be an array of tables; entry %d is %s", i+1, describe(e))
		}
		var u Unpack
		for _, key := range slices.Sorted(maps.Keys(table)) {
			var err error
			switch key {
			case "platform":
				err = take(&u.Platform, table[key])
			case "snapshotter":
				err = take(&u.Snapshotter, table[key])
			case "differ":
				err = take(&u.Differ, table[key])
			default:
				l.warn(f, append(slices.Clone(path), key), "is not known and has no effect")
			}
			if err != nil {
				return wrong("entry %d: %s %w", i+1, key, err)
			}
		}
		if u.Platform != "" {
			if _, err := platforms.Parse(u.Platform); err != nil {
				return wrong("entry %d: platform %q must be OS/ARCH[/VARIANT]", i+1, u.Platform)
			}
		}
		l.cfg.Transfer.Unpacks = append(l.cfg.Transfer.Unpacks, u)
	}
	return true, nil
}

// writeUnpacks writes the array as Load reads it back.
func (c *Config) writeUnpacks(b *strings.Builder) {
	for _, u := range c.Transfer.Unpacks {
		fmt.Fprintf(b, "\n[[%s]]\n", joined(in(transferSection, unpackKey)))
		for _, l := range []struct{ key, value string }{{"platform", u.Platform}, {"snapshotter", u.Snapshotter}, {"differ", u.Differ}} {
			if l.value != "" {
				fmt.Fprintf(b, "%s = %s\n", l.key, literal(l.value))
			}
		}
	}
}
