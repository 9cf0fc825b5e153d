package mounts

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/template"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/shimapi/mount"
)

// What may stand before a mount's type, with a slash behind it.
const (
	// formatted mounts refer to those before them in source, target and options: {{ mount N }} is where the N-th is
	// mounted, {{ source N }} and {{ target N }} are what it was made of, {{ overlay N M }} the points of N to M, in either
	// direction, as an overlay's lowerdir.
	formatted = "format/"
	// directed mounts have directories made before: by options mkdirOption=PATH[:MODE[:UID:GID]].
	directed = "mkdir/"
)

const mkdirOption = "X-containerd.mkdir.path"

// plan is a list of mounts, of which those from system on are the client's.
type plan struct {
	mounts []*types.Mount
	system int
}

func newPlan(mounts []*types.Mount) (*plan, error) {
	p := &plan{mounts: mounts}
	found := false
	for i, m := range mounts {
		kind := m.GetType()
		for {
			if rest, ok := strings.CutPrefix(kind, formatted); ok {
				kind, found, p.system = rest, true, i
			} else if rest, ok := strings.CutPrefix(kind, directed); ok {
				kind, found = rest, true
			} else {
				break
			}
		}
		if before, _, ok := strings.Cut(kind, "/"); ok {
			return nil, fmt.Errorf("mount %d: %q before its type is not known: %w", i, before, errdefs.ErrNotImplemented)
		}
	}
	if !found {
		return nil, fmt.Errorf("the client can mount them by itself: %w", errdefs.ErrNotImplemented)
	}
	return p, nil
}

// resolve does what stands before a mount's type, and gives a mount as it can be mounted.
func (p *plan) resolve(m *types.Mount, before []Active) (*types.Mount, error) {
	out := &types.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: append([]string(nil), m.Options...)}
	for {
		if rest, ok := strings.CutPrefix(out.Type, formatted); ok {
			out.Type = rest
			if err := format(out, before); err != nil {
				return nil, err
			}
		} else if rest, ok := strings.CutPrefix(out.Type, directed); ok {
			out.Type = rest
			if err := makeDirs(out); err != nil {
				return nil, err
			}
		} else {
			return out, nil
		}
	}
}

func format(m *types.Mount, before []Active) error {
	nth := func(n int) (Active, error) {
		if n < 0 || n >= len(before) {
			return Active{}, fmt.Errorf("there is no mount %d before it", n)
		}
		return before[n], nil
	}
	funcs := template.FuncMap{
		"mount":  func(n int) (string, error) { a, err := nth(n); return a.Point, err },
		"source": func(n int) (string, error) { a, err := nth(n); return a.Mount.GetSource(), err },
		"target": func(n int) (string, error) { a, err := nth(n); return a.Mount.GetTarget(), err },
		"overlay": func(from, to int) (string, error) {
			step := 1
			if from > to {
				step = -1
			}
			var points []string
			for n := from; ; n += step {
				a, err := nth(n)
				if err != nil {
					return "", err
				}
				points = append(points, mount.Escape(a.Point))
				if n == to {
					return strings.Join(points, ":"), nil
				}
			}
		},
	}
	fields := []*string{&m.Source, &m.Target}
	for i := range m.Options {
		fields = append(fields, &m.Options[i])
	}
	for _, f := range fields {
		t, err := template.New("").Funcs(funcs).Parse(*f)
		if err != nil {
			return fmt.Errorf("%q: %w: %w", *f, err, errdefs.ErrInvalidArgument)
		}
		var b strings.Builder
		if err := t.Execute(&b, nil); err != nil {
			return fmt.Errorf("%q: %w: %w", *f, err, errdefs.ErrInvalidArgument)
		}
		*f = b.String()
	}
	return nil
}

// makeDirs makes the directories that options name, and takes these options away.
func makeDirs(m *types.Mount) error {
	var rest []string
	for _, o := range m.Options {
		v, ok := strings.CutPrefix(o, mkdirOption+"=")
		if !ok {
			rest = append(rest, o)
			continue
		}
		if err := makeDir(v); err != nil {
			return fmt.Errorf("%s: %w", o, err)
		}
	}
	m.Options = rest
	return nil
}

func makeDir(spec string) error {
	wrong := func(what string) error { return fmt.Errorf("%s: %w", what, errdefs.ErrInvalidArgument) }
	parts := strings.Split(spec, ":")
	if !filepath.IsAbs(parts[0]) {
		return wrong("the path is not absolute")
	}
	mode, uid, gid := uint64(0o700), -1, -1
	var err error
	switch len(parts) {
	case 4:
		u, uerr := strconv.ParseUint(parts[2], 10, 31)
		g, gerr := strconv.ParseUint(parts[3], 10, 31)
		if uerr != nil || gerr != nil {
			return wrong("the owner is none")
		}
		uid, gid = int(u), int(g)
		fallthrough
	case 2:
		if mode, err = strconv.ParseUint(parts[1], 8, 12); err != nil {
			return wrong("the mode is none")
		}
	case 1:
	default:
		return wrong("it is not PATH[:MODE[:UID:GID]]")
	}
	err = os.Mkdir(parts[0], fs.FileMode(mode&0o777))
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil && uid >= 0 {
		err = os.Chown(parts[0], uid, gid)
	}
	return err
}
