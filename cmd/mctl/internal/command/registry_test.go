package command_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/regproxy"
)

// htpasswd is joe's, secret.
const htpasswd = "joe:$2y$05$sTHYYmy/AO26EQmrVpkvZ.9jiFpn9j.JGCQdhoiCSWGNi4bmJcKXK\n"

// file writes one below dir, and gives its path.
func file(t *testing.T, dir, name, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// as runs mctl with variables set.
func (w *world) as(env []string, args ...string) (out, errs string, status int) {
	w.Helper()
	cmd := w.Mctl(args...)
	cmd.Env = append(os.Environ(), env...)
	return w.run(cmd, "")
}

// TestDockerConfig: mctl shows registries what the user's Docker configuration has for them, by itself or by its helpers.
func TestDockerConfig(t *testing.T) {
	w := newWorld(t)
	basic := regproxy.Start(t, regproxy.Options{Htpasswd: htpasswd})
	tokens := regproxy.StartTokens(t)
	tokens.Users["joe"], tokens.Refresh = "sesame-b1f4", "refresh me"
	token := regproxy.Start(t, regproxy.Options{Tokens: tokens})
	dir := t.TempDir()
	path := "PATH=" + dir + ":" + os.Getenv("PATH")
	file(t, dir, "docker-credential-knows", "#!/bin/sh\nread server\necho \"$1 $server\" >>"+dir+"/asked\necho '{\"ServerURL\":\"'$server'\",\"Username\":\"joe\",\"Secret\":\"secret\"}'\n", 0o755)
	file(t, dir, "docker-credential-token", "#!/bin/sh\ncat >/dev/null\necho '{\"Username\":\"<token>\",\"Secret\":\"refresh me\"}'\n", 0o755)
	file(t, dir, "docker-credential-empty", "#!/bin/sh\ncat >/dev/null\necho credentials not found in native keychain\nexit 1\n", 0o755)
	file(t, dir, "docker-credential-locked", "#!/bin/sh\ncat >/dev/null\necho the keyring is locked\nexit 1\n", 0o755)
	auth := `{"auths":{"%s":{"auth":"am9lOnNlY3JldA=="}}}`
	for _, c := range []struct {
		name, config string // a %s of config is the registry's address
		at           *regproxy.Registry
		words        []string // of an error; nil: it works
	}{
		{"nothing", `{}`, basic, []string{basic.Addr, "user and password"}},
		{"another registry", `{"auths":{"example.org":{"auth":"am9lOnNlY3JldA=="}}}`, basic, []string{basic.Addr, "user and password"}},
		{"auths", auth, basic, nil},
		{"auths by URL", strings.Replace(auth, "%s", "https://%s/v1/", 1), basic, nil},
		{"helper of the registry", `{"credHelpers":{"%s":"knows"}}`, basic, nil},
		{"helper of all", `{"credsStore":"knows"}`, basic, nil},
		{"helper of the registry before that of all", `{"credsStore":"locked","credHelpers":{"%s":"knows"}}`, basic, nil},
		{"helper that has none", `{"credsStore":"empty"}`, basic, []string{basic.Addr, "user and password"}},
		{"helper that fails", `{"credsStore":"locked"}`, basic, []string{"config.json: credential of " + basic.Addr, "the keyring is locked", "user and password"}},
		{"helper that is not there", `{"credsStore":"absent"}`, basic, []string{"docker-credential-absent", "user and password"}},
		{"no JSON", `{`, basic, []string{"config.json", "user and password"}},
		{"password for tokens", `{"auths":{"%s":{"username":"joe","password":"sesame-b1f4"}}}`, token, nil},
		{"identity token", `{"auths":{"%s":{"username":"joe","identitytoken":"refresh me"}}}`, token, nil},
		{"identity token of a helper", `{"credsStore":"token"}`, token, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := &world{T: t, Daemon: w.Daemon}
			docker := t.TempDir()
			config := c.config
			if strings.Contains(config, "%s") {
				config = fmt.Sprintf(config, c.at.Addr)
			}
			file(t, docker, "config.json", config, 0o600)
			ref := c.at.Addr + "/" + filepath.Base(docker) + ":1"
			for _, args := range [][]string{{"images", "push", "--plain-http", ref, busybox}, {"images", "pull", "--plain-http", ref}, {"content", "fetch-object", "--plain-http", ref}} {
				_, errs, status := w.as([]string{path, "DOCKER_CONFIG=" + docker}, args...)
				if len(c.words) == 0 && status != 0 {
					t.Fatalf("mctl %q: %s", args, errs)
				}
				if len(c.words) == 0 {
					continue
				}
				words := c.words
				if args[0] == "content" {
					words = words[:len(words)-1] // mctl gives up by itself
				}
				for _, word := range words {
					if status != 1 || !strings.Contains(errs, word) {
						t.Errorf("mctl %q: status %d, no %q in %s", args, status, word, errs)
					}
				}
			}
		})
	}
	if asked, err := os.ReadFile(filepath.Join(dir, "asked")); err != nil || !strings.Contains(string(asked), "get "+basic.Addr+"\n") {
		t.Errorf("the helper was asked %q, %v", asked, err)
	}

	// At home, and behind what the command line says.
	ref := basic.Addr + "/home:1"
	home := t.TempDir()
	file(t, home, ".docker/config.json", fmt.Sprintf(auth, basic.Addr), 0o600)
	if _, errs, status := w.as([]string{"HOME=" + home, "DOCKER_CONFIG="}, "images", "push", "--plain-http", ref, busybox); status != 0 {
		t.Error(errs)
	}
	if _, errs, status := w.as([]string{"HOME=" + home, "DOCKER_CONFIG="}, "images", "push", "--plain-http", "-u", "joe:wrong", ref, busybox); status != 1 || !strings.Contains(errs, "401 Unauthorized") {
		t.Errorf("with another password: %d, %s", status, errs)
	}
	if _, errs, status := w.as([]string{"HOME=", "DOCKER_CONFIG="}, "images", "push", "--plain-http", "-u", "joe:secret", ref, busybox); status != 0 {
		t.Errorf("without a home: %s", errs)
	}
	w.stores(t, "sesame-b1f4", "refresh me", "am9lOnNlY3JldA==")
}

