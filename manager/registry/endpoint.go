package registry

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// capability is what an endpoint may be asked for.
type capability uint8

const (
	pull capability = 1 << iota
	resolve
	push
	referrers

	everything = pull | resolve | push | referrers
)

var capabilities = map[string]capability{"pull": pull, "resolve": resolve, "push": push, "referrers": referrers}

// endpoint is where a repository can be asked for, and how.
type endpoint struct {
	base         url.URL // scheme, host and path, /v2 as a rule
	capabilities capability
	mirror       bool // its host is not the reference's: it is told which registry is meant
	maybePlain   bool // HTTPS, and HTTP if it does not speak that
	header       http.Header
	settings     settings
}

// settings are what connections differ in.
type settings struct {
	ca          []string    // files of PEM certificates
	client      [][2]string // files of certificate and key; the key "" where one file has both
	skipVerify  bool
	dialTimeout time.Duration // 0 for the configuration's
	proxy       string        // "" for the environment's
}

// String is the URL without a path that says nothing, and without a scheme where it may be either.
func (e *endpoint) String() string {
	if e.maybePlain {
		return e.base.Host
	}
	u := e.base
	u.Path = strings.TrimSuffix(u.Path, "/v2")
	return u.String()
}

// dockerHost is where docker.io's registry is.
const dockerHost = "registry-1.docker.io"

// origin is the endpoint of a registry itself. One on this machine, other than at the ports of HTTPS and HTTP, may speak
// either, and its certificate is not verified.
func origin(domain string, plainHTTP bool) endpoint {
	e := endpoint{base: url.URL{Scheme: "https", Host: domain, Path: "/v2"}, capabilities: everything}
	if domain == "docker.io" {
		e.base.Host = dockerHost
	}
	switch local, port := loopback(domain); {
	case plainHTTP, local && (port == "80" || port == ""):
		e.base.Scheme = "http"
	case local:
		e.settings.skipVerify = true
		e.maybePlain = port != "443"
	}
	return e
}

// loopback says whether HOST[:PORT] is this machine by its name or address, and the port.
func loopback(hostport string) (bool, string) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		host, port = strings.Trim(hostport, "[]"), ""
	}
	if host == "localhost" {
		return true, port
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback(), port
}

// parseEndpoint reads the URL of a host or server in hosts.toml, or of a mirror in CRI's configuration; without a scheme
// it is HTTPS.
func parseEndpoint(raw string, overridePath bool) (url.URL, error) {
	s := raw
	if !strings.Contains(s, "://") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return url.URL{}, fmt.Errorf("%q is no URL: %w", raw, errdefs.ErrInvalidArgument)
	case u.Scheme != "https" && u.Scheme != "http":
		return url.URL{}, fmt.Errorf("%q is neither http:// nor https://: %w", raw, errdefs.ErrInvalidArgument)
	case u.Host == "" || u.Opaque != "":
		return url.URL{}, fmt.Errorf("%q names no host: %w", raw, errdefs.ErrInvalidArgument)
	case u.User != nil:
		return url.URL{}, fmt.Errorf("the URL of %s has a user in it; credentials stand elsewhere: %w", u.Host, errdefs.ErrInvalidArgument)
	case u.RawQuery != "" || u.Fragment != "":
		return url.URL{}, fmt.Errorf("%q has more than a host and a path: %w", raw, errdefs.ErrInvalidArgument)
	}
	out := url.URL{Scheme: u.Scheme, Host: u.Host}
	if out.Host == "docker.io" {
		out.Host = dockerHost
	}
	if u.Path != "" && u.Path != "/" {
		out.Path = path.Clean(u.Path)
	}
	if !overridePath && !strings.HasSuffix(out.Path, "/v2") {
		out.Path += "/v2"
	}
	return out, nil
}

// endpoints finds where a registry can be asked, in the order in which it is.
func (r *Registry) endpoints(domain string, o Options) ([]endpoint, error) {
	roots := r.cfg.ConfigPath
	if o.HostDir != "" {
		roots = []string{o.HostDir}
	}
	own := origin(domain, o.PlainHTTP)
	found, err := fromDirectories(roots, domain, own)
	if err != nil {
		return nil, err
	}
	if found == nil && o.HostDir == "" {
		found, err = r.legacy.endpoints(domain, own)
		if err != nil {
			return nil, err
		}
	}
	if found == nil {
		found = []endpoint{own}
	}
	for i := range found {
		found[i].mirror = found[i].base.Host != own.base.Host
		found[i].settings.skipVerify = found[i].settings.skipVerify || o.SkipVerify
	}
	return slices.Clip(found), nil
}
