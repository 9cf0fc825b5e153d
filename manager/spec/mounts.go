package spec

import (
	"encoding/csv"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Mounts adds mounts. One on the very path of an earlier one takes its place, in the order too: nothing stays mounted
// out of sight below it, and what is mounted further in (/dev/pts in /dev) stays in view.
func Mounts(ms ...specs.Mount) Option {
	return func(s *specs.Spec) error {
		for _, m := range ms {
			if err := validMount(m); err != nil {
				return err
			}
			m.Destination = path.Clean(m.Destination)
			m.Options = slices.Clone(m.Options)
			if i := slices.IndexFunc(s.Mounts, func(have specs.Mount) bool { return path.Clean(have.Destination) == m.Destination }); i >= 0 {
				s.Mounts[i] = m
			} else {
				s.Mounts = append(s.Mounts, m)
			}
		}
		return nil
	}
}

func validMount(m specs.Mount) error {
	bind := m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
	wrong := ""
	switch {
	case !path.IsAbs(m.Destination):
		wrong = "the destination is not an absolute path"
	case path.Clean(m.Destination) == "/":
		wrong = "the destination is the root"
	case m.Type == "" && !bind:
		wrong = "the type is missing"
	case bind && !path.IsAbs(m.Source):
		wrong = "the source of a bind mount is not an absolute path"
	case strings.ContainsRune(m.Destination+m.Source+m.Type, 0):
		wrong = "there is a zero byte in it"
	default:
		return nil
	}
	return fmt.Errorf("mount of %q on %q: %s: %w", m.Source, m.Destination, wrong, errdefs.ErrInvalidArgument)
}

// ParseMount reads "type=bind,src=/a,dst=/b,options=rbind:ro": comma-separated keys type, src (source), dst
// (destination, target) and options, whose values stand between colons. A field with a comma in it is quoted as in CSV.
// A mount with an absolute source and no type is a bind mount, and a bind mount that does not say whether it is
// recursive is.
func ParseMount(s string) (specs.Mount, error) {
	wrong := func(format string, args ...any) (specs.Mount, error) {
		return specs.Mount{}, fmt.Errorf("mount %q: %s: %w", s, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	if strings.ContainsAny(s, "\r\n\x00") {
		return wrong("line breaks and zero bytes are not possible")
	}
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return wrong("fields separated by commas expected: %v", err)
	}
	var m specs.Mount
	seen := map[string]bool{}
	for _, f := range fields {
		key, value, ok := strings.Cut(f, "=")
		if !ok {
			return wrong("%q is not KEY=VALUE", f)
		}
		switch key {
		case "source":
			key = "src"
		case "destination", "target":
			key = "dst"
		}
		if seen[key] {
			return wrong("%s is there twice", key)
		}
		seen[key] = true
		switch key {
		case "type":
			m.Type = value
		case "src":
			m.Source = value
		case "dst":
			m.Destination = value
		case "options":
			m.Options = slices.DeleteFunc(strings.Split(value, ":"), func(o string) bool { return o == "" })
		default:
			return wrong("unknown key %q; known are type, src, dst and options", key)
		}
	}
	if m.Type == "" && path.IsAbs(m.Source) {
		m.Type = "bind"
	}
	if m.Type == "bind" && !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") {
		m.Options = append([]string{"rbind"}, m.Options...)
	}
	if err := validMount(m); err != nil {
		return specs.Mount{}, err
	}
	m.Destination = path.Clean(m.Destination)
	return m, nil
}
