package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// hostsFile is containerd's hosts.toml (docs/hosts.md there). What stands at the top is the server's.
type hostsFile struct {
	Server string `toml:"server"`
	hostTable
	Host map[string]hostTable `toml:"host"`
}

type hostTable struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   *bool          `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
	Proxy        string         `toml:"proxy"`
}

// fromDirectories reads the host directory of a registry below the first root that has one. nil: none has.
func fromDirectories(roots []string, domain string, own endpoint) ([]endpoint, error) {
	for _, root := range roots {
		for _, name := range directoryNames(domain) {
			dir := filepath.Join(root, name)
			switch info, err := os.Stat(dir); {
			case errors.Is(err, fs.ErrNotExist):
			case err != nil:
				return nil, fmt.Errorf("cannot read the configuration of registry %s: %w: %w", domain, err, errdefs.ErrFailedPrecondition)
			case info.IsDir():
				return fromDirectory(dir, own)
			}
		}
	}
	return nil, nil
}

// directoryNames are those that a host directory may have, in the order in which they are looked for. What separates the
// port is written as _ too, for file systems that have no colon.
func directoryNames(domain string) []string {
	names := []string{domain, "_default"}
	if i := strings.LastIndexByte(domain, ':'); i > 0 && !strings.HasSuffix(domain, "]") {
		names = slices.Insert(names, 0, strings.ReplaceAll(domain[:i], ":", "")+"_"+domain[i+1:]+"_")
	}
	return names
}

func fromDirectory(dir string, own endpoint) ([]endpoint, error) {
	path := filepath.Join(dir, "hosts.toml")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fromCertificates(dir, own)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w: %w", path, err, errdefs.ErrFailedPrecondition)
	}
	return parseHosts(data, path, own)
}

// parseHosts reads a hosts.toml: its hosts in the order in which they stand there, and then the server, which is own when
// the file names none. Errors, InvalidArgument, have the file and the host.
func parseHosts(data []byte, path string, own endpoint) ([]endpoint, error) {
	wrong := func(where string, err error) error {
		if where != "" {
			where += ": "
		}
		return fmt.Errorf("%s: %s%w", path, where, err)
	}
	var f hostsFile
	if err := toml.Unmarshal(data, &f); err != nil {
		var de *toml.DecodeError
		if errors.As(err, &de) {
			row, col := de.Position()
			return nil, fmt.Errorf("%s:%d:%d: %s: %w", path, row, col, strings.TrimPrefix(de.Error(), "toml: "), errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("%s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	dir := filepath.Dir(path)
	var found []endpoint
	for _, name := range hostOrder(data, f.Host) {
		e, err := f.Host[name].endpoint(dir, name)
		if name == "" {
			err = fmt.Errorf("it has no name: %w", errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return nil, wrong(fmt.Sprintf("host %q", name[strings.LastIndexByte(name, '@')+1:]), err)
		}
		found = append(found, e)
	}
	server, err := f.endpoint(dir, f.Server)
	if err != nil {
		return nil, wrong("server", err)
	}
	if f.Server == "" {
		server.base, server.maybePlain = own.base, own.maybePlain
		if f.SkipVerify == nil && server.settings.ca == nil {
			server.settings.skipVerify = own.settings.skipVerify
		}
	}
	return append(found, server), nil
}

// hostOrder is the order in which [host."X"] stand in a file that has been read.
func hostOrder(data []byte, hosts map[string]hostTable) []string {
	var names []string
	note := func(name string) {
		if _, ok := hosts[name]; ok && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	var p unstable.Parser
	p.Reset(data)
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		var key []string
		for it := e.Key(); it.Next(); {
			key = append(key, string(it.Node().Data))
		}
		switch e.Kind {
		case unstable.Table:
			table = key
		case unstable.KeyValue:
			key = slices.Concat(table, key)
		default:
			continue
		}
		if key[0] != "host" {
			continue
		}
		if len(key) > 1 {
			note(key[1])
		} else if e.Kind == unstable.KeyValue && e.Value().Kind == unstable.InlineTable {
			for it := e.Value().Children(); it.Next(); {
				for k := it.Node().Key(); k.Next(); {
					note(string(k.Node().Data))
					break
				}
			}
		}
	}
	return names
}

// endpoint is what a table says of a URL, or of the server when that is "".
func (t hostTable) endpoint(dir, raw string) (endpoint, error) {
	e := endpoint{capabilities: everything}
	var err error
	if raw != "" {
		if e.base, err = parseEndpoint(raw, t.OverridePath); err != nil {
			return e, err
		}
	}
	if len(t.Capabilities) > 0 {
		e.capabilities = 0
		for _, name := range t.Capabilities {
			c, ok := capabilities[strings.ToLower(name)]
			if !ok {
				return e, fmt.Errorf("capability %q is none of pull, resolve, push: %w", name, errdefs.ErrInvalidArgument)
			}
			e.capabilities |= c
		}
		if e.capabilities&pull != 0 {
			e.capabilities |= referrers
		}
	}
	if e.settings.ca, err = paths(dir, "ca", t.CA); err != nil {
		return e, err
	}
	if e.settings.client, err = pairs(dir, t.Client); err != nil {
		return e, err
	}
	e.settings.skipVerify = t.SkipVerify != nil && *t.SkipVerify
	if port := e.base.Port(); e.base.Scheme == "http" && port != "" && port != "80" && (t.SkipVerify != nil || t.CA != nil || t.Client != nil) {
		e.base.Scheme, e.maybePlain = "https", true // settings of TLS are there to be used, where it is spoken
	}
	if e.header, err = headers(t.Header); err != nil {
		return e, err
	}
	if t.DialTimeout != "" {
		if e.settings.dialTimeout, err = time.ParseDuration(t.DialTimeout); err != nil || e.settings.dialTimeout <= 0 {
			return e, fmt.Errorf("dial_timeout %q must be a duration such as 500ms or 3s: %w", t.DialTimeout, errdefs.ErrInvalidArgument)
		}
	}
	if t.Proxy != "" {
		if e.settings.proxy, err = proxyURL(t.Proxy); err != nil {
			return e, err
		}
	}
	return e, nil
}

func absolutePath(dir, p string) string {
	if filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(dir, p)
}

// stringsOf is a string, or a list of them.
func stringsOf(key string, v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		out := make([]string, len(v))
		for i, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, fmt.Errorf("%s must be a string or a list of strings: %w", key, errdefs.ErrInvalidArgument)
			}
			out[i] = s
		}
		return out, nil
	}
	return nil, fmt.Errorf("%s must be a string or a list of strings: %w", key, errdefs.ErrInvalidArgument)
}

func paths(dir, key string, v any) ([]string, error) {
	out, err := stringsOf(key, v)
	for i, p := range out {
		if p == "" {
			return nil, fmt.Errorf("%s names no file: %w", key, errdefs.ErrInvalidArgument)
		}
		out[i] = absolutePath(dir, p)
	}
	return out, err
}

// pairs reads client: a file, a list of files, or a list of pairs of certificate and key.
func pairs(dir string, v any) ([][2]string, error) {
	list, ok := v.([]any)
	if !ok {
		files, err := paths(dir, "client", v)
		var out [][2]string
		for _, f := range files {
			out = append(out, [2]string{f, ""})
		}
		return out, err
	}
	var out [][2]string
	for _, e := range list {
		files, err := stringsOf("client", e)
		if err != nil || len(files) == 0 || len(files) > 2 || files[0] == "" {
			return nil, fmt.Errorf("client must be a file, a list of files, or a list of pairs [certificate, key]: %w", errdefs.ErrInvalidArgument)
		}
		pair := [2]string{absolutePath(dir, files[0])}
		if len(files) == 2 && files[1] != "" {
			pair[1] = absolutePath(dir, files[1])
		}
		out = append(out, pair)
	}
	return out, nil
}

func headers(table map[string]any) (http.Header, error) {
	var h http.Header
	for name, v := range table {
		values, err := stringsOf("header "+name, v)
		if err != nil {
			return nil, err
		}
		for _, s := range values {
			if !validHeader(name, s) {
				return nil, fmt.Errorf("header %q cannot be sent over HTTP: %w", name, errdefs.ErrInvalidArgument)
			}
			if h == nil {
				h = http.Header{}
			}
			h.Add(name, s)
		}
	}
	return h, nil
}
