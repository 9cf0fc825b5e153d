package transfer

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/verify"
)

// TestPullVerified: an image that a verifier refuses is not fetched; one that it allows is.
func TestPullVerified(t *testing.T) {
	e := newEnv(t, content.Shared)
	good := e.reg.image("a:good", platforms.DefaultSpec(), 1, 1000)
	bad := e.reg.image("a:bad", platforms.DefaultSpec(), 2, 1000)
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\n[ \"$2 $4\" = '%s %s' ] || { echo 'not signed'; exit 1; }\n", e.name("a:good"), good.manifest.Digest)
	if err := os.WriteFile(filepath.Join(dir, "signed"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	e.cfg.Verify = verify.New(verify.Config{Dir: dir, Max: 10, Timeout: within}).Verify

	_, err := e.pull(e.ctx, "a:bad", Image{Unpacks: unpackHere()})
	if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "image verifier signed") || !strings.Contains(err.Error(), "not signed") {
		t.Error(err)
	}
	if e.here(e.ctx, bad.manifest) || e.reg.bytes(bad.config.Digest) > 0 || e.reg.bytes(bad.layers[0].Digest) > 0 {
		t.Error("content of the refused image was fetched")
	}
	if _, err := e.cfg.Images.Get(e.ctx, e.name("a:bad")); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if _, err := e.pull(e.ctx, "a:good", Image{Unpacks: unpackHere()}); err != nil {
		t.Error(err)
	}
	e.clean(0)
}
