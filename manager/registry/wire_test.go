package registry

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/test/regproxy"
)

// TestRegistry goes there and back with a real registry in each of its guises.
func TestRegistry(t *testing.T) {
	authority := regproxy.NewAuthority(t)
	clients := regproxy.NewAuthority(t)
	tokens := regproxy.StartTokens(t)
	tokens.Users["joe"] = "secret"
	dir := t.TempDir()
	if err := clients.Issue(filepath.Join(dir, "me.cert"), filepath.Join(dir, "me.key"), "client"); err != nil {
		t.Fatal(err)
	}
	joe := func(_ context.Context, host string) (Credential, error) {
		return Credential{Username: "joe", Password: "secret"}, nil
	}
	trust := "ca = \"" + authority.File + "\"\n"
	for name, c := range map[string]struct {
		server  regproxy.Options
		options Options
		hosts   string // hosts.toml
	}{
		"plain":     {},
		"TLS":       {server: regproxy.Options{TLS: authority}, hosts: trust},
		"client":    {server: regproxy.Options{TLS: authority, Client: clients}, hosts: trust + `client = [["` + dir + `/me.cert", "` + dir + `/me.key"]]`},
		"basic":     {server: regproxy.Options{Htpasswd: htpasswd}, options: Options{Credentials: joe}},
		"basic TLS": {server: regproxy.Options{TLS: authority, Htpasswd: htpasswd}, options: Options{Credentials: joe}, hosts: trust},
		"tokens":    {server: regproxy.Options{Tokens: tokens}, options: Options{Credentials: joe}},
	} {
		t.Run(name, func(t *testing.T) {
			server := regproxy.Start(t, c.server)
			cfg := quick()
			if c.hosts != "" {
				cfg.ConfigPath = []string{hostDir(t, map[string]string{server.Addr + "/hosts.toml": c.hosts})}
			}
			r := client(t, cfg)
			repo := repository(t, r, server.Addr+"/some/where:v1", c.options)
			there(t, repo, server)
		})
	}
}

// there pushes an image, an index of it, and gets all of it back.
func there(t *testing.T, repo *Repository, server *regproxy.Registry) {
	t.Helper()
	ctx := context.Background()
	image := paint(t, random(1, 3<<20))
	if _, err := repo.Resolve(ctx); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), server.Addr) {
		t.Errorf("resolved before it is there: %v", err)
	}
	if found, err := repo.Exists(ctx, image.layer); found || err != nil {
		t.Error(found, err)
	}
	image.hang(t, repo)
	if found, err := repo.Exists(ctx, image.layer); !found || err != nil {
		t.Error(found, err)
	}
	if got, err := repo.Resolve(ctx); err != nil || got.Digest != image.manifest.Digest || got.Size != image.manifest.Size || got.MediaType != image.manifest.MediaType {
		t.Errorf("resolved %+v, %v; not %+v", got, err, image.manifest)
	}
	for _, d := range []ocispec.Descriptor{image.manifest, image.config, image.layer} {
		want := image.data[d.Digest]
		got, err := all(repo, d, 0)
		same(t, d.MediaType, got, err, want)
		got, err = all(repo, d, d.Size/3)
		same(t, d.MediaType+" from a third", got, err, want[d.Size/3:])
		rc, err := repo.FetchRange(ctx, d, 10, 20)
		if err != nil {
			t.Error(err)
			continue
		}
		got, err = io.ReadAll(rc)
		same(t, d.MediaType+" a part", got, err, want[10:30])
		_ = rc.Close()
	}
	index := encode(t, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{image.manifest}})
	desc := describe(ocispec.MediaTypeImageIndex, index)
	tagged := repository(t, repo.r, repo.ref.String()+"@"+desc.Digest.String(), repo.opts)
	if err := tagged.Push(ctx, image.manifest, bytes.NewReader(image.data[image.manifest.Digest])); err != nil {
		t.Error(err)
	}
	if got, err := repo.Resolve(ctx); err != nil || got.Digest != image.manifest.Digest {
		t.Errorf("%v, %v", got, err)
	}
	if err := tagged.Push(ctx, desc, bytes.NewReader(index)); err != nil {
		t.Error(err)
	}
	if got, err := repo.Resolve(ctx); err != nil || got.Digest != desc.Digest {
		t.Errorf("the tag is of %v, %v; not of the index %s", got.Digest, err, desc.Digest)
	}
	if mounted, err := repository(t, repo.r, server.Addr+"/else/where:v2", repo.opts).Mount(ctx, image.layer, "some/where"); !mounted || err != nil {
		t.Errorf("mounted %t, %v", mounted, err)
	}
	blob := repository(t, repo.r, server.Addr+"/else/where@"+image.layer.Digest.String(), repo.opts)
	if got, err := blob.Resolve(ctx); err != nil || got.Digest != image.layer.Digest || got.Size != image.layer.Size {
		t.Errorf("a blob by its digest: %+v, %v", got, err)
	}
	artifact := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/x.test",
		Config: image.config, Layers: []ocispec.Descriptor{image.layer}, Subject: &image.manifest,
	}
	signature := encode(t, artifact)
	by := describe(ocispec.MediaTypeImageManifest, signature)
	untagged := repository(t, repo.r, server.Addr+"/some/where@"+by.Digest.String(), repo.opts)
	if err := untagged.Push(ctx, by, bytes.NewReader(signature)); err != nil {
		t.Error(err)
	}
	for kind, want := range map[string]int{"": 1, "application/x.test": 1, "application/x.other": 0} {
		if got, err := repo.Referrers(ctx, image.manifest.Digest, kind); err != nil || len(got) != want || want == 1 && got[0].Digest != by.Digest {
			t.Errorf("referrers %q: %+v, %v", kind, got, err)
		}
	}
}

