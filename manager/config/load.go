package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// Warning is something in a file that has no effect.
type Warning struct {
	File string
	Line int
	Key  string
	Text string
}

func (w Warning) String() string { return fmt.Sprintf("%s:%d: %s: %s", w.File, w.Line, w.Key, w.Text) }

// Load reads a file and what it imports over the defaults. Errors name file, line and key, and wrap InvalidArgument, or
// NotFound for a file that is not there.
func Load(path string) (*Config, []Warning, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, nil, err
	}
	l := &loader{cfg: Default(), read: map[string]bool{}}
	if err := l.load(path, ""); err != nil {
		return nil, nil, err
	}
	return l.cfg, l.warnings, nil
}

type loader struct {
	cfg      *Config
	read     map[string]bool // by path: a file that imports one that imports it is read once
	warnings []Warning
}

// load reads one file and then what it imports. by names the file and line that asked for it, "" for the first.
func (l *loader) load(path, by string) error {
	if l.read[path] {
		return nil
	}
	l.read[path] = true
	data, err := os.ReadFile(path)
	if err != nil {
		var kind error = errdefs.ErrInvalidArgument
		if errors.Is(err, fs.ErrNotExist) {
			kind = errdefs.ErrNotFound
		}
		if by != "" {
			return fmt.Errorf("%s: cannot import: %w: %w", by, err, kind)
		}
		return fmt.Errorf("cannot read the configuration: %w: %w", err, kind)
	}
	f, err := parse(data, path)
	if err != nil {
		return err
	}
	if err := f.checkVersion(by == ""); err != nil {
		return err
	}
	if err := l.apply(f); err != nil {
		return err
	}
	patterns, _ := f.tree["imports"].([]any) // apply has checked it
	for _, p := range patterns {
		if err := l.imports(f, p.(string)); err != nil {
			return err
		}
	}
	return nil
}

