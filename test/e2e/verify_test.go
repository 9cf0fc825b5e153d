package e2e

import (
	"os"
	"path/filepath"
	"testing"

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