// htpasswd is joe's, secret, as htpasswd -nbB writes it.
const htpasswd = "joe:$2y$05$sTHYYmy/AO26EQmrVpkvZ.9jiFpn9j.JGCQdhoiCSWGNi4bmJcKXK\n"

// TestRefusals: who asks wrongly is told what is wrong, and by whom.
func TestRefusals(t *testing.T) {
	authority := regproxy.NewAuthority(t)
	tokens := regproxy.StartTokens(t)
	tokens.Users["joe"] = "secret"
	basic := regproxy.Start(t, regproxy.Options{Htpasswd: htpasswd})
	token := regproxy.Start(t, regproxy.Options{Tokens: tokens})
	secure := regproxy.Start(t, regproxy.Options{TLS: authority})
	private := regproxy.Start(t, regproxy.Options{TLS: authority, Client: authority})
	wrong := func(context.Context, string) (Credential, error) {
		return Credential{Username: "joe", Password: "wrong"}, nil
	}
	r := client(t, quick())
	strict := client(t, Config{ConfigPath: []string{hostDir(t, map[string]string{secure.Addr + "/hosts.toml": "server = \"https://" + secure.Addr + "\"\n"})}})
	for name, c := range map[string]struct {
		r     *Registry
		ref   string
		o     Options
		kind  func(error) bool
		words string
	}{
		"nobody at basic":  {r, basic.Addr + "/a:b", Options{}, errdefs.IsUnauthorized, "it asks for a user and password"},
		"wrong at basic":   {r, basic.Addr + "/a:b", Options{Credentials: wrong}, errdefs.IsUnauthorized, "401 Unauthorized"},
		"wrong at tokens":  {r, token.Addr + "/a:b", Options{Credentials: wrong}, errdefs.IsUnauthorized, "incorrect username or password"},
		"nothing there":    {r, token.Addr + "/a:b", Options{}, errdefs.IsNotFound, "404"},
		"unknown CA":       {strict, secure.Addr + "/a:b", Options{}, errdefs.IsFailedPrecondition, "can be named with ca in hosts.toml"},
		"plain, asked TLS": {r, secure.Addr + "/a:b", Options{PlainHTTP: true}, func(err error) bool { return err != nil }, "HTTP"},
		"no certificate":   {r, private.Addr + "/a:b", Options{}, errdefs.IsUnauthorized, "does it want a client certificate?"},
		"no such host":     {r, "registry.invalid/a:b", Options{}, errdefs.IsUnavailable, "registry.invalid"},
		"nobody listens":   {r, regproxy.Nobody(t) + "/a:b", Options{}, errdefs.IsUnavailable, "connection refused"},
	} {
		_, err := repository(t, c.r, c.ref, c.o).Resolve(context.Background())
		if !c.kind(err) || !strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), "cannot resolve "+c.ref[:strings.IndexByte(c.ref, '/')]) {
			t.Errorf("%s: %v", name, err)
		}
	}
	image := paint(t, random(2, 1000))
	err := repository(t, r, token.Addr+"/a:b", Options{}).Push(context.Background(), image.layer, bytes.NewReader(image.data[image.layer.Digest]))
	if !errdefs.IsUnauthorized(err) && !errdefs.IsPermissionDenied(err) {
		t.Errorf("pushed by nobody: %v", err)
	}
	locked, times := errors.New("no keyring"), 0
	_, err = repository(t, r, basic.Addr+"/a:b", Options{Credentials: func(context.Context, string) (Credential, error) {
		times++
		return Credential{}, locked
	}}).Resolve(context.Background())
	if !errors.Is(err, locked) || !errdefs.IsUnauthorized(err) || times != 1 {
		t.Errorf("%v is not the callback's, which was called %d times", err, times)
	}
}

