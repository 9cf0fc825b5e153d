package config

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// Registry is how registries are found and asked, see package registry. Times are Go durations, sizes bytes.
type Registry struct {
	ConfigPath   string // directories of host directories, with colons between them
	DockerConfig string

	DialTimeout, StallTimeout, MaxRetryAfter, BreakFor string
	Attempts, ManifestLimit, ChunkSize                 int

	Old OldRegistry
}

// OldRegistry is CRI's registry configuration before host directories.
type OldRegistry struct {
	Mirrors map[string]OldMirror `toml:"mirrors,omitempty"` // by registry, or "*"
	Configs map[string]OldHost   `toml:"configs,omitempty"` // by HOST[:PORT]
	Auths   map[string]OldAuth   `toml:"auths,omitempty"`   // by URL
	Headers map[string][]string  `toml:"headers,omitempty"`
}

// OldMirror is where else a registry may be asked: URLs.
type OldMirror struct {
	Endpoint []string `toml:"endpoint"`
}

// OldHost is how a host is spoken to.
type OldHost struct {
	TLS  *OldTLS  `toml:"tls,omitempty"`
	Auth *OldAuth `toml:"auth,omitempty"`
}

// OldTLS names files.
type OldTLS struct {
	InsecureSkipVerify bool   `toml:"insecure_skip_verify,omitempty"`
	CAFile             string `toml:"ca_file,omitempty"`
	CertFile           string `toml:"cert_file,omitempty"`
	KeyFile            string `toml:"key_file,omitempty"`
}

// OldAuth is a credential; Auth is base64 of USER:PASSWORD.
type OldAuth struct {
	Username      string `toml:"username,omitempty"`
	Password      string `toml:"password,omitempty"`
	Auth          string `toml:"auth,omitempty"`
	IdentityToken string `toml:"identitytoken,omitempty"`
}

// The plugins that CRI's images are configured in, in files of version 3 and 2, and ours.
const (
	criImages = "io.containerd.cri.v1.images"
	criPlugin = "io.containerd.grpc.v1.cri"
	client    = "io.managerd.registry.v1.client"
)

var (
	criRegistry    = []string{"plugins", criImages, "registry"}
	criRegistryOld = []string{"plugins", criPlugin, "registry"}
	clientSection  = []string{"plugins", client}
)

var registryKeys = []key{
	{in(criRegistry, "config_path"), "Directories, with colons between them, that have a directory with a hosts.toml or certificates for a registry each.", "",
		func(c *Config) any { return &c.Registry.ConfigPath }, nil},
	{in(clientSection, "docker_config"), "Path of a Docker config.json with credentials and credential helpers for registries; empty for none.", "",
		func(c *Config) any { return &c.Registry.DockerConfig }, absoluteOrNone},
	{in(clientSection, "dial_timeout"), "How long a connection may take, and its TLS handshake.", "15s",
		func(c *Config) any { return &c.Registry.DialTimeout }, longerThanNothing},
	{in(clientSection, "stall_timeout"), "How long a registry may send nothing before the connection is given up and the download resumed.", "30s",
		func(c *Config) any { return &c.Registry.StallTimeout }, longerThanNothing},
	{in(clientSection, "max_retry_after"), "The longest that a registry may make a request wait (Retry-After) before it fails.", "1m",
		func(c *Config) any { return &c.Registry.MaxRetryAfter }, longerThanNothing},
	{in(clientSection, "break_for"), "How long a mirror that failed is left out, doubled with each further failure up to 16 times.", "15s",
		func(c *Config) any { return &c.Registry.BreakFor }, longerThanNothing},
	{in(clientSection, "attempts"), "How often the last endpoint of a registry is asked, and a download reopened without a byte.", 5,
		func(c *Config) any { return &c.Registry.Attempts }, positiveNumber},
	{in(clientSection, "manifest_limit"), "Largest manifest or index, in bytes.", 4 << 20,
		func(c *Config) any { return &c.Registry.ManifestLimit }, positiveNumber},
	{in(clientSection, "upload_chunk_size"), "Bytes of one request of an upload; what breaks off repeats no more than that.", 64 << 20,
		func(c *Config) any { return &c.Registry.ChunkSize }, positiveNumber},
}

func longerThanNothing(v any) string {
	if why := duration(v); why != "" {
		return why
	}
	if Delay(v.(string)) == 0 {
		return "must be longer than nothing"
	}
	return ""
}

func positiveNumber(v any) string {
	if n := v.(int); n < 1 {
		return fmt.Sprintf("%d must be at least 1", n)
	}
	return ""
}

// canonical is where a setting stands that has another place in files of version 2.
func canonical(path []string) []string {
	if len(path) >= len(criRegistryOld) && slices.Equal(path[:len(criRegistryOld)], criRegistryOld) {
		return slices.Concat(criRegistry, path[len(criRegistryOld):])
	}
	return path
}

// oldRegistry reads a table of CRI's old registry configuration; false when path is of something else. What it finds is
// taken, and said to be old.
func (l *loader) oldRegistry(f *file, path []string, v any) (bool, error) {
	at := canonical(path)
	if len(at) != len(criRegistry)+1 || !slices.Equal(at[:len(criRegistry)], criRegistry) {
		return false, nil
	}
	name := at[len(at)-1]
	if !slices.Contains([]string{"mirrors", "configs", "auths", "headers"}, name) {
		return false, nil
	}
	if empty(v) {
		return true, nil
	}
	if name == "headers" {
		v = lists(v)
	}
	text, err := toml.Marshal(map[string]any{name: v})
	if err == nil {
		err = toml.Unmarshal(text, &l.cfg.Registry.Old)
	}
	if err != nil {
		return true, fmt.Errorf("%s: %s: %s: %w", f.at(path...), joined(path), strings.TrimPrefix(err.Error(), "toml: "), errdefs.ErrInvalidArgument)
	}
	l.warn(f, path, "is read, but a later version will not: a directory with a hosts.toml for each registry, named by config_path, replaces it")
	return true, nil
}

// lists makes single strings of a table lists.
func lists(v any) any {
	table, ok := v.(map[string]any)
	if !ok {
		return v
	}
	out := map[string]any{}
	for name, e := range table {
		if s, ok := e.(string); ok {
			e = []any{s}
		}
		out[name] = e
	}
	return out
}

// write is the old configuration as a file has it, below the tables that its keys stand in; "" for none.
func (o OldRegistry) write() (string, error) {
	var b strings.Builder
	tables := o.tables()
	for _, name := range slices.Sorted(maps.Keys(tables)) {
		if reflect.ValueOf(tables[name]).Len() == 0 {
			continue
		}
		text, err := toml.Marshal(map[string]any{name: tables[name]})
		if err != nil {
			return "", fmt.Errorf("cannot write registry.%s: %w", name, err)
		}
		b.WriteString("\n")
		for line := range strings.Lines(string(text)) {
			if rest, ok := strings.CutPrefix(line, "["); ok { // the name of a table; values are never at the beginning of a line
				line = "[" + joined(criRegistry) + "." + rest
			}
			b.WriteString(line)
		}
	}
	return b.String(), nil
}

func (o OldRegistry) tables() map[string]any {
	return map[string]any{"mirrors": o.Mirrors, "configs": o.Configs, "auths": o.Auths, "headers": o.Headers}
}
