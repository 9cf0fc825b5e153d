package registry

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/errdefs"
)

// Legacy is the registry part of CRI's configuration as it was before hosts.toml (containerd's docs/cri/registry.md).
type Legacy struct {
	Mirrors map[string][]string   // by registry, "*" for those not named: URLs, tried before the registry itself
	TLS     map[string]LegacyTLS  // by HOST[:PORT]
	Auths   map[string]LegacyAuth // by HOST[:PORT] or URL
	Headers map[string][]string   // sent to every endpoint
}

// LegacyTLS is how a host's certificate is verified, and what it is shown.
type LegacyTLS struct {
	CAFile, CertFile, KeyFile string
	InsecureSkipVerify        bool
}

// LegacyAuth is a credential. Auth is base64 of USER:PASSWORD.
type LegacyAuth struct {
	Username, Password, Auth, IdentityToken string
}

type legacy struct {
	Legacy
	credentials map[string]Credential // by host
	wrong       error                 // told to whoever needs a credential
}

func newLegacy(l Legacy) legacy {
	out := legacy{Legacy: l, credentials: map[string]Credential{}}
	for name, a := range l.Auths {
		c := Credential{Username: a.Username, Password: a.Password, RefreshToken: a.IdentityToken}
		if a.Auth != "" {
			user, password, err := decodeBasic(a.Auth)
			if err != nil {
				out.wrong = fmt.Errorf("registry auth of %s: %w", hostOf(name), err)
				continue
			}
			c.Username, c.Password = user, password
		}
		out.credentials[hostOf(name)] = c
	}
	return out
}

// hostOf is HOST[:PORT] of a URL or of itself; docker.io's names are one.
func hostOf(name string) string {
	if u, err := url.Parse(name); err == nil && u.Host != "" {
		name = u.Host
	}
	name, _, _ = strings.Cut(name, "/")
	if name == "docker.io" || name == "index.docker.io" {
		return dockerHost
	}
	return name
}

// decodeBasic reads base64 of USER:PASSWORD.
func decodeBasic(s string) (user, password string, err error) {
	data, err := base64.StdEncoding.DecodeString(s)
	user, password, ok := strings.Cut(strings.TrimRight(string(data), "\x00"), ":")
	if err != nil || !ok {
		return "", "", fmt.Errorf("it is not base64 of USER:PASSWORD: %w", errdefs.ErrInvalidArgument)
	}
	return user, password, nil
}

// endpoints are the mirrors of a registry and itself; nil where nothing is said of it.
func (l *legacy) endpoints(domain string, own endpoint) ([]endpoint, error) {
	mirrors, ok := l.Mirrors[domain]
	if !ok {
		mirrors = l.Mirrors["*"]
	}
	var found []endpoint
	for _, raw := range mirrors {
		base, err := parseEndpoint(raw, false)
		if err != nil {
			return nil, fmt.Errorf("registry.mirrors of %s: %w", domain, err)
		}
		found = append(found, endpoint{base: base, capabilities: pull | resolve | referrers})
	}
	if base := own.base; !containsHost(found, base.Host) {
		found = append(found, own)
	} else {
		for i := range found {
			if found[i].base.Host == base.Host {
				found[i].capabilities = everything
			}
		}
	}
	said := len(mirrors) > 0
	for i := range found {
		e := &found[i]
		if t, ok := l.TLS[e.base.Host]; ok {
			said = true
			if t.CAFile != "" {
				e.settings.ca = []string{t.CAFile}
				e.settings.skipVerify = false
			}
			if t.CertFile != "" {
				e.settings.client = [][2]string{{t.CertFile, t.KeyFile}}
			}
			e.settings.skipVerify = e.settings.skipVerify || t.InsecureSkipVerify
		}
		if len(l.Headers) > 0 {
			said = true
			e.header = http.Header{}
			for name, values := range l.Headers {
				for _, v := range values {
					e.header.Add(name, v)
				}
			}
		}
	}
	if !said {
		return nil, nil
	}
	return found, nil
}

func containsHost(es []endpoint, host string) bool {
	for _, e := range es {
		if e.base.Host == host {
			return true
		}
	}
	return false
}