// TestCredentials: each form that a credential has, and that nobody gets the token of another.
func TestCredentials(t *testing.T) {
	ctx := context.Background()
	tokens := regproxy.StartTokens(t)
	tokens.Users["joe"], tokens.Refresh = "secret", "refresh me"
	server := regproxy.Start(t, regproxy.Options{Tokens: tokens})
	basic := regproxy.Start(t, regproxy.Options{Htpasswd: htpasswd})
	image := paint(t, random(3, 1000))
	asked := 0
	by := func(c Credential) Options {
		return Options{Credentials: func(context.Context, string) (Credential, error) { asked++; return c, nil }}
	}
	r := client(t, quick())
	image.hang(t, repository(t, r, server.Addr+"/a:b", by(Credential{RefreshToken: "refresh me"})))
	if served := tokens.Served(); len(served) == 0 || served[0].Method != http.MethodPost || served[0].User != "refreshed" {
		t.Errorf("by a refresh token: %+v", served)
	}
	if asked != 1 {
		t.Errorf("asked %d times for one credential", asked)
	}
	// Who has to think of a password is waited for, longer than for a registry.
	impatient := quick()
	impatient.StallTimeout = 2 * time.Second
	slow := Options{Credentials: func(context.Context, string) (Credential, error) {
		time.Sleep(impatient.StallTimeout + time.Second)
		return Credential{Username: "joe", Password: "secret"}, nil
	}}
	if _, err := repository(t, client(t, impatient), server.Addr+"/a:b", slow).Resolve(ctx); err != nil {
		t.Errorf("by a slow one: %v", err)
	}
	// A token that was bought is used again by the same, and by nobody else.
	before := len(tokens.Served())
	for range 3 {
		if _, err := repository(t, r, server.Addr+"/a:b", by(Credential{Username: "joe", Password: "secret"})).Resolve(ctx); err != nil {
			t.Error(err)
		}
	}
	if _, err := repository(t, r, server.Addr+"/a:b", Options{}).Resolve(ctx); err != nil {
		t.Error(err)
	}
	served := tokens.Served()[before:]
	if len(served) != 2 || served[0].User != "joe" || served[1].User != "" || !slices.Equal(served[0].Scopes, []string{"repository:a:pull"}) {
		t.Errorf("%+v", served)
	}
	// One that expires in the middle is replaced.
	tokens.Life(-time.Hour)
	expired := client(t, quick())
	repo := repository(t, expired, server.Addr+"/a:b", by(Credential{Username: "joe", Password: "secret"}))
	if _, err := repo.Resolve(ctx); !errdefs.IsUnauthorized(err) {
		t.Errorf("with a token that has expired: %v", err)
	}
	tokens.Life(time.Hour)
	if _, err := repo.Resolve(ctx); err != nil {
		t.Errorf("after tokens are good again: %v", err)
	}
	for name, c := range map[string]Credential{
		"password": {Username: "joe", Password: "secret"},
		"header":   {Header: "Basic am9lOnNlY3JldA=="},
	} {
		if _, err := repository(t, r, basic.Addr+"/a:b", by(c)).Resolve(ctx); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := repository(t, r, basic.Addr+"/a:b", by(Credential{Header: "Digest x"})).Resolve(ctx); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	// Docker's file, and a helper of it.
	dir := hostDir(t, map[string]string{
		"config.json":                     `{"auths":{"` + basic.Addr + `":{"auth":"am9lOnNlY3JldA=="}}}`,
		"helped.json":                     `{"credHelpers":{"` + basic.Addr + `":"managerd-test"}}`,
		"broken.json":                     `{`,
		"docker-credential-managerd-test": "#!/bin/sh\ncat >/dev/null\necho '{\"Username\":\"joe\",\"Secret\":\"secret\"}'\n",
	})
	if err := os.Chmod(filepath.Join(dir, "docker-credential-managerd-test"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	for file, kind := range map[string]func(error) bool{
		"config.json": errdefs.IsNotFound, "helped.json": errdefs.IsNotFound, "none.json": errdefs.IsUnauthorized, "broken.json": errdefs.IsInvalidArgument,
	} {
		cfg := quick()
		cfg.DockerConfig = filepath.Join(dir, file)
		if _, err := repository(t, client(t, cfg), basic.Addr+"/a:b", Options{}).Resolve(ctx); !kind(err) {
			t.Errorf("%s: %v", file, err)
		}
	}
	// CRI's old form.
	for name, auths := range map[string]map[string]LegacyAuth{
		"user": {basic.Addr: {Username: "joe", Password: "secret"}}, "auth": {"https://" + basic.Addr + "/": {Auth: "am9lOnNlY3JldA=="}},
	} {
		cfg := quick()
		cfg.Legacy.Auths = auths
		if _, err := repository(t, client(t, cfg), basic.Addr+"/a:b", Options{}).Resolve(ctx); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestChallenges: what a registry wants is met only as far as it is safe, and what cannot be met is asked for once.
func TestChallenges(t *testing.T) {
	joe := Options{Credentials: func(context.Context, string) (Credential, error) {
		return Credential{Username: "joe", Password: "secret"}, nil
	}}
	var asked, told atomic.Int64
	stranger := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		told.Add(1)
		_, _ = io.WriteString(w, "{}")
	}))
	defer stranger.Close()
	for name, c := range map[string]struct {
		challenge string
		secure    bool
		words     string
	}{
		"no realm of HTTP":           {`Bearer realm="ftp://x/token",service="s"`, false, "unsupported scheme"},
		"HTTP, of one with HTTPS":    {`Bearer realm="` + stranger.URL + `/token"`, true, "uses http but registry was contacted over https"},
		"the cloud's own":            {`Bearer realm="http://169.254.169.254/token"`, false, "blocked prefix"},
		"no token":                   {`Bearer realm="` + stranger.URL + `/token"`, false, "empty token"},
		"something else":             {`Negotiate`, false, "401 Unauthorized"},
		"nothing":                    {"", false, "401 Unauthorized"},
		"a challenge that is broken": {`Bearer realm="`, false, "unsupported protocol scheme"},
	} {
		handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			if c.challenge != "" {
				w.Header().Set("WWW-Authenticate", c.challenge)
			}
			w.WriteHeader(http.StatusUnauthorized)
		})
		server := httptest.NewUnstartedServer(handler)
		if c.secure {
			server.StartTLS()
		} else {
			server.Start()
		}
		asked.Store(0)
		told.Store(0)
		_, err := repository(t, client(t, quick()), server.Listener.Addr().String()+"/a:b", joe).Resolve(context.Background())
		if !errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), c.words) || asked.Load() != 1 {
			t.Errorf("%s: %v, asked %d times", name, err, asked.Load())
		}
		if told.Load() > 0 && name != "no token" {
			t.Errorf("%s: a stranger was told", name)
		}
		server.Close()
	}
	tokens := regproxy.StartTokens(t)
	server := regproxy.Start(t, regproxy.Options{Tokens: tokens})
	ref := "localhost" + strings.TrimPrefix(server.Addr, "127.0.0.1") + "/a:b"
	if _, err := repository(t, client(t, quick()), ref, Options{}).Resolve(context.Background()); !errdefs.IsNotFound(err) {
		t.Errorf("localhost's tokens are at 127.0.0.1: %v", err)
	}
}

