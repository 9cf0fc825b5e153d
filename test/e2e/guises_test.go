package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/regproxy"
)

// htpasswd is joe's, secret.
const htpasswd = "joe:$2y$05$sTHYYmy/AO26EQmrVpkvZ.9jiFpn9j.JGCQdhoiCSWGNi4bmJcKXK\n"

// skopeo runs Debian's client, which must succeed.
func skopeo(t *testing.T, args ...string) string {
	t.Helper()
	out, err := harness.Output(exec.Command("skopeo", append([]string{"--insecure-policy"}, args...)...))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestMctlRegistries: a registry in each of its guises takes what mctl pushes and gives what it pulls, skopeo finds the same,
// and whoever is not let in is told why.
func TestMctlRegistries(t *testing.T) {
	authority, clients := regproxy.NewAuthority(t), regproxy.NewAuthority(t)
	tokens := regproxy.StartTokens(t)
	tokens.Users["joe"], tokens.Refresh = "secret", "refresh me"
	certs := t.TempDir() // as skopeo and Docker have them
	if err := clients.Issue(filepath.Join(certs, "me.cert"), filepath.Join(certs, "me.key"), "client"); err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(authority.File)
	if err == nil {
		err = os.WriteFile(filepath.Join(certs, "ca.crt"), pem, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	hosts := func(addr string) string {
		dir := t.TempDir()
		if err := os.Symlink(certs, filepath.Join(dir, addr)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	type refusal struct {
		flags string
		words []string
	}
	u := newUser(t)
	pushed := row(t, u.mctl("images", "ls"), ref)[2]
	for _, c := range []struct {
		name    string
		server  regproxy.Options
		flags   string // HOSTS stands for a directory of host directories
		skopeo  string
		refused []refusal
	}{
		{"plain", regproxy.Options{}, "--plain-http", "--tls-verify=false", nil},
		{"plain, found out", regproxy.Options{}, "", "--tls-verify=false", nil},
		{"TLS", regproxy.Options{TLS: authority}, "--tlscacert " + authority.File, "--cert-dir " + certs, []refusal{
			{"--tlscacert " + clients.File, []string{"certificate"}},
			{"--plain-http", []string{"HTTPS"}},
		}},
		{"TLS, by a host directory", regproxy.Options{TLS: authority, Client: clients}, "--hosts-dir HOSTS", "--cert-dir " + certs, nil},
		{"client certificate", regproxy.Options{TLS: authority, Client: clients}, "--tlscacert " + authority.File + " --tlscert " + certs + "/me.cert --tlskey " + certs + "/me.key", "--cert-dir " + certs, []refusal{
			{"--tlscacert " + authority.File, []string{"client certificate"}},
		}},
		{"password", regproxy.Options{Htpasswd: htpasswd}, "-u joe:secret", "--tls-verify=false --creds joe:secret", []refusal{
			{"", []string{"user and password"}}, {"-u joe:wrong", []string{"401 Unauthorized"}},
		}},
		{"password and TLS", regproxy.Options{TLS: authority, Htpasswd: htpasswd}, "-u joe:secret -k", "--creds joe:secret --cert-dir " + certs, []refusal{
			{"-k", []string{"user and password"}},
		}},
		{"tokens", regproxy.Options{Tokens: tokens}, "-u joe:secret", "--tls-verify=false --creds joe:secret", []refusal{
			{"-u joe:wrong", []string{"incorrect username or password"}},
		}},
		{"refresh token", regproxy.Options{Tokens: tokens}, "--refresh refresh\x00me", "--tls-verify=false --creds joe:secret", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := &user{Daemon: u.Daemon, t: t}
			server := regproxy.Start(t, c.server)
			split := func(flags string) []string {
				out := strings.Fields(strings.ReplaceAll(flags, "HOSTS", hosts(server.Addr)))
				for i := range out {
					out[i] = strings.ReplaceAll(out[i], "\x00", " ")
				}
				return out
			}
			images := func(verb, flags string, args ...string) []string {
				return append(append([]string{"images", verb}, split(flags)...), args...)
			}
			ours, theirs := server.Addr+"/some/where:ours", server.Addr+"/some/where:theirs"
			for _, r := range c.refused {
				has(t, u.failing(1, u.Mctl(images("push", r.flags, ours, ref)...)), append(r.words, server.Addr)...)
			}
			u.mctl(images("push", c.flags, ours, ref)...)
			raw := skopeo(t, append(append([]string{"inspect", "--raw"}, split(c.skopeo)...), "docker://"+ours)...)
			equal(t, "what skopeo finds", digest.FromString(raw).String(), pushed)
			var both []string
			for _, f := range split(c.skopeo) { // of skopeo copy, flags are for either side
				if name, ok := strings.CutPrefix(f, "--"); ok {
					both = append(both, "--src-"+name, "--dest-"+name)
				} else {
					both = append(both[:len(both)-1], f, both[len(both)-1], f)
				}
			}
			skopeo(t, append(append([]string{"copy", "--preserve-digests"}, both...), "docker://"+ours, "docker://"+theirs)...)
			equal(t, "what mctl pulls", u.mctl(images("pull", c.flags, theirs)...), theirs+" "+pushed+"\n")
			u.mctl("images", "rm", theirs)
			for _, r := range c.refused {
				if c.server.Tokens == nil || r.flags != "" { // a token to pull is anybody's
					has(t, u.failing(1, u.Mctl(images("pull", r.flags, theirs)...)), append(r.words, server.Addr)...)
				}
			}
		})
	}
}
