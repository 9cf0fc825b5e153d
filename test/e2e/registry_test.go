package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os/exec"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/registry"
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
