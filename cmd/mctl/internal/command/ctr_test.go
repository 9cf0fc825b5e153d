package command_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	mountsapi "github.com/containerd/containerd/api/services/mounts/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/test/clients"
	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/regproxy"
)

// TestForCtr: flags that scripts made for ctr have are taken, and what is not done is said.
func TestForCtr(t *testing.T) {
	w := newWorld(t)
	server := regproxy.Start(t, regproxy.Options{})
	dir := t.TempDir()
	tar, target := filepath.Join(dir, "out.tar"), filepath.Join(dir, "mnt")
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	ref := server.Addr + "/a:1"
	w.loud("--debug", "images", "push", "--local", "--plain-http", ref, busybox)
	w.loud("images", "pull", "--local", "--sync-fs", "--skip-metadata", "--max-concurrent-downloads", "1", "--plain-http", ref)
	w.ok("images", "export", "--local", tar, ref)
	w.ok("images", "import", "--local", "--sync-fs", "--all-platforms", tar)
	w.ok("images", "tag", "--local", "--skip-reference-check", ref, "local/a:1")
	w.ok("images", "mount", "--sync-fs", "--plain-http", "-k", "-u", "joe:secret", "--hosts-dir", "/nowhere", "--label", "a=b", ref, target)
	w.ok("images", "unmount", "--plain-http", "--label", "a=b", "--rm", target)
	w.ok("snapshots", "unpack", "--sync-fs", ref)
	w.ok("content", "active", "-t", "60s", "--root", "/nowhere", "ref~=^layer")

	for _, c := range []struct {
		words []string
		args  []string
	}{
		{[]string{"--erofs: ", "--snapshotter erofs"}, []string{"images", "convert", "--erofs", "raw", ref, "local/e:1"}},
		{[]string{"--erofs-compressors: "}, []string{"images", "convert", "--erofs-compressors=lz4", ref, "local/e:1"}},
		{[]string{"--snapshotter erofs"}, []string{"images", "build-erofs-cache", "--dmverity", ref, dir}},
		{[]string{"--runc-systemd-cgroup: "}, []string{"plugins", "inspect-runtime", "--runc-systemd-cgroup"}},
		{[]string{"--max-concurrent-downloads", "-1"}, []string{"images", "pull", "--max-concurrent-downloads", "-1", ref}},
		{[]string{"--max-concurrent-uploaded-layers", "-1"}, []string{"images", "push", "--max-concurrent-uploaded-layers", "-1", ref}},
		{[]string{"--manifest-type", "--manifest"}, []string{"images", "push", "--manifest-type", ocispec.MediaTypeImageIndex, ref}},
		{[]string{"--manifest", "NAME"}, []string{"images", "push", "--manifest", digest.FromString("x").String(), ref, busybox}},
		{[]string{"abc", "digest"}, []string{"images", "push", "--manifest", "abc", ref}},
	} {
		w.fails(2, c.words, c.args...)
	}
}

