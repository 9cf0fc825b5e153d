package mounts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
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
	// filed mounts have their source made before, a file with a file system in it: by options mkfsOption.
	filed = "mkfs/"
)

// looped is the type of what is no mount, but a loop device of the file that is the source.
const looped = "loop"

const mkdirOption = "X-containerd.mkdir.path"

// consumes gives the options that are for what stands before a type.
var consumes = map[string]string{directed: mkdirOption + "=", filed: mkfsOption}

// most is how many mounts one activation has at most: an overlay has 500 layers.
const most = 999

// plan is a list of mounts, of which those from system on are the client's.
type plan struct {
	mounts []*types.Mount
	system int
}

// newPlan says which mounts are to be made here: all before the last one that needs something done, loop devices, and all when
// they are temporary. NotImplemented when there are none.
func newPlan(mounts []*types.Mount, temporary bool) (*plan, error) {
	p := &plan{mounts: mounts}
	if len(mounts) > most {
		return nil, fmt.Errorf("%d are more than %d: %w", len(mounts), most, errdefs.ErrInvalidArgument)
	}
	found := temporary
	for i, m := range mounts {
		before, kind := split(m.GetType())
		if len(before) > 0 {
			found, p.system = true, i
		}
		if kind == looped {
			found, p.system = true, i+1
		}
		if before, _, ok := strings.Cut(kind, "/"); ok {
			return nil, fmt.Errorf("mount %d: %q before its type is not known: %w", i, before, errdefs.ErrNotImplemented)
		}
		for _, o := range m.GetOptions() {
			if strings.HasPrefix(o, mount.ManagerOption) && !slices.ContainsFunc(before, func(b string) bool {
				return consumes[b] != "" && strings.HasPrefix(o, consumes[b])
			}) {
				return nil, fmt.Errorf("mount %d: option %q is for nothing that stands before the type %q: %w", i, o, m.GetType(), errdefs.ErrInvalidArgument)
			}
		}
	}
	if !found {
		return nil, fmt.Errorf("the client can mount them by itself: %w", errdefs.ErrNotImplemented)
	}
	if temporary {
		p.system = len(mounts)
	}
	return p, nil
}

// split gives what stands before a type, and the type itself.
func split(kind string) (before []string, rest string) {
	for {
		i := strings.IndexByte(kind, '/') + 1
		if !slices.Contains([]string{formatted, directed, filed}, kind[:i]) {
			return before, kind
		}
		before, kind = append(before, kind[:i]), kind[i:]
	}
}

// resolve does what stands before a mount's type, and gives a mount as it can be mounted. It is the n-th of the stack in dir.
func (p *plan) resolve(ctx context.Context, dir string, n int, before []Active) (*types.Mount, error) {
	m := p.mounts[n]
	todo, kind := split(m.GetType())
	out := &types.Mount{Type: kind, Source: m.GetSource(), Target: m.GetTarget(), Options: slices.Clone(m.GetOptions())}
	for _, what := range todo {
		var err error
		switch what {
		case formatted:
			err = format(out, before)
		case directed:
			err = makeDirs(out, before)
		case filed:
			var im image
			if im, err = takeImage(out); err != nil {
				break
			}
			if err = inside(im.path, before); err == nil {
				err = im.make(ctx, dir, n)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// inside refuses a path that leads out of the mount that it is below: what is mounted there may be anybody's.
func inside(path string, before []Active) error {
	for _, a := range before {
		if !strings.HasPrefix(filepath.Clean(path), a.Point+"/") {
			continue
		}
		root, err := filepath.EvalSymlinks(a.Point)
		if err != nil {
			return err
		}
		at, err := filepath.EvalSymlinks(path)
		if errors.Is(err, fs.ErrNotExist) {
			at, err = filepath.EvalSymlinks(filepath.Dir(path))
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = errors.Join(err, errdefs.ErrNotFound)
		}
		if err != nil {
			return err
		}
		if at != root && !strings.HasPrefix(at, root+"/") {
			return fmt.Errorf("%s leads out of the mount %s: %w", path, a.Point, errdefs.ErrInvalidArgument)
		}
	}
	return nil
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
func makeDirs(m *types.Mount, before []Active) error {
	var rest []string
	for _, o := range m.Options {
		v, ok := strings.CutPrefix(o, mkdirOption+"=")
		if !ok {
			rest = append(rest, o)
			continue
		}
		if err := makeDir(v, before); err != nil {
			return fmt.Errorf("%s: %w", o, err)
		}
	}
	m.Options = rest
	return nil
}

func makeDir(spec string, before []Active) error {
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
	if err := inside(parts[0], before); err != nil {
		return err
	}
	err = os.Mkdir(parts[0], fs.FileMode(mode&0o777))
	if errors.Is(err, fs.ErrExist) {
		if fi, err := os.Stat(parts[0]); err != nil || !fi.IsDir() {
			return fmt.Errorf("it is there, and no directory: %w", errors.Join(err, errdefs.ErrFailedPrecondition))
		}
		return nil
	}
	if err == nil && uid >= 0 {
		err = os.Chown(parts[0], uid, gid)
	}
	return err
}