// imports reads the files that match a pattern, in the order of their names.
func (l *loader) imports(f *file, pattern string) error {
	at := f.at("imports")
	abs := pattern
	if !filepath.IsAbs(abs) {
		abs = filepath.Join(filepath.Dir(f.path), abs)
	}
	if !strings.ContainsAny(abs, `*?[\`) {
		return l.load(filepath.Clean(abs), at)
	}
	found, err := filepath.Glob(abs)
	if err != nil {
		return fmt.Errorf("%s: imports: pattern %q is malformed: %w", at, pattern, errdefs.ErrInvalidArgument)
	}
	slices.Sort(found)
	for _, p := range found {
		if err := l.load(p, at); err != nil {
			return err
		}
	}
	return nil
}

// apply lays a file over the configuration.
func (l *loader) apply(f *file) error {
	var errs []error
	known := map[string]*key{}
	for i := range keys {
		known[id(keys[i].path)] = &keys[i]
	}
	var walk func(path []string, v any)
	walk = func(path []string, v any) {
		if old, err := l.oldRegistry(f, path, v); old {
			if err != nil {
				errs = append(errs, err)
			}
			return
		}
		if is, err := l.unpacks(f, path, v); is {
			if err != nil {
				errs = append(errs, err)
			}
			return
		}
		if k := known[id(canonical(path))]; k != nil {
			got, err := convert(k.def, v)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %s %w: %w", f.at(path...), k.name(), err, errdefs.ErrInvalidArgument))
				return
			}
			if list, ok := got.([]string); ok && len(path) == 1 { // lists of files grow
				before := value(k.field(l.cfg)).([]string)
				for _, s := range list {
					if !slices.Contains(before, s) {
						before = append(before, s)
					}
				}
				got = before
			} else if k.check != nil {
				if why := k.check(got); why != "" {
					errs = append(errs, fmt.Errorf("%s: %s %s: %w", f.at(path...), k.name(), why, errdefs.ErrInvalidArgument))
				}
			}
			set(k.field(l.cfg), got)
			return
		}
		if len(path) == 1 && path[0] == proxySection {
			if err := l.proxies(f, v); err != nil {
				errs = append(errs, err)
			}
			return
		}
		if len(path) == 1 && path[0] == processorSection {
			if err := l.processors(f, v); err != nil {
				errs = append(errs, err)
			}
			return
		}
		table, isTable := v.(map[string]any)
		if section(path) {
			if !isTable {
				errs = append(errs, fmt.Errorf("%s: %s must be a table, not %s: %w", f.at(path...), joined(path), describe(v), errdefs.ErrInvalidArgument))
				return
			}
			rest := map[string]any{}
			for _, name := range slices.Sorted(maps.Keys(table)) {
				below := append(slices.Clone(path), name)
				if mostlyUnknown(path) && !section(below) {
					rest[name] = table[name]
					continue
				}
				walk(below, table[name])
			}
			if len(rest) > 0 {
				l.unknown(f, path, rest)
			}
			return
		}
		l.unknown(f, path, v)
	}
	walk(nil, f.tree)
	slices.SortStableFunc(l.warnings, func(a, b Warning) int {
		if a.File != b.File {
			return 0 // in the order they were read
		}
		return a.Line - b.Line
	})
	return errors.Join(errs...)
}

// mostlyUnknown says whether a section is containerd's, and only a small part of it is known: the rest is told of at once.
func mostlyUnknown(path []string) bool {
	return len(path) == 2 && (path[1] == criImages || path[1] == criPlugin)
}

// section says whether keys stand below this path.
func section(path []string) bool {
	if len(path) == 2 && path[1] == criPlugin {
		return true
	}
	path = canonical(path)
	prefix := id(path)
	if len(path) > 0 {
		prefix += "\x00"
	}
	return slices.ContainsFunc(keys, func(k key) bool { return strings.HasPrefix(id(k.path), prefix) && len(k.path) > len(path) })
}

// unknown warns of a key, or of a whole table, that has no effect. What containerd's own default configuration says,
// empty values, is passed over: nothing was asked for.
func (l *loader) unknown(f *file, path []string, v any) {
	dotted := strings.Join(path, ".")
	for _, i := range ignored {
		if dotted != i.prefix && dotted+"." != i.prefix && (!strings.HasSuffix(i.prefix, ".") || !strings.HasPrefix(dotted, i.prefix)) {
			continue
		}
		if strings.HasPrefix(i.prefix, "plugins.") && nearest(path) != "" {
			break // more likely a slip of the pen
		}
		if i.why != "" && !empty(v) {
			l.warn(f, path, "has no effect: "+i.why)
		}
		return
	}
	text := "is not known and has no effect"
	if near := nearest(path); near != "" {
		text += "; did you mean " + near + "?"
	}
	l.warn(f, path, text)
}

func (l *loader) warn(f *file, path []string, text string) {
	l.warnings = append(l.warnings, Warning{File: f.path, Line: f.line(path), Key: joined(path), Text: text})
}

// empty says whether a value asks for nothing: zero, or a table of such values.
func empty(v any) bool {
	switch v := v.(type) {
	case string:
		return v == ""
	case int64:
		return v == 0
	case bool:
		return !v
	case float64:
		return v == 0
	case []any:
		return len(v) == 0
	case map[string]any:
		for _, e := range v {
			if !empty(e) {
				return false
			}
		}
		return true
	}
	return false
}

// nearest is the known key, or section, beside this one whose name is likely to have been meant, or "".
func nearest(path []string) string {
	best, least := "", 3 // slips of the pen are shorter
	for _, k := range keys {
		if len(k.path) < len(path) || id(k.path[:len(path)-1]) != id(path[:len(path)-1]) {
			continue
		}
		candidate, name := k.path[len(path)-1], path[len(path)-1]
		if d := distance(name, candidate); d > 0 && d < least && d*2 < len(candidate) {
			best, least = joined(k.path[:len(path)]), d
		}
	}
	return best
}

// distance is Levenshtein's: how many letters are to be put in, taken out or changed.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j]+1, row[j+1]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}

// convert makes a TOML value one of the type of def.
func convert(def, v any) (any, error) {
	switch def.(type) {
	case string:
		if s, ok := v.(string); ok {
			return s, nil
		}
		return nil, fmt.Errorf("must be a string, not %s", describe(v))
	case bool:
		if b, ok := v.(bool); ok {
			return b, nil
		}
		return nil, fmt.Errorf("must be true or false, not %s", describe(v))
	case float64:
		switch n := v.(type) {
		case float64:
			return n, nil
		case int64:
			return float64(n), nil
		}
		return nil, fmt.Errorf("must be a number, not %s", describe(v))
	case int:
		if n, ok := v.(int64); ok {
			if int64(int(n)) == n {
				return int(n), nil
			}
			return nil, fmt.Errorf("%d is too large", n)
		}
		return nil, fmt.Errorf("must be an integer, not %s", describe(v))
	}
	list, ok := v.([]any)
	if !ok {
		return nil, fmt.Errorf("must be a list of strings, not %s", describe(v))
	}
	out := make([]string, len(list))
	for i, e := range list {
		if out[i], ok = e.(string); !ok {
			return nil, fmt.Errorf("must be a list of strings, not one with %s", describe(e))
		}
	}
	return out, nil
}

// describe says what a TOML value is.
func describe(v any) string {
	switch v := v.(type) {
	case string:
		return fmt.Sprintf("the string %q", v)
	case int64:
		return fmt.Sprintf("the integer %d", v)
	case bool:
		return fmt.Sprintf("the boolean %t", v)
	case float64:
		return fmt.Sprintf("the float %g", v)
	case map[string]any:
		return "a table"
	case []any:
		return "a list"
	case toml.LocalDate, toml.LocalTime, toml.LocalDateTime:
		return "a time"
	}
	return fmt.Sprintf("a %T", v)
}