// TestPushManifest: a manifest or an index that no image has is pushed by its digest.
func TestPushManifest(t *testing.T) {
	w := newWorld(t)
	server := regproxy.Start(t, regproxy.Options{})
	w.ok("images", "import", "--no-unpack", multi(t, "amd64", "arm64"))
	index := w.inspect("docker.io/library/multi:1")
	arm := index.Children[1]
	foreign := "not for everybody"
	layer, config := digest.FromString(foreign), digest.FromString("{}")
	w.in(foreign, "content", "ingest", "foreign")
	w.in("{}", "content", "ingest", "config")
	manifest := fmt.Sprintf(`{"schemaVersion":2,"config":{"mediaType":%q,"digest":%q,"size":2},"layers":[{"mediaType":%q,"digest":%q,"size":%d}]}`,
		ocispec.MediaTypeImageConfig, config, "application/vnd.oci.image.layer.nondistributable.v1.tar", layer, len(foreign))
	windows := strings.TrimSpace(w.in(manifest, "content", "ingest", "manifest"))
	for _, c := range []struct{ tag, digest string }{{"index", index.Digest}, {"one", arm.Digest}} {
		ref := server.Addr + "/a:" + c.tag
		if out := w.loud("images", "push", "--plain-http", "--max-concurrent-uploaded-layers", "2", "--manifest", c.digest, ref); out != ref+" "+c.digest+"\n" {
			t.Errorf("%s: push prints %q", c.tag, out)
		}
		if got := digest.FromString(w.ok("content", "fetch-object", "--plain-http", ref)); got.String() != c.digest {
			t.Errorf("%s became %s", c.tag, got)
		}
	}
	ref := server.Addr + "/b:1"
	_, errs, status := w.mctl("images", "push", "--plain-http", "--manifest", windows, ref)
	if _, err := os.Stat(server.Blob(layer.Encoded())); err == nil || status != 1 || !strings.Contains(errs, "blob unknown to registry") {
		t.Errorf("a layer that is not to be distributed was pushed, or the registry did not miss it: %d, %s", status, errs)
	}
	w.loud("images", "push", "--plain-http", "--allow-non-distributable-blobs", "--manifest", windows, "--manifest-type", ocispec.MediaTypeImageManifest, ref)
	if _, err := os.Stat(server.Blob(layer.Encoded())); err != nil {
		t.Error(err)
	}
	w.loud("images", "push", "--plain-http", "--manifest", index.Digest, "--platform", "linux/arm64", ref)
	if got := digest.FromString(w.ok("content", "fetch-object", "--plain-http", ref)); got.String() != arm.Digest {
		t.Errorf("--platform pushed %s, not %s", got, arm.Digest)
	}

	zero := "sha256:" + strings.Repeat("0", 64)
	w.fails(1, []string{zero, "not found", "content ls"}, "images", "push", "--plain-http", "--manifest", zero, ref)
	w.fails(1, []string{layer.String()}, "images", "push", "--plain-http", "--manifest", layer.String(), ref)
	_, errs, status = w.mctl("images", "push", "--plain-http", "--manifest", windows, "--manifest-type", ocispec.MediaTypeImageLayer, ref)
	if status != 1 || !strings.Contains(errs, "is none of an image") {
		t.Errorf("as a layer: %d, %s", status, errs)
	}
}

// TestFetchBlobAs: --media-type is what a registry is asked for.
func TestFetchBlobAs(t *testing.T) {
	w := newWorld(t)
	server := regproxy.Before(t, regproxy.Start(t, regproxy.Options{}), nil)
	ref := server.Addr + "/a:1"
	w.loud("images", "push", "--plain-http", ref, busybox)
	image := w.inspect(busybox)
	layer := image.Children[len(image.Children)-1]
	for _, part := range []struct{ mediaType, digest string }{{image.Type, image.Digest}, {layer.Type, layer.Digest}} {
		server.Heal()
		if got := digest.FromString(w.ok("content", "fetch-blob", "--plain-http", "--media-type", part.mediaType, ref, part.digest)); got.String() != part.digest {
			t.Errorf("got %s, not %s", got, part.digest)
		}
		seen := server.Seen("GET", part.digest)
		if len(seen) == 0 || seen[0].Header.Get("Accept") != part.mediaType {
			t.Errorf("asked %+v, not for %s", seen, part.mediaType)
		}
	}
}

// TestMetadataFromMirror: content fetch --metadata-only asks where the daemon's configuration says.
func TestMetadataFromMirror(t *testing.T) {
	server := regproxy.Start(t, regproxy.Options{})
	dir := t.TempDir()
	file(t, dir, "certs.d/far.invalid/hosts.toml", "server = \""+server.URL()+"\"\n", 0o600)
	d, err := harness.New(bin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	d.Args = []string{"--config", file(t, dir, "config.toml", "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \""+filepath.Join(dir, "certs.d")+"\"\n", 0o600)}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, Daemon: d}
	w.ok("images", "import", archive)
	w.loud("images", "push", "far.invalid/a:1", busybox)
	target := w.inspect(busybox)
	w.ok("images", "rm", "--sync", busybox)
	if out := w.loud("content", "fetch", "--metadata-only", "far.invalid/a:1"); out != "far.invalid/a:1 "+target.Digest+"\n" {
		t.Errorf("fetch prints %q", out)
	}
	if got := strings.Fields(w.ok("content", "ls", "-q")); len(got) != 2 {
		t.Errorf("there are %q", got)
	}
}