// TestLocalhost: a registry on this machine is found to speak HTTPS or HTTP, and then asked so at once.
func TestLocalhost(t *testing.T) {
	authority := regproxy.NewAuthority(t)
	for name, o := range map[string]regproxy.Options{"HTTP": {}, "HTTPS": {TLS: authority}} {
		server := regproxy.Start(t, o)
		r := client(t, quick())
		image := paint(t, random(4, 1000))
		ref := "localhost" + strings.TrimPrefix(server.Addr, "127.0.0.1") + "/a:b"
		image.hang(t, repository(t, r, ref, Options{}))
		if got, err := repository(t, r, ref, Options{}).Resolve(context.Background()); err != nil || got.Digest != image.manifest.Digest {
			t.Errorf("%s: %v, %v", name, got.Digest, err)
		}
		if r.plain["localhost"+strings.TrimPrefix(server.Addr, "127.0.0.1")] != (name == "HTTP") {
			t.Errorf("%s: it is remembered as plain: %v", name, r.plain)
		}
	}
}

// TestBabble: whatever does not answer TLS in its words is asked with plain HTTP, where that may be.
func TestBabble(t *testing.T) {
	server := regproxy.Start(t, regproxy.Options{})
	image := paint(t, random(5, 1000))
	image.hang(t, repository(t, client(t, quick()), server.Addr+"/a:b", Options{}))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	front := &http.Server{Handler: httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: server.Addr})}
	done := make(chan error)
	go func() { done <- front.Serve(babble{l}) }()
	repo := repository(t, client(t, quick()), l.Addr().String()+"/a:b", Options{})
	if got, err := repo.Resolve(context.Background()); err != nil || got.Digest != image.manifest.Digest {
		t.Errorf("%v, %v", got, err)
	}
	_ = front.Close()
	<-done
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
}