// stores fails the test if the daemon has one of these secrets in a file.
func (w *world) stores(t *testing.T, secrets ...string) {
	t.Helper()
	err := filepath.WalkDir(w.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		for _, s := range secrets {
			if bytes.Contains(data, []byte(s)) {
				t.Errorf("%s holds %q", path, s)
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestSecret: a secret that is not given is asked for, and not shown.
func TestSecret(t *testing.T) {
	w := newWorld(t)
	server := regproxy.Start(t, regproxy.Options{Htpasswd: htpasswd})
	ref := server.Addr + "/a:1"
	tm := w.terminal("images", "push", "--plain-http", "--user", "joe", ref, busybox)
	tm.shows("Secret: ")
	tm.types("secret\r")
	tm.shows(ref + " sha256:")
	tm.ends(0)
	if strings.Contains(strings.ReplaceAll(tm.shown.String(), "Secret: ", ""), "secret") {
		t.Errorf("the secret is shown: %q", tm.shown.String())
	}
	tm = w.terminal("images", "pull", "--plain-http", "--user", "joe", ref)
	tm.shows("Secret: ")
	tm.types("other\r")
	tm.shows("401 Unauthorized")
	tm.ends(1)
	w.fails(1, []string{"--user has no secret"}, "images", "pull", "--plain-http", "--user", "joe", ref)
	w.fails(2, []string{"--user and --refresh"}, "images", "pull", "--user", "joe:secret", "--refresh", "x", ref)
}

// TestCertificates: --tlscacert, --tlscert, --tlskey and --skip-verify, for a registry by name and for one on this machine.
func TestCertificates(t *testing.T) {
	authority, clients, other := regproxy.NewAuthority(t), regproxy.NewAuthority(t), regproxy.NewAuthority(t)
	dir, temp := t.TempDir(), t.TempDir()
	cert, key := filepath.Join(dir, "me.cert"), filepath.Join(dir, "me.key")
	if err := clients.Issue(cert, key, "client"); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	local := regproxy.Start(t, regproxy.Options{TLS: authority, Client: clients})
	plain := regproxy.Start(t, regproxy.Options{})
	ref := local.Addr + "/a:1"
	mine := []string{"--tlscacert", authority.File, "--tlscert", cert, "--tlskey", key}
	w.loud(append(append([]string{"images", "push"}, mine...), ref, busybox)...)
	w.loud(append(append([]string{"images", "pull"}, mine...), ref)...)
	w.ok(append(append([]string{"content", "fetch-object"}, mine...), ref)...)
	pull := func(flags ...string) []string { return append(append([]string{"images", "pull"}, flags...), ref) }
	for _, c := range []struct {
		status int
		words  []string
		args   []string
	}{
		{1, []string{local.Addr, "client certificate"}, pull("--tlscacert", authority.File)},
		{1, []string{local.Addr, "certificate"}, pull("--tlscacert", other.File, "--tlscert", cert, "--tlskey", key)},
		{1, []string{local.Addr, "HTTPS"}, pull("--plain-http")},
		{2, []string{"--tlskey"}, pull("--tlscert", cert)},
		{2, []string{"--hosts-dir"}, pull("--tlscacert", authority.File, "--hosts-dir", dir)},
		{2, []string{"--hosts-dir"}, pull("--skip-verify", "--hosts-dir", dir)},
		{1, []string{"/nosuch.crt"}, pull("--tlscacert", "/nosuch.crt")},
		{1, []string{cert}, pull("--tlscacert", authority.File, "--tlscert", cert, "--tlskey", cert)},
		{1, []string{plain.Addr}, []string{"images", "pull", "--tlscacert", authority.File, plain.Addr + "/a:1"}},
	} {
		_, errs, status := w.as([]string{"TMPDIR=" + temp}, c.args...)
		for _, word := range c.words {
			if status != c.status || !strings.Contains(errs, word) {
				t.Errorf("mctl %q: status %d, no %q in %s", c.args, status, word, errs)
			}
		}
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestFarRegistry: the certificate of a registry that is not on this machine is verified, unless --skip-verify says not to.
func TestFarRegistry(t *testing.T) {
	authority := regproxy.NewAuthority(t)
	server := regproxy.Before(t, regproxy.Start(t, regproxy.Options{}), authority.Server(t, "registry.invalid"))
	d, err := harness.New(bin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	d.Env = []string{"HTTPS_PROXY=" + regproxy.Tunnel(t, server.Addr), "NO_PROXY="}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, Daemon: d}
	w.ok("images", "import", archive)
	const ref = "registry.invalid/a:1"
	push := func(flags ...string) []string {
		return append(append([]string{"images", "push"}, flags...), ref, busybox)
	}
	for _, flags := range [][]string{nil, {"--tlscacert", regproxy.NewAuthority(t).File}} {
		_, errs, status := w.mctl(push(flags...)...)
		if status != 1 || !strings.Contains(errs, "registry.invalid") || !strings.Contains(errs, "certificate") {
			t.Errorf("%q: status %d, %s", flags, status, errs)
		}
	}
	if seen := server.Seen("", ""); len(seen) != 0 {
		t.Errorf("somebody unknown was asked: %+v", seen)
	}
	w.loud(push("--skip-verify")...)
	w.loud(push("--tlscacert", authority.File)...)
	w.loud("images", "pull", "-k", ref)
	if out, err := exec.Command("skopeo", "inspect", "--raw", "--tls-verify=false", "docker://"+server.Addr+"/a:1").CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestHTTPDebug: --http-dump and --http-trace show what the daemon asks a registry, and no secret.
func TestHTTPDebug(t *testing.T) {
	w := newWorld(t)
	server := regproxy.Start(t, regproxy.Options{Htpasswd: htpasswd})
	ref := server.Addr + "/a:1"
	const secret = "am9lOnNlY3JldA=="
	for _, c := range []struct {
		args       []string
		says, not  string
		moreOfThat string
	}{
		{[]string{"images", "push", "--http-dump", "--plain-http", "-u", "joe:secret", ref, busybox}, "POST /v2/a/blobs/uploads/", "reused: ", "Authorization: (hidden)"},
		{[]string{"images", "pull", "--http-dump", "--plain-http", "-u", "joe:secret", ref}, "HEAD /v2/a/manifests/1 HTTP/1.1", "reused: ", "401 Unauthorized"},
		{[]string{"images", "pull", "--http-trace", "--plain-http", "-u", "joe:secret", ref}, "reused: ", "HTTP/1.1", "HEAD http://" + server.Addr + "/v2/a/manifests/1: "},
		{[]string{"content", "fetch-object", "--http-dump", "--http-trace", "--plain-http", "-u", "joe:secret", ref}, "HEAD /v2/a/manifests/1 HTTP/1.1", secret, "reused: "},
	} {
		_, errs, status := w.mctl(c.args...)
		if status != 0 || !strings.Contains(errs, c.says) || !strings.Contains(errs, c.moreOfThat) || strings.Contains(errs, c.not) || strings.Contains(errs, secret) {
			t.Errorf("mctl %q: status %d, says %s", c.args, status, errs)
		}
	}
	if out, errs, status := w.mctl("images", "pull", "--plain-http", "-u", "joe:secret", ref); status != 0 || strings.Contains(errs, "HTTP/1.1") || out == "" {
		t.Errorf("without the flag: %s", errs)
	}
}
