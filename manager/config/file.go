package config

import (
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// file is a parsed configuration file: its values, and the lines that they stand in.
type file struct {
	path  string
	tree  map[string]any
	lines map[string]int // by id of the key
}

// id makes a key path a map key; no TOML key on one line has a NUL.
func id(path []string) string { return strings.Join(path, "\x00") }

// parse reads TOML. Its error, InvalidArgument, has the line.
func parse(data []byte, path string) (*file, error) {
	f := &file{path: path, tree: map[string]any{}, lines: map[string]int{}}
	if err := toml.Unmarshal(data, &f.tree); err != nil {
		var de *toml.DecodeError
		if errors.As(err, &de) {
			row, col := de.Position()
			at := fmt.Sprintf("%s:%d:%d", path, row, col)
			if key := de.Key(); len(key) > 0 {
				at += ": " + joined(key)
			}
			return nil, fmt.Errorf("%s: %s: %w", at, strings.TrimPrefix(de.Error(), "toml: "), errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("%s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	f.locate(data)
	return f, nil
}

// locate notes where every key stands. The data has been parsed once: it is well-formed.
func (f *file) locate(data []byte) {
	var p unstable.Parser
	p.Reset(data)
	var table []string
	note := func(prefix []string, n *unstable.Node) []string {
		path := append([]string(nil), prefix...)
		for it := n.Key(); it.Next(); {
			k := it.Node()
			path = append(path, string(k.Data))
			if _, ok := f.lines[id(path)]; !ok {
				f.lines[id(path)] = p.Shape(k.Raw).Start.Line
			}
		}
		return path
	}
	var inline func(prefix []string, n *unstable.Node)
	inline = func(prefix []string, n *unstable.Node) {
		path := note(prefix, n)
		if v := n.Value(); v.Kind == unstable.InlineTable {
			for it := v.Children(); it.Next(); {
				inline(path, it.Node())
			}
		}
	}
	for p.NextExpression() {
		switch e := p.Expression(); e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = note(nil, e)
		case unstable.KeyValue:
			inline(table, e)
		}
	}
}

// line is where a key stands, or the nearest table above it.
func (f *file) line(path []string) int {
	for n := len(path); n > 0; n-- {
		if l, ok := f.lines[id(path[:n])]; ok {
			return l
		}
	}
	return 1
}

// at is FILE:LINE of a key.
func (f *file) at(path ...string) string { return fmt.Sprintf("%s:%d", f.path, f.line(path)) }

// checkVersion refuses files whose keys mean something else. A file that is imported need not say its version.
func (f *file) checkVersion(needed bool) error {
	v, found := f.tree["version"]
	if !found && !needed {
		return nil
	}
	n, ok := v.(int64)
	switch {
	case found && !ok:
		return fmt.Errorf("%s: version must be an integer, not %s: %w", f.at("version"), describe(v), errdefs.ErrInvalidArgument)
	case !found:
		return fmt.Errorf("%s: no version is given, so it is version 1, which is too old: run managerd --config %s config migrate: %w",
			f.path, f.path, errdefs.ErrInvalidArgument)
	case n < oldestVersion:
		return fmt.Errorf("%s: version %d is too old: run managerd --config %s config migrate: %w", f.at("version"), n, f.path, errdefs.ErrInvalidArgument)
	case n > Version:
		return fmt.Errorf("%s: version %d is newer than this managerd, which reads %d and %d: %w",
			f.at("version"), n, oldestVersion, Version, errdefs.ErrInvalidArgument)
	}
	return nil
}
