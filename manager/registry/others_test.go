package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/test/regproxy"
)

// skopeo runs Debian's client.
func skopeo(t *testing.T, args ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath("skopeo"); err != nil {
		t.Fatal("there is no skopeo: contrib/deps.sh test installs it")
	}
	cmd := exec.Command("skopeo", append([]string{"--insecure-policy"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("skopeo %s: %v\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return out
}

// TestSkopeo: another client and this one find the same under each name, whoever pushed it, in OCI's form and in Docker's.
func TestSkopeo(t *testing.T) {
	ctx := context.Background()
	authority := regproxy.NewAuthority(t)
	server := regproxy.Start(t, regproxy.Options{TLS: authority, Htpasswd: htpasswd})
	dir := hostDir(t, map[string]string{server.Addr + "/hosts.toml": "ca = \"" + authority.File + "\"\n"})
	certs := filepath.Join(t.TempDir(), "certs")
	if err := os.Mkdir(certs, 0o700); err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(authority.File)
	if err == nil {
		err = os.WriteFile(filepath.Join(certs, "ca.crt"), pem, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	joe := Options{HostDir: dir, Credentials: func(context.Context, string) (Credential, error) {
		return Credential{Username: "joe", Password: "secret"}, nil
	}}
	r := client(t, quick())
	image := paint(t, random(30, 1<<20))
	image.hang(t, repository(t, r, server.Addr+"/ours:1", joe))
	layout := filepath.Join(t.TempDir(), "layout")
	skopeo(t, "copy", "--src-cert-dir", certs, "--src-creds", "joe:secret", "--preserve-digests", "docker://"+server.Addr+"/ours:1", "oci:"+layout+":x")
	if got := digest.FromBytes(skopeo(t, "inspect", "--raw", "--cert-dir", certs, "--creds", "joe:secret", "docker://"+server.Addr+"/ours:1")); got != image.manifest.Digest {
		t.Errorf("skopeo finds %s, we pushed %s", got, image.manifest.Digest)
	}
	for d, want := range image.data {
		got, err := os.ReadFile(filepath.Join(layout, "blobs", "sha256", d.Encoded()))
		same(t, "as skopeo pulled it: "+d.String(), got, err, want)
	}
	for name, format := range map[string]string{"oci": ocispec.MediaTypeImageManifest, "v2s2": dockerManifest} {
		ref := server.Addr + "/theirs/" + name + ":1"
		skopeo(t, "copy", "--format", name, "--dest-cert-dir", certs, "--dest-creds", "joe:secret", "oci:"+layout+":x", "docker://"+ref)
		raw := skopeo(t, "inspect", "--raw", "--cert-dir", certs, "--creds", "joe:secret", "docker://"+ref)
		repo := repository(t, r, ref, joe)
		desc, err := repo.Resolve(ctx)
		if err != nil || desc.Digest != digest.FromBytes(raw) || desc.MediaType != format || desc.Size != int64(len(raw)) {
			t.Errorf("%s: %+v, %v; skopeo finds %s", name, desc, err, digest.FromBytes(raw))
			continue
		}
		got, err := all(repo, desc, 0)
		same(t, name, got, err, raw)
		var manifest ocispec.Manifest
		if err := json.Unmarshal(raw, &manifest); err != nil {
			t.Fatal(err)
		}
		for _, d := range append(manifest.Layers, manifest.Config) {
			if data, err := all(repo, d, 0); err != nil || digest.FromBytes(data) != d.Digest {
				t.Errorf("%s: %s: %v", name, d.Digest, err)
			}
		}
	}
}
