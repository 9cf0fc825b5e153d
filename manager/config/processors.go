package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// processorSection is the table of stream processors, one below it for each: ID → Processor.
const processorSection = "stream_processors"

// Processor is a program that makes a layer, or something nearer to one, of blobs of other media types.
type Processor struct {
	Accepts []string // media types
	Returns string   // media type
	Path    string   // of the program, or its name in PATH
	Args    []string
	Env     []string // NAME=VALUE
}

// processors lays the table over what files before have said; the later one of an ID counts whole.
func (l *loader) processors(f *file, v any) error {
	wrong := func(path []string, format string, args ...any) error {
		return fmt.Errorf("%s: %s "+format+": %w", append(append([]any{f.at(path...), joined(path)}, args...), errdefs.ErrInvalidArgument)...)
	}
	table, ok := v.(map[string]any)
	if !ok {
		return wrong([]string{processorSection}, "must be a table, not %s", describe(v))
	}
	for _, id := range slices.Sorted(maps.Keys(table)) {
		path := []string{processorSection, id}
		settings, ok := table[id].(map[string]any)
		if !ok {
			return wrong(path, "must be a table, not %s", describe(table[id]))
		}
		var p Processor
		for _, key := range slices.Sorted(maps.Keys(settings)) {
			at, v := append(slices.Clone(path), key), settings[key]
			var err error
			switch key {
			case "accepts":
				err = take(&p.Accepts, v)
			case "returns":
				err = take(&p.Returns, v)
			case "path":
				err = take(&p.Path, v)
			case "args":
				err = take(&p.Args, v)
			case "env":
				err = take(&p.Env, v)
			default:
				l.warn(f, at, "is not known and has no effect")
			}
			if err != nil {
				return wrong(at, "%w", err)
			}
		}
		switch {
		case len(p.Accepts) == 0 || slices.Contains(p.Accepts, ""):
			return wrong(append(path, "accepts"), "must name media types")
		case p.Returns == "":
			return wrong(append(path, "returns"), "must name a media type")
		case slices.Contains(p.Accepts, p.Returns):
			return wrong(append(path, "returns"), "%q is one of those it accepts: there would be no end to it", p.Returns)
		case p.Path == "":
			return wrong(append(path, "path"), "must name a program")
		}
		for _, e := range p.Env {
			if strings.Index(e, "=") < 1 {
				return wrong(append(path, "env"), "%q must be NAME=VALUE", e)
			}
		}
		if l.cfg.Processors == nil {
			l.cfg.Processors = map[string]Processor{}
		}
		l.cfg.Processors[id] = p
	}
	return nil
}

// writeProcessors writes the table as Load reads it back.
func (c *Config) writeProcessors(b *strings.Builder) {
	for _, id := range slices.Sorted(maps.Keys(c.Processors)) {
		p := c.Processors[id]
		fmt.Fprintf(b, "\n[%s]\naccepts = %s\nreturns = %s\npath = %s\n", joined([]string{processorSection, id}),
			literal(p.Accepts), literal(p.Returns), literal(p.Path))
		for _, l := range []struct {
			key  string
			list []string
		}{{"args", p.Args}, {"env", p.Env}} {
			if len(l.list) > 0 {
				fmt.Fprintf(b, "%s = %s\n", l.key, literal(l.list))
			}
		}
	}
}
