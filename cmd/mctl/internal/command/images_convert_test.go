package command_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/test/image"
	"github.com/managerd/managerd/test/regproxy"
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

// TestConvertForOthers: skopeo takes, from a registry, what gzip layers were converted to, and finds every digest right.
func TestConvertForOthers(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "gzip.tar")
	if err := image.Write(file, image.Options{Name: "local/gzip:1", Compression: image.Gzip, Layers: [][]image.File{{{Name: "f", Body: "1", Mode: 0o644}}}}); err != nil {
		t.Fatal(err)
	}
	w.ok("images", "import", "--no-unpack", file)
	server := regproxy.Start(t, regproxy.Options{})
	for _, flag := range []string{"--zstd", "--uncompress"} {
		name := server.Addr + "/a:" + flag[2:]
		d := strings.TrimSpace(w.ok("images", "convert", flag, "local/gzip:1", name))
		if d == w.inspect("local/gzip:1").Digest {
			t.Errorf("%s did nothing", flag)
		}
		w.loud("images", "push", "--plain-http", name)
		to := t.TempDir()
		out, err := exec.Command("skopeo", "copy", "--src-tls-verify=false", "docker://"+name, "dir:"+to).CombinedOutput()
		if err != nil {
			t.Fatalf("skopeo copy of %s: %v: %s", name, err, out)
		}
		if data, err := os.ReadFile(filepath.Join(to, "manifest.json")); err != nil || digest.FromBytes(data).String() != d {
			t.Errorf("skopeo has another manifest than %s: %s, %v", d, data, err)
		}
	}
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
	if out := w.ok("images", "inspect", "--content", "busybox"); !strings.Contains(out, `"diff_ids": [`) || !strings.Contains(out, leaf.Digest) || strings.Contains(w.ok("images", "inspect", "busybox"), "diff_ids") {
		t.Errorf("no content in %s", out)
	}
	var whole []struct {
		Target struct{ Content ocispec.Manifest }
	}
	if parse(t, w.ok("images", "inspect", "--content", "-o", "json", "busybox"), &whole); len(whole) != 1 || whole[0].Target.Content.SchemaVersion != 2 {
		t.Errorf("%+v", whole)
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
