package command_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/test/regproxy"
)

// loud is ok for commands that tell how they go on.
func (w *world) loud(args ...string) string {
	w.Helper()
	out, errs, status := w.mctl(args...)
	if status != 0 {
		w.Fatalf("mctl %q: status %d, %s", args, status, errs)
	}
	return out
}

// TestContentRegistry: single objects go to a registry and come from it, and an image without being unpacked.
func TestContentRegistry(t *testing.T) {
	w := newWorld(t)
	server := regproxy.Start(t, regproxy.Options{})
	ref, copied := server.Addr+"/a/b:1", server.Addr+"/copy:1"
	w.loud("images", "push", "--plain-http", ref, busybox)
	raw := w.ok("content", "fetch-object", "--plain-http", ref)
	skopeo, err := exec.Command("skopeo", "inspect", "--raw", "--tls-verify=false", "docker://"+ref).Output()
	if err != nil || string(skopeo) != raw {
		t.Fatalf("skopeo finds %s (%v), fetch-object %s", skopeo, err, raw)
	}
	target := ocispec.Descriptor{Digest: digest.FromString(raw)}
	var m ocispec.Manifest
	if err := json.Unmarshal([]byte(raw), &m); err != nil {
		t.Fatal(err)
	}
	if len(m.Layers) == 0 { // an index of one
		var index ocispec.Index
		if err := json.Unmarshal([]byte(raw), &index); err != nil {
			t.Fatal(err)
		}
		target = index.Manifests[0]
		raw = w.ok("content", "fetch-object", "--plain-http", server.Addr+"/a/b@"+target.Digest.String())
		parse(t, raw, &m)
	}
	if target.MediaType = m.MediaType; target.MediaType == "" {
		target.MediaType = ocispec.MediaTypeImageManifest
	}
	layer := w.ok("content", "fetch-blob", "--plain-http", ref, m.Layers[0].Digest.String())
	if digest.FromString(layer) != m.Layers[0].Digest {
		t.Errorf("fetch-blob gives %d bytes of %d", len(layer), m.Layers[0].Size)
	}
	two := w.ok("content", "fetch-blob", "--plain-http", ref, m.Config.Digest.String(), m.Layers[0].Digest.String())
	if config, ok := strings.CutSuffix(two, layer); !ok || digest.FromString(config) != m.Config.Digest {
		t.Errorf("two blobs are %d bytes", len(two))
	}

	// Part by part into another repository, the manifest last.
	for _, d := range append(m.Layers, m.Config, target) {
		if out := w.ok("content", "push-object", "--plain-http", copied, d.Digest.String(), d.MediaType); out != "Pushed "+d.Digest.String()+" "+d.MediaType+"\n" {
			t.Errorf("push-object prints %q", out)
		}
	}
	w.ok("images", "rm", "--sync", busybox)
	if out := w.loud("content", "fetch", "--plain-http", copied); out != copied+" "+target.Digest.String()+"\n" {
		t.Errorf("fetch prints %q", out)
	}
	if out := w.ok("snapshots", "ls", "-q"); out != "" {
		t.Errorf("unpacked: %s", out)
	}
	defer func() {
		out := w.loud("images", "pull", "--plain-http", "--print-chainid", "--skip-metadata", copied)
		if key := strings.TrimSpace(w.ok("snapshots", "ls", "-q")); key == "" || out != copied+" "+target.Digest.String()+"\nimage chain ID: "+key+"\n" {
			t.Errorf("pull --print-chainid prints %q, the snapshot is %s", out, key)
		}
	}()
	if out := w.ok("images", "check"); !strings.Contains(out, "complete") || !strings.Contains(out, "false") {
		t.Errorf("check says %s", out)
	}

	zero := "sha256:" + strings.Repeat("0", 64)
	w.fails(1, []string{zero, "not found", "content ls"}, "content", "push-object", "--plain-http", copied, zero, target.MediaType)
	w.fails(1, []string{"nothing", server.Addr}, "content", "fetch-object", "--plain-http", server.Addr+"/nothing:1")
	w.fails(1, []string{zero}, "content", "fetch-blob", "--plain-http", ref, zero)
	nobody := regproxy.Nobody(t)
	w.fails(1, []string{nobody}, "content", "fetch-object", "--plain-http", nobody+"/a:1")
	w.fails(2, []string{"A B"}, "content", "fetch-object", "A B")
	w.fails(2, []string{"abc"}, "content", "fetch-blob", ref, "abc")
}

// TestContentRegistryAuth: a registry that wants a password gets the one that is given, and its certificate is verified as
// --hosts-dir says.
func TestContentRegistryAuth(t *testing.T) {
	w := newWorld(t)
	authority := regproxy.NewAuthority(t)
	server := regproxy.Start(t, regproxy.Options{TLS: authority, Htpasswd: htpasswd})
	hosts := func(a *regproxy.Authority) string {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, server.Addr), 0o755); err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("server = %q\nca = %q\n", server.URL(), a.File)
		if err := os.WriteFile(filepath.Join(dir, server.Addr, "hosts.toml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	ref := server.Addr + "/a/b:1"
	d := digest.FromString("{}").String()
	w.in("{}", "content", "ingest", "mine")
	push := func(flags ...string) []string {
		return append(append([]string{"content", "push-object"}, flags...), ref, d, ocispec.MediaTypeImageConfig)
	}
	w.fails(1, []string{"certificate"}, push("-u", "joe:secret", "--hosts-dir", hosts(regproxy.NewAuthority(t)))...)
	w.fails(1, []string{server.Addr, "user and password", "unauthorized"}, push("-k")...)
	w.fails(1, []string{server.Addr, "401"}, push("-k", "-u", "joe:wrong")...)
	w.fails(1, []string{"--user"}, push("-k", "-u", "joe")...)
	var pushed struct{ Digest string }
	if parse(t, w.ok(append(push("-k", "-u", "joe:secret"), "-o", "json")...), &pushed); pushed.Digest != d {
		t.Errorf("pushed %+v", pushed)
	}
	if out := w.ok("content", "fetch-blob", "--hosts-dir", hosts(authority), "-u", "joe:secret", ref, d); out != "{}" {
		t.Errorf("fetched %q", out)
	}
}
