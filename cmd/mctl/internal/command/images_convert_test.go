package command_test

import (
	"encoding/json"
	"strings"
	"testing"
)

// part is a blob of an image as inspect shows it.
type part struct {
	Type, Digest, Platform string
	Size                   int64
	Present                bool
	Children               []part
}

func (w *world) inspect(name string) part {
	w.Helper()
	var infos []struct {
		Name   string
		Target part
	}
	parse(w.T, w.ok("images", "inspect", "-o", "json", name), &infos)
	if len(infos) != 1 || infos[0].Name == "" {
		w.Fatalf("%s is %+v", name, infos)
	}
	return infos[0].Target
}

// TestConvert: a converted image is another one of the same files.
func TestConvert(t *testing.T) {
	w := newWorld(t)
	out := w.ok("images", "convert", "--oci", "--zstd", "busybox", "local/busybox:zstd")
	target := w.inspect("local/busybox:zstd")
	if out != target.Digest+"\n" {
		t.Errorf("convert prints %q, the image is %s", out, target.Digest)
	}
	manifest := target
	if len(manifest.Children) == 1 {
		manifest = manifest.Children[0]
	}
	if last := manifest.Children[len(manifest.Children)-1]; !strings.HasSuffix(last.Type, ".tar+zstd") || !last.Present {
		t.Errorf("the last layer is %+v", last)
	}
	w.ok("leases", "rm", "--sync", strings.TrimSpace(w.ok("leases", "create"))) // collects what nothing refers to
	w.exits(3, "run", "--rm", "--snapshotter", "native", "local/busybox:zstd", "x", "sh", "-c", "exit 3")

	// Back again, over itself, without the original.
	w.ok("images", "rm", "--sync", busybox)
	var row struct{ Name, Digest string }
	parse(t, w.ok("images", "convert", "-o", "json", "--uncompress", "local/busybox:zstd", "local/busybox:zstd"), &row)
	if target := w.inspect("local/busybox:zstd"); row.Digest != target.Digest || row.Name != "local/busybox:zstd" {
		t.Errorf("%+v, the image is %+v", row, target)
	}
	w.ok("leases", "rm", "--sync", strings.TrimSpace(w.ok("leases", "create")))
	w.exits(4, "run", "--rm", "local/busybox:zstd", "x", "sh", "-c", "exit 4")

	w.fails(1, []string{"nope", "not found", "images ls"}, "images", "convert", "nope", "x:1")
	w.fails(2, []string{"--uncompress", "--zstd"}, "images", "convert", "--uncompress", "--zstd", "a", "b")
	w.fails(2, []string{"--platform", "--all-platforms"}, "images", "convert", "--platform", "linux/amd64", "--all-platforms", "a", "b")
}

// TestInspect: an image is shown with all its parts, also with those that are not there.
func TestInspect(t *testing.T) {
	w := newWorld(t)
	w.ok("images", "label", busybox, "k=v")
	target := w.inspect("busybox")
	leaf := func(p part) part {
		for len(p.Children) > 0 {
			p = p.Children[len(p.Children)-1]
		}
		return p
	}(target)
	out := w.ok("images", "inspect", "busybox")
	for _, line := range []string{busybox + "\n", "│   Label: k=v\n", "└── " + target.Type + " @" + target.Digest, "└── " + leaf.Type + " @" + leaf.Digest} {
		if !strings.Contains(out, line) {
			t.Errorf("%q is not in %s", line, out)
		}
	}
	if !target.Present || strings.Contains(out, "missing") {
		t.Errorf("%+v: %s", target, out)
	}
	w.ok("content", "rm", leaf.Digest)
	if out := w.ok("images", "inspect", "busybox"); strings.Count(out, ", missing)") != 1 {
		t.Errorf("%s is not missing: %s", leaf.Digest, out)
	}
	if w.inspect("busybox").Digest != target.Digest {
		t.Error("another image")
	}
	out, errs, status := w.mctl("images", "inspect", "-o", "json", "nope", "busybox")
	var infos []json.RawMessage
	if parse(t, out, &infos); len(infos) != 1 || status != 1 || !strings.Contains(errs, "nope") {
		t.Errorf("%d, %s: %s", status, errs, out)
	}
}