// TestAsCtr2: what mctl has of the ctr of containerd 2 prints what that prints.
func TestAsCtr2(t *testing.T) {
	w := newWorld(t)
	ctr2, err := clients.Build(clients.Ctr)
	if err != nil {
		t.Fatal(err)
	}
	w.Client = ctr2
	chain := strings.TrimSpace(w.ok("snapshots", "unpack", "busybox"))
	w.ok("snapshots", "prepare", "one", chain)
	numbers := regexp.MustCompile("[0-9a-f]{32}") // what the daemon has mounted is called by its name
	for _, args := range [][]string{{"images", "usage", busybox}, {"snapshots", "mounts", "/mnt", "one"}, {"snapshots", "mounts", "--temp", "/mnt", "one"}} {
		theirs, errs, status := w.run(w.Command(args...), "")
		if status != 0 {
			t.Fatalf("ctr %q: %s", args, errs)
		}
		ours := w.ok(args...)
		if words := func(s string) []string { return strings.Fields(numbers.ReplaceAllString(s, "#")) }; !reflect.DeepEqual(words(ours), words(theirs)) {
			t.Errorf("%q: mctl prints\n%s\nctr prints\n%s", args, ours, theirs)
		}
	}
	w.deactivate("ctrone")
	bound := strings.Fields(w.ok("snapshots", "mounts", "--temp", "/mnt", "one"))[3]
	if _, err := os.Stat(filepath.Join(bound, "bin", "busybox")); err != nil || !strings.HasPrefix(bound, w.State()) {
		t.Errorf("--temp: the snapshot is not mounted: %v", err)
	}
	w.ok("snapshots", "unmount", "one")
	if _, err := os.Stat(bound); err == nil {
		t.Errorf("unmount leaves %s", bound)
	}
	w.fails(1, []string{"one", "not found"}, "snapshots", "unmount", "one")
	w.fails(1, []string{busybox, "native", "snapshots unpack"}, "images", "usage", "--snapshotter", "native", busybox)
	w.fails(1, []string{"nope", "not found"}, "images", "usage", "nope")
	if ours, long := w.ok("images", "i", busybox), w.ok("images", "inspect", busybox); ours != long {
		t.Errorf("i prints %q", ours)
	}

	var theirs, ours map[string]any
	out, errs, status := w.run(w.Command("plugins", "inspect-runtime"), "")
	if status != 0 || json.Unmarshal([]byte(out), &theirs) != nil {
		t.Fatalf("ctr plugins inspect-runtime: %s%s", out, errs)
	}
	if parse(t, w.ok("plugins", "inspect-runtime"), &ours); !reflect.DeepEqual(ours, theirs) {
		t.Errorf("inspect-runtime: mctl prints\n%v\nctr prints\n%v", ours, theirs)
	}
	w.fails(1, []string{"io.containerd.nosuch.v1"}, "plugins", "inspect-runtime", "--runtime", "io.containerd.nosuch.v1")
	w.fails(2, []string{"--runc-binary", "io.containerd.nosuch.v1"}, "plugins", "inspect-runtime", "--runc-binary", "/bin/crun", "--runtime", "io.containerd.nosuch.v1")
}

// deactivate takes away what the daemon has mounted by this name.
func (w *world) deactivate(name string) {
	w.Helper()
	conn, err := w.Conn()
	if err != nil {
		w.Fatal(err)
	}
	if _, err := mountsapi.NewMountsClient(conn).Deactivate(w.Context(w.T.Context()), &mountsapi.DeactivateRequest{Name: name}); err != nil {
		w.Error(err)
	}
}

// TestNamespaceCgroup: --cgroup takes away the cgroup that containers of a namespace were in.
func TestNamespaceCgroup(t *testing.T) {
	w := newWorld(t)
	other := w.Namespace + "-x"
	w.ok("-n", other, "images", "import", archive)
	w.ok("-n", other, "run", "--rm", busybox, "one", "true")
	w.ok("-n", other, "images", "rm", "--sync", busybox)
	dirs := func() []string {
		v2, _ := filepath.Glob("/sys/fs/cgroup/" + other)
		v1, _ := filepath.Glob("/sys/fs/cgroup/*/" + other)
		return append(v1, v2...)
	}
	if len(dirs()) == 0 {
		t.Fatal("its containers were in no cgroup of that name")
	}
	if out := w.ok("namespaces", "rm", "--cgroup", other); out != other+"\n" {
		t.Errorf("rm prints %q", out)
	}
	if left := dirs(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
