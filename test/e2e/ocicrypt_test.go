package e2e

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/test/regproxy"
)

// TestOcicrypt: containerd's own decoder of encrypted layers, which is built from its published source, decodes what is
// pulled and imported with the node's keys, and without the key says so.
func TestOcicrypt(t *testing.T) {
	dir := t.TempDir()
	build := func(name, pkg string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		cmd := exec.Command("go", "build", "-o", path, pkg)
		cmd.Dir = filepath.Join("testdata", "ocicrypt")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("cannot build %s: %v\n%s", pkg, err, out)
		}
		return path
	}
	encrypt := build("encrypt", ".")
	decoder := build("ctd-decoder", "github.com/containerd/imgcrypt/cmd/ctd-decoder")

	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, data []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	publicKey := write("public.pem", "PUBLIC KEY", public)
	private := write("keys/private.pem", "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key))

	registry := regproxy.Start(t, regproxy.Options{})
	s := makeSecret(t, registry, encryptedLayer, func(plain []byte) ([]byte, map[string]string) {
		file := filepath.Join(dir, "annotations.json")
		cmd := exec.Command(encrypt, publicKey, file)
		var out, errs bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(plain), &out, &errs
		if err := cmd.Run(); err != nil {
			t.Fatalf("%v: %s", err, errs.String())
		}
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		annotations := map[string]string{}
		if err := json.Unmarshal(data, &annotations); err != nil {
			t.Fatal(err)
		}
		return out.Bytes(), annotations
	})
	u := configured(t, `
[stream_processors."io.containerd.ocicrypt.decoder.v1.tar.gzip"]
accepts = ["`+encryptedLayer+`"]
returns = "`+ocispec.MediaTypeImageLayerGzip+`"
path = "`+decoder+`"
args = ["--decryption-keys-path", "`+filepath.Join(dir, "keys")+`"]
`)
	u.start()
	for _, how := range []string{"pull", "import"} {
		if err := s.get(t, u, how); err != nil {
			t.Fatal(err)
		}
		s.decoded(t, u)
	}
	if err := os.Rename(private, filepath.Join(dir, "elsewhere.pem")); err != nil {
		t.Fatal(err)
	}
	for _, how := range []string{"pull", "import"} {
		err := s.get(t, u, how)
		if err == nil {
			t.Fatalf("%s: decoded without the key", how)
		}
		has(t, err.Error(), "layer "+s.layer.Digest.String(), "stream processor io.containerd.ocicrypt.decoder.v1.tar.gzip failed", "exit status 1", "key")
	}
	u.nothing()
}
