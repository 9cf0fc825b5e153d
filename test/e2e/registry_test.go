package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/registry"
	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/regproxy"
)

// TestCtrRegistry: Debian's ctr and skopeo, and the daemon's client of registries, find the same image, whoever pushed it.
func TestCtrRegistry(t *testing.T) {
	ctx := context.Background()
	u := newUser(t)
	server := regproxy.Start(t, regproxy.Options{})
	r := registry.New(registry.Config{})
	defer r.Close()
	repository := func(ref string) *registry.Repository {
		p, err := r.Repository(ref, registry.Options{PlainHTTP: true})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	fetch := func(p *registry.Repository, d ocispec.Descriptor) []byte {
		t.Helper()
		rc, err := p.Fetch(ctx, d, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		data, err := io.ReadAll(rc)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}

	pushed := row(t, u.ctr("images", "ls"), ref)[2]
	theirs, ours := server.Addr+"/theirs:1", server.Addr+"/ours:1"
	u.ctr("images", "push", "--plain-http", theirs, ref)
	from, to := repository(theirs), repository(ours)
	desc, err := from.Resolve(ctx)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "digest of what ctr pushed", desc.Digest.String(), pushed)
	raw, err := exec.Command("skopeo", "inspect", "--raw", "--tls-verify=false", "docker://"+theirs).Output()
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "digest that skopeo finds", digest.FromBytes(raw).String(), pushed)

	var manifest ocispec.Manifest
	if err := json.Unmarshal(fetch(from, desc), &manifest); err != nil {
		t.Fatal(err)
	}
	for _, d := range append(manifest.Layers, manifest.Config, desc) {
		if err := to.Push(ctx, d, bytes.NewReader(fetch(from, d))); err != nil {
			t.Fatal(err)
		}
	}
	u.ctr("images", "rm", "--sync", ref)
	u.ctr("images", "pull", "--plain-http", ours)
	equal(t, "digest of what ctr pulled", row(t, u.ctr("images", "ls"), ours)[2], pushed)
	check := row(t, u.ctr("images", "check"), ours)
	equal(t, "check", check[3]+" "+check[len(check)-1], "complete true")
}

// TestRegistryConfig: the daemon finds mirrors and credentials in containerd's configuration, of today and of before; who
// fails is named to the user.
func TestRegistryConfig(t *testing.T) {
	server := regproxy.Start(t, regproxy.Options{})
	n := makeNoise(t, server.URL(), "a", 2, 200_000, 100_000)
	mirror, dead := regproxy.Before(t, server, nil), regproxy.Nobody(t)
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("certs.d/new.invalid/hosts.toml", "[host.\"http://"+dead+"\"]\n[host.\""+mirror.URL+"\"]\n")
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
	d.Args = []string{"--config", write("config.toml", `version = 2
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "`+filepath.Join(dir, "certs.d")+`"
[plugins."io.containerd.grpc.v1.cri".registry.mirrors."old.invalid"]
endpoint = ["`+mirror.URL+`"]
[plugins."io.managerd.registry.v1.client"]
attempts = 2
`)}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"new.invalid", "old.invalid"} {
		mirror.Heal()
		has(t, u.mctl("images", "pull", host+"/a:latest"), n.target.Digest.String())
		if seen := mirror.Seen("HEAD", "/v2/a/manifests/latest"); len(seen) != 1 || seen[0].Query != "ns="+host {
			t.Errorf("%s: %+v", host, seen)
		}
	}
	has(t, u.failing(1, u.Mctl("images", "pull", "new.invalid/b:1")), "cannot resolve new.invalid/b:1", "http://"+dead, "connection refused", mirror.URL, "404 Not Found", "there is no host new.invalid")
	log, err := os.ReadFile(d.Log())
	if err != nil {
		t.Fatal(err)
	}
	has(t, string(log), "is read, but a later version will not", "registry.mirrors")
	// A change of a host directory needs no restart.
	write("certs.d/new.invalid/hosts.toml", "server = \"ftp://x\"\n")
	has(t, u.failing(1, u.Mctl("images", "pull", "new.invalid/a:latest")), "hosts.toml: server: ", "neither http:// nor https://")
}
