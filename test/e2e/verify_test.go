package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/regproxy"
)

// TestImageVerifier: a pull from a registry asks the program in bin_dir first; nothing of a refused image is fetched.
func TestImageVerifier(t *testing.T) {
	server := regproxy.Start(t, regproxy.Options{})
	n := makeNoise(t, server.URL(), "a", 1, 100_000)
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
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
	write("bin/signed", "#!/bin/sh\ngrep -q \"$4\" "+dir+"/signatures 2>/dev/null && exit 0\necho no signature\nexit 1\n", 0o755)
	d, err := harness.New(bin)
	if err != nil {
		t.Fatal(err)
	}
	u := &user{Daemon: d, t: t}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	d.Args = []string{"--config", write("config.toml", "version = 3\n[plugins.\"io.containerd.image-verifier.v1.bindir\"]\nbin_dir = \""+dir+"/bin\"\n", 0o600)}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	ref := server.Addr + "/a:latest"
	has(t, u.failing(1, u.Mctl("images", "pull", "--plain-http", ref)), "image verifier signed: it does not allow "+ref, n.target.Digest.String(), "no signature")
	if out := u.mctl("content", "ls", "-q"); out != "" {
		t.Errorf("content was fetched: %s", out)
	}
	write("signatures", n.target.Digest.String(), 0o644)
	has(t, u.mctl("images", "pull", "--plain-http", ref), n.target.Digest.String())
}

// TestImageVerifiers: the settings of bin_dir's programs: how long one may take, how many are asked, and what becomes of those
// that cannot be run. A transfer that is refused leaves nothing, no process either.
func TestImageVerifiers(t *testing.T) {
	server := regproxy.Start(t, regproxy.Options{})
	n := makeNoise(t, server.URL(), "a", 1, 100_000)
	n.ref = server.Addr + "/a:latest"
	u := configured(t, `
[plugins."io.containerd.image-verifier.v1.bindir"]
bin_dir = "DIR/bin"
max_verifiers = 2
per_verifier_timeout = "2s"
`)
	bins := filepath.Join(u.Dir, "bin")
	set := func(programs map[string]string) {
		t.Helper()
		if err := os.RemoveAll(bins); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(bins, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, script := range programs {
			mode := os.FileMode(0o755)
			if script == "" {
				mode = 0o644
			}
			if err := os.WriteFile(filepath.Join(bins, name), []byte("#!/bin/sh\n"+script+"\n"), mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	u.start()
	pid := filepath.Join(u.Dir, "pid")
	m := newMover(t, u.Daemon)
	for _, c := range []struct {
		name     string
		programs map[string]string
		code     string
		says     []string
	}{
		{"refused", map[string]string{"a": "exit 0", "b": "echo not by us; exit 3"}, "PermissionDenied",
			[]string{"image verifier b: it does not allow " + n.ref, n.target.Digest.String(), "exit status 3", "not by us"}},
		{"told", map[string]string{"a": "read d; case \"$1 $3 $5 $6 $d\" in \"-name -digest -stdin-media-type application/vnd.oci.descriptor.v1+json {\"*" +
			n.target.Digest.String() + "*) exit 0;; esac; echo \"$@ $d\"; exit 1"}, "OK", nil},
		{"hangs", map[string]string{"a": "echo $$ >" + pid + "; exec sleep 1000"}, "DeadlineExceeded", []string{"image verifier a: it took longer than 2s"}},
		{"dies", map[string]string{"a": "kill -9 $$"}, "FailedPrecondition", []string{"image verifier a", "signal: killed"}},
		{"no program", map[string]string{"a": ""}, "FailedPrecondition", []string{"image verifier a", "permission denied"}},
		{"beyond max_verifiers", map[string]string{"a": "exit 0", "b": "exit 0", "c": "exit 1"}, "OK", nil},
		{"none", nil, "OK", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := &user{Daemon: u.Daemon, t: t}
			set(c.programs)
			_, err := m.move(plain(n.ref), stored(n.ref))
			if code(err) != c.code {
				t.Fatal(err)
			}
			if err == nil {
				n.whole(t, u.Daemon)
				u.mctl("images", "rm", "--sync", n.ref)
			} else {
				has(t, err.Error(), c.says...)
			}
			for _, list := range []string{"images", "content", "snapshots"} {
				if out := u.ctr(list, "ls"); rows(out) != 0 {
					t.Errorf("%s are left: %s", list, out)
				}
			}
		})
	}
	data, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	if name, err := os.ReadFile("/proc/" + strings.TrimSpace(string(data)) + "/comm"); err == nil && strings.TrimSpace(string(name)) == "sleep" {
		t.Error("the verifier that hangs lives")
	}
	log, err := os.ReadFile(u.Log())
	if err != nil {
		t.Fatal(err)
	}
	has(t, string(log), "there are more than max_verifiers")
	u.configure("[plugins.\"io.containerd.image-verifier.v1.bindir\"]\nbin_dir = \"DIR/nosuch\"\n")
	u.restart(u.Stop)
	if _, err := newMover(t, u.Daemon).move(plain(n.ref), stored(n.ref)); err != nil {
		t.Errorf("without the directory: %v", err)
	}
}

// TestLayerLimits: a layer that becomes more than the configuration allows is neither pulled, nor imported, nor applied for a
// client; what it has taken is given back, and the image comes once the limit is lifted.
func TestLayerLimits(t *testing.T) {
	server := regproxy.Start(t, regproxy.Options{})
	s := makeSecret(t, server, ocispec.MediaTypeImageLayerGzip, func(plain []byte) ([]byte, map[string]string) { return plain, nil })
	section := "[plugins.\"io.containerd.differ.v1.walking\"]\n"
	u := configured(t, section+"max_layer_bytes = 500000\n")
	u.start()
	refused := func(says string) {
		t.Helper()
		for _, how := range []string{"pull", "import"} {
			err := s.get(t, u, how)
			if code(err) != "ResourceExhausted" {
				t.Fatalf("%s: %v", how, err)
			}
			has(t, err.Error(), says, "layer "+s.layer.Digest.String())
			for _, list := range []string{"images", "snapshots"} {
				if out := u.ctr(list, "ls"); rows(out) != 0 {
					t.Errorf("%s: %s are left: %s", how, list, out)
				}
			}
		}
		has(t, u.fails(1, "images", "import", s.tar), says) // ctr has the diff service apply it, and leaves the name
		u.ctr("images", "rm", "--sync", s.ref)
		if left, err := filepath.Glob(filepath.Join(u.Root(), "io.containerd.snapshotter.v1.overlayfs", "snapshots", "*", "fs", "*")); err != nil || len(left) > 0 {
			t.Errorf("files are left: %v, %v", left, err)
		}
	}
	refused("max_layer_bytes")
	u.configure(section + "max_layer_entries = 1\n")
	u.restart(u.Stop)
	refused("max_layer_entries")
	u.configure(section + "max_layer_bytes = 1000000\nmax_layer_entries = 2\n")
	u.restart(u.Stop)
	for _, how := range []string{"pull", "import"} {
		if err := s.get(t, u, how); err != nil {
			t.Fatal(err)
		}
		s.decoded(t, u)
	}
	u.nothing()
}
