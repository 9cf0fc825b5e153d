package config

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// proxySection is the table of plugins that are other programs, one below it for each: NAME → Proxy.
const proxySection = "proxy_plugins"

// Proxy is a plugin that is another program, which serves one of containerd's services.
type Proxy struct {
	Type         string // snapshot, content, diff or sandbox
	Address      string // path of its socket
	Platform     string // OS/ARCH that the plugin list says; empty: this machine's
	Exports      map[string]string
	Capabilities []string
}

// proxyTypes are the services that containerd has them for.
var proxyTypes = []string{"snapshot", "content", "diff", "sandbox"}

// ProxyNames lists the proxy plugins.
func (c *Config) ProxyNames() []string { return slices.Sorted(maps.Keys(c.Proxies)) }

// proxies lays the table over what files before have said; the later one of a name counts whole.
func (l *loader) proxies(f *file, v any) error {
	wrong := func(path []string, format string, args ...any) error {
		return fmt.Errorf("%s: %s "+format+": %w", append(append([]any{f.at(path...), joined(path)}, args...), errdefs.ErrInvalidArgument)...)
	}
	table, ok := v.(map[string]any)
	if !ok {
		return wrong([]string{proxySection}, "must be a table, not %s", describe(v))
	}
	for _, name := range slices.Sorted(maps.Keys(table)) {
		path := []string{proxySection, name}
		settings, ok := table[name].(map[string]any)
		if !ok {
			return wrong(path, "must be a table, not %s", describe(table[name]))
		}
		var p Proxy
		for _, key := range slices.Sorted(maps.Keys(settings)) {
			at, v := append(slices.Clone(path), key), settings[key]
			var err error
			switch key {
			case "type":
				err = take(&p.Type, v)
			case "address":
				err = take(&p.Address, v)
			case "platform":
				err = take(&p.Platform, v)
			case "capabilities":
				err = take(&p.Capabilities, v)
			case "exports":
				exports, ok := v.(map[string]any)
				if !ok {
					return wrong(at, "must be a table, not %s", describe(v))
				}
				p.Exports = map[string]string{}
				for k, e := range exports {
					s, ok := e.(string)
					if !ok {
						return wrong(append(at, k), "must be a string, not %s", describe(e))
					}
					p.Exports[k] = s
				}
			default:
				l.warn(f, at, "is not known and has no effect")
			}
			if err != nil {
				return wrong(at, "%w", err)
			}
		}
		if !slices.Contains(proxyTypes, p.Type) {
			return wrong(append(path, "type"), "%q is none of %s", p.Type, strings.Join(proxyTypes, ", "))
		}
		p.Address = strings.TrimPrefix(p.Address, "unix://")
		if why := socketPath(p.Address); why != "" {
			return wrong(append(path, "address"), "%s", why)
		}
		p.Address = filepath.Clean(p.Address)
		if l.cfg.Proxies == nil {
			l.cfg.Proxies = map[string]Proxy{}
		}
		l.cfg.Proxies[name] = p
	}
	return nil
}

// take puts a value of the file into a field of its type.
func take[T any](to *T, v any) error {
	got, err := convert(*to, v)
	if err != nil {
		return err
	}
	*to = got.(T)
	return nil
}

// writeProxies writes the table as Load reads it back.
func (c *Config) writeProxies(b *strings.Builder) {
	for _, name := range c.ProxyNames() {
		p := c.Proxies[name]
		fmt.Fprintf(b, "\n[%s]\ntype = %s\naddress = %s\n", joined([]string{proxySection, name}), literal(p.Type), literal(p.Address))
		if p.Platform != "" {
			fmt.Fprintf(b, "platform = %s\n", literal(p.Platform))
		}
		if len(p.Capabilities) > 0 {
			fmt.Fprintf(b, "capabilities = %s\n", literal(p.Capabilities))
		}
		if len(p.Exports) > 0 {
			fmt.Fprintf(b, "\n[%s]\n", joined([]string{proxySection, name, "exports"}))
			for _, k := range slices.Sorted(maps.Keys(p.Exports)) {
				fmt.Fprintf(b, "%s = %s\n", joined([]string{k}), literal(p.Exports[k]))
			}
		}
	}
}