// babble answers what begins like TLS as some servers of plain HTTP do.
type babble struct{ net.Listener }

func (b babble) Accept() (net.Conn, error) {
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		first := make([]byte, 1)
		if _, err := io.ReadFull(c, first); err == nil && first[0] != 0x16 { // no handshake (RFC 8446, 5.1)
			return &begun{c, io.MultiReader(bytes.NewReader(first), c)}, nil
		}
		_, _ = io.WriteString(c, "<html>400 Bad Request</html>\n")
		_ = c.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
	}
}

// begun is a connection of which something was read.
type begun struct {
	net.Conn
	r io.Reader
}

func (b *begun) Read(p []byte) (int, error) { return b.r.Read(p) }

// TestReferences: what is no reference is refused before anybody is asked.
func TestReferences(t *testing.T) {
	r := client(t, quick())
	for ref, want := range map[string]string{
		"busybox":                           "docker.io/library/busybox:latest",
		"localhost:5000/a":                  "localhost:5000/a:latest",
		"a.b/c:d@sha256:" + zeros:           "a.b/c:d@sha256:" + zeros,
		"":                                  "",
		"A.b/C":                             "",
		"a.b/c@sha256:12":                   "",
		"http://a.b/c":                      "",
		"a.b/../c":                          "",
		"a.b/c:" + strings.Repeat("x", 200): "",
	} {
		p, err := r.Repository(ref, Options{})
		if want == "" && !errdefs.IsInvalidArgument(err) || want != "" && (err != nil || p.Reference().String() != want) {
			t.Errorf("%q: %v, %v", ref, p, err)
		}
	}
	p := repository(t, r, "a.b/c", Options{})
	for name, d := range map[string]ocispec.Descriptor{"digest": {Digest: "sha256:12", Size: 1}, "size": {Digest: digest.FromString("x"), Size: -1}} {
		if _, err := p.Fetch(context.Background(), d, 0); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := p.Fetch(context.Background(), ocispec.Descriptor{Digest: digest.FromString("x"), Size: 1}, 2); !errdefs.IsOutOfRange(err) {
		t.Error(err)
	}
	if rc, err := p.Fetch(context.Background(), describe("x", nil), 0); err != nil {
		t.Error(err)
	} else if data, err := io.ReadAll(rc); err != nil || len(data) != 0 {
		t.Error(data, err)
	}
}

const zeros = "0000000000000000000000000000000000000000000000000000000000000000"
