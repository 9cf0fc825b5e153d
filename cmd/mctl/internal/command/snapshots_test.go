package command_test

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"

	"github.com/managerd/managerd/manager/diff"
	"github.com/managerd/managerd/shimapi/mount"
)

// layerNames lists what is in a layer.
func layerNames(t *testing.T, layer string) (out []string) {
	t.Helper()
	plain, _, err := diff.Decompress(strings.NewReader(layer))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = plain.Close() }()
	for r := tar.NewReader(plain); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, strings.TrimSuffix(h.Name, "/"))
	}
}

// put writes a file into an active snapshot.
func (w *world) put(key, name string) {
	w.Helper()
	var mounts []*types.Mount
	parse(w.T, w.ok("snapshots", "mounts", "/x", key, "-o", "json"), &mounts)
	dir := w.TempDir()
	if err := mount.Mount(mounts, dir); err != nil {
		w.Fatal(err)
	}
	err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644)
	if err := errors.Join(err, mount.Unmount(dir)); err != nil {
		w.Fatal(err)
	}
}

// TestSnapshots: snapshots are made, written to, frozen, compared and labelled.
func TestSnapshots(t *testing.T) {
	w := newWorld(t)
	var images []struct{ Digest string }
	parse(t, w.ok("images", "ls", "-o", "json"), &images)
	chain := strings.TrimSpace(w.ok("snapshots", "unpack", images[0].Digest))
	if out := w.ok("snapshots", "unpack", "busybox"); out != chain+"\n" || !strings.HasPrefix(chain, "sha256:") {
		t.Errorf("unpack prints %q and %q", chain, out)
	}
	if out := w.ok("snapshots", "--snapshotter", "native", "unpack", "busybox"); out != chain+"\n" {
		t.Errorf("unpack prints %q", out)
	}
	zero := "sha256:" + strings.Repeat("0", 64)
	w.fails(1, []string{zero, "not found", "images ls"}, "snapshots", "unpack", zero)

	if out := w.ok("snapshots", "prepare", "one", chain); out != "" {
		t.Errorf("prepare prints %q", out)
	}
	w.put("one", "mine")
	w.fails(1, []string{"one", "already exists"}, "snapshots", "prepare", "one", chain)
	w.fails(1, []string{"nope", "not found", "snapshots ls"}, "snapshots", "prepare", "two", "nope")
	if got := layerNames(t, w.ok("snapshots", "diff", "one")); !slices.Equal(got, []string{"mine"}) {
		t.Errorf("an active snapshot's layer has %q", got)
	}
	if out := w.ok("snapshots", "commit", "first", "one"); out != "" {
		t.Errorf("commit prints %q", out)
	}
	w.fails(1, []string{"one", "not found"}, "snapshots", "commit", "again", "one")
	if got := layerNames(t, w.ok("snapshots", "diff", "--media-type", "application/vnd.oci.image.layer.v1.tar", "first")); !slices.Equal(got, []string{"mine"}) {
		t.Errorf("a committed snapshot's layer has %q", got)
	}
	if got := layerNames(t, w.ok("snapshots", "diff", "first", chain)); !slices.Equal(got, []string{".wh.mine"}) {
		t.Errorf("the way back has %q", got)
	}

	t.Setenv("SOURCE_DATE_EPOCH", "1000")
	h, err := tar.NewReader(strings.NewReader(w.ok("snapshots", "diff", "--media-type", "application/vnd.oci.image.layer.v1.tar", "first"))).Next()
	if err != nil || h.ModTime.Unix() != 1000 {
		t.Errorf("with a source date: %+v, %v", h, err)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "today")
	w.fails(1, []string{"SOURCE_DATE_EPOCH", "today"}, "snapshots", "diff", "first")
	t.Setenv("SOURCE_DATE_EPOCH", "")

	// Without a parent, and kept.
	w.ok("snapshots", "prepare", "alone")
	w.put("alone", "a")
	var layer struct{ Digest, MediaType string }
	parse(t, w.ok("snapshots", "diff", "--keep", "--label", "k=v", "-o", "json", "alone"), &layer)
	w.fails(1, []string{"text/plain"}, "snapshots", "diff", "--media-type", "text/plain", "alone")
	w.fails(1, []string{"nope", "not found"}, "snapshots", "diff", "nope")

	if out := w.ok("snapshots", "view", "--target", "/mnt", "look", "first"); !strings.HasPrefix(out, "mount -t overlay overlay /mnt -o ") {
		t.Errorf("view prints %q", out)
	}
	var mounts []struct{ Type, Source string }
	parse(t, w.ok("snapshots", "view", "--mounts", "look2", "first"), &mounts)
	if len(mounts) != 1 || mounts[0].Type != "overlay" {
		t.Errorf("mounts are %+v", mounts)
	}
	if out := w.ok("snapshots", "mounts", "/mnt", "look"); !strings.HasPrefix(out, "mount -t overlay overlay /mnt -o ") {
		t.Errorf("mounts prints %q", out)
	}
	w.fails(1, []string{"nope", "not found", "snapshots ls"}, "snapshots", "mounts", "/mnt", "nope")

	if out := w.ok("snapshots", "label", "first", "k=v"); !strings.HasSuffix(out, ",k=v\n") {
		t.Errorf("label prints %q", out)
	}
	w.ok("leases", "rm", "--sync", strings.TrimSpace(w.ok("leases", "create")))
	if out := w.ok("snapshots", "ls", "-q"); !strings.Contains(out, "first\n") || !strings.Contains(out, "look\n") || strings.Contains(out, "mctl-view") {
		t.Errorf("snapshots are %s", out)
	}
	if got := layerNames(t, w.ok("content", "get", layer.Digest)); !slices.Equal(got, []string{"a"}) || !strings.HasSuffix(layer.MediaType, "+gzip") {
		t.Errorf("%+v has %q", layer, got)
	}
	w.ok("snapshots", "rm", "look", "look2", "alone")
	w.ok("snapshots", "label", "first", "containerd.io/gc.root=")
	w.ok("leases", "rm", "--sync", strings.TrimSpace(w.ok("leases", "create")))
	if out := w.ok("snapshots", "ls", "-q"); strings.Contains(out, "first") {
		t.Errorf("not collected: %s", out)
	}
}
