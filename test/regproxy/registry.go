// Package regproxy runs Debian's docker-registry on loopback for tests, plain or with TLS, a password or tokens, and puts a
// proxy before it that fails as networks and registries do.
package regproxy

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Options says what a registry is like. The zero value is plain HTTP, for anybody.
type Options struct {
	TLS      *Authority // serves HTTPS with a certificate of it, for 127.0.0.1 and localhost
	Htpasswd string     // asks for a user and password: lines as htpasswd -B writes them
	Tokens   *Tokens    // asks for tokens of it
	Client   *Authority // wants client certificates of it
	ReadOnly bool
}

// Registry is a docker-registry that runs. Its storage is kept when it is stopped and started again.
type Registry struct {
	Addr string // 127.0.0.1:PORT
	Dir  string // of its storage and its files
	tls  *Authority
	log  *os.File

	cmd   *exec.Cmd
	ended chan struct{} // closed when cmd has ended
}

// Serving is how long a registry may take to serve on a busy machine.
const Serving = 60 * time.Second

// Start runs a registry until the test ends.
func Start(t testing.TB, o Options) *Registry {
	t.Helper()
	if _, err := exec.LookPath("docker-registry"); err != nil {
		t.Fatal("there is no docker-registry: contrib/deps.sh test installs it")
	}
	r := &Registry{Dir: t.TempDir(), tls: o.TLS}
	t.Cleanup(r.Stop)
	// Somebody else may take a port between its choice and the registry's start.
	for left := 5; ; left-- {
		var err error
		if r.Addr, err = free(); err != nil {
			t.Fatal(err)
		}
		config, err := r.config(o)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(r.path("config.yml"), config, 0o600); err != nil {
			t.Fatal(err)
		}
		err = r.run()
		if err == nil {
			return r
		}
		if left == 0 || !errors.Is(err, errEnded) {
			t.Fatal(err)
		}
	}
}

// free is an address of loopback at which nobody listens now.
func free() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

func (r *Registry) path(name string) string { return filepath.Join(r.Dir, name) }

// config is docker-registry's, and writes the files that it names.
func (r *Registry) config(o Options) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "version: 0.1\nlog: {level: warn, accesslog: {disabled: true}}\nstorage:\n  filesystem: {rootdirectory: %q}\n  delete: {enabled: true}\n", r.path("storage"))
	if o.ReadOnly {
		b.WriteString("  maintenance: {readonly: {enabled: true}}\n")
	}
	fmt.Fprintf(&b, "http:\n  addr: %q\n  relativeurls: true\n  headers: {%s: [%q]}\n", r.Addr, ownHeader, r.Dir)
	if o.TLS != nil {
		if err := o.TLS.Issue(r.path("server.crt"), r.path("server.key"), "127.0.0.1", "localhost"); err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "  tls:\n    certificate: %q\n    key: %q\n", r.path("server.crt"), r.path("server.key"))
		if o.Client != nil {
			fmt.Fprintf(&b, "    clientcas: [%q]\n", o.Client.File)
		}
	}
	switch {
	case o.Htpasswd != "":
		if err := os.WriteFile(r.path("htpasswd"), []byte(o.Htpasswd), 0o600); err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "auth:\n  htpasswd: {realm: test, path: %q}\n", r.path("htpasswd"))
	case o.Tokens != nil:
		fmt.Fprintf(&b, "auth:\n  token: {realm: %q, service: %q, issuer: %q, rootcertbundle: %q}\n", o.Tokens.URL+"/token", Service, Issuer, o.Tokens.Bundle)
	}
	return b.Bytes(), nil
}

// Run starts a registry that was stopped, and waits until it serves.
func (r *Registry) Run(t testing.TB) {
	t.Helper()
	if err := r.run(); err != nil {
		t.Fatal(err)
	}
}

// errEnded is a registry that ended by itself.
var errEnded = errors.New("docker-registry ended")

func (r *Registry) run() error {
	var err error
	if r.log, err = os.OpenFile(r.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	cmd := exec.Command("docker-registry", "serve", r.path("config.yml"))
	cmd.Stdout, cmd.Stderr = r.log, r.log
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	if err := cmd.Start(); err != nil {
		return errors.Join(err, r.log.Close())
	}
	r.cmd, r.ended = cmd, make(chan struct{})
	go func(ended chan struct{}) {
		_ = cmd.Wait()
		close(ended)
	}(r.ended)
	for deadline := time.Now().Add(Serving); ; {
		serving := r.serves()
		select {
		case <-r.ended: // it may be another one that serves here
			err = errEnded
		case <-time.After(10 * time.Millisecond):
			err = serving
		}
		if err == nil {
			return nil
		}
		if errors.Is(err, errEnded) || time.Now().After(deadline) {
			r.Stop()
			text, _ := os.ReadFile(r.path("log"))
			return fmt.Errorf("docker-registry does not serve: %w\n%s", err, text)
		}
	}
}

// serves looks whether it does, and whether it is this one.
func (r *Registry) serves() error {
	if r.tls != nil {
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", r.Addr, r.ClientTLS())
		if err != nil {
			return err
		}
		return c.Close()
	}
	resp, err := (&http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Get("http://" + r.Addr + "/v2/")
	if err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	if err := resp.Body.Close(); err != nil || resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusUnauthorized {
		return fmt.Errorf("it answers %s: %w", resp.Status, errors.Join(err))
	}
	if resp.Header.Get(ownHeader) != r.Dir {
		return errors.New("another server has its port")
	}
	return nil
}

// ownHeader of an answer is by which a registry is known, its directory.
const ownHeader = "X-Test-Directory"

// Stop kills it as a power cut would.
func (r *Registry) Stop() {
	if r.cmd == nil {
		return
	}
	_ = r.cmd.Process.Kill()
	<-r.ended
	r.cmd = nil
	_ = r.log.Close()
}

// Blob is where it keeps the bytes of a digest, HEX of sha256.
func (r *Registry) Blob(hex string) string {
	return r.path(filepath.Join("storage/docker/registry/v2/blobs/sha256", hex[:2], hex, "data"))
}

// URL is http:// or https:// of it.
func (r *Registry) URL() string {
	if r.tls != nil {
		return "https://" + r.Addr
	}
	return "http://" + r.Addr
}

// ClientTLS verifies its certificate, for a proxy before it.
func (r *Registry) ClientTLS() *tls.Config {
	if r.tls == nil {
		return nil
	}
	return &tls.Config{RootCAs: r.tls.pool}
}
