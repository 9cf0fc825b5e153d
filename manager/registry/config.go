package registry

import (
	"log/slog"
	"path/filepath"

	"github.com/managerd/managerd/manager/config"
)

// FromConfig is what the daemon's configuration says.
func FromConfig(c config.Registry, log *slog.Logger) Config {
	out := Config{
		ConfigPath: filepath.SplitList(c.ConfigPath), DockerConfig: c.DockerConfig, Logger: log,
		DialTimeout: config.Delay(c.DialTimeout), StallTimeout: config.Delay(c.StallTimeout),
		MaxRetryAfter: config.Delay(c.MaxRetryAfter), BreakFor: config.Delay(c.BreakFor),
		Attempts: c.Attempts, ManifestLimit: int64(c.ManifestLimit), ChunkSize: int64(c.ChunkSize),
		Legacy: Legacy{Mirrors: map[string][]string{}, TLS: map[string]LegacyTLS{}, Auths: map[string]LegacyAuth{}, Headers: c.Old.Headers},
	}
	for name, m := range c.Old.Mirrors {
		out.Legacy.Mirrors[name] = m.Endpoint
	}
	for name, a := range c.Old.Auths {
		out.Legacy.Auths[name] = LegacyAuth(a)
	}
	for name, h := range c.Old.Configs {
		if h.Auth != nil {
			out.Legacy.Auths[name] = LegacyAuth(*h.Auth)
		}
		if t := h.TLS; t != nil {
			out.Legacy.TLS[name] = LegacyTLS{CAFile: t.CAFile, CertFile: t.CertFile, KeyFile: t.KeyFile, InsecureSkipVerify: t.InsecureSkipVerify}
		}
	}
	return out
}
