package registry

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/net/http/httpguts"
)

// fromCertificates reads a directory in Docker's form: *.crt are certificate authorities, X.cert and X.key a client's.
func fromCertificates(dir string, own endpoint) ([]endpoint, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot read the host directory: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch filepath.Ext(path) {
		case ".crt":
			own.settings.ca = append(own.settings.ca, path)
			own.settings.skipVerify = false
		case ".cert":
			key := strings.TrimSuffix(path, ".cert") + ".key"
			if _, err := os.Stat(key); err != nil {
				return nil, fmt.Errorf("the key of the client certificate %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
			}
			own.settings.client = append(own.settings.client, [2]string{path, key})
		}
	}
	return []endpoint{own}, nil
}

// tlsConfig reads the files. Its error is InvalidArgument.
func (s *settings) tlsConfig() (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: s.skipVerify}
	if len(s.ca) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		for _, path := range s.ca {
			data, err := os.ReadFile(path)
			if err != nil {
				return nil, fmt.Errorf("certificate authority: %w: %w", err, errdefs.ErrInvalidArgument)
			}
			if !pool.AppendCertsFromPEM(data) {
				return nil, fmt.Errorf("certificate authority: %s has no PEM certificate: %w", path, errdefs.ErrInvalidArgument)
			}
		}
		c.RootCAs = pool
	}
	for _, pair := range s.client {
		key := pair[1]
		if key == "" {
			key = pair[0]
		}
		cert, err := tls.LoadX509KeyPair(pair[0], key)
		if err != nil {
			return nil, fmt.Errorf("client certificate %s: %w: %w", pair[0], err, errdefs.ErrInvalidArgument)
		}
		c.Certificates = append(c.Certificates, cert)
	}
	return c, nil
}

// proxyURL checks what hosts.toml names as a proxy.
func proxyURL(raw string) (string, error) {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
		return "", fmt.Errorf("proxy %q must be SCHEME://HOST[:PORT]: %w", raw, errdefs.ErrInvalidArgument)
	}
	switch u.Scheme {
	case "http", "https", "socks5", "socks5h":
		return raw, nil
	}
	return "", fmt.Errorf("proxy %q must be http, https, socks5 or socks5h: %w", raw, errdefs.ErrInvalidArgument)
}

func validHeader(name, value string) bool {
	return httpguts.ValidHeaderFieldName(name) && httpguts.ValidHeaderFieldValue(value)
}
