package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/test/clients"
	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/regproxy"
)

// ctr2 is a user with the ctr of containerd 2.
func ctr2(t *testing.T) *user {
	t.Helper()
	path, err := clients.Build(clients.Ctr)
	if err != nil {
		t.Fatal(err)
	}
	u := &user{Daemon: harness.Test(t, bin), t: t}
	u.Client = path
	u.ctr("images", "import", archive)
	return u
}

// TestCtr2Registry: the ctr of containerd 2 pulls and pushes by the daemon's Transfer service, and with --local by itself.
func TestCtr2Registry(t *testing.T) {
	u := ctr2(t)
	server := regproxy.Start(t, regproxy.Options{})
	locked := regproxy.Start(t, regproxy.Options{Htpasswd: htpasswd})
	n := makeNoise(t, server.URL(), "noise", 31, 300_000, 100_000, 1000)
	want := row(t, u.ctr("images", "ls"), ref)[2]
	name := func(what string) string { return server.Addr + "/" + what + ":1" }

	u.ctr("images", "push", "--plain-http", name("daemon"), ref)
	u.ctr("images", "push", "--local", "--plain-http", name("local"), ref)
	u.ctr("images", "push", "--platform", "linux/amd64", "--plain-http", name("platform"), ref)
	hosts := t.TempDir()
	if err := os.Mkdir(filepath.Join(hosts, server.Addr), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(hosts, server.Addr, "hosts.toml"), []byte("server = \""+server.URL()+"\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, pushed := range []string{"daemon", "local", "platform"} {
		raw := skopeo(t, "inspect", "--raw", "--tls-verify=false", "docker://"+name(pushed))
		equal(t, "what skopeo finds of "+pushed, digest.FromString(raw).String(), want)
		for _, flags := range []string{
			"--plain-http", "--plain-http --local", "--hosts-dir " + hosts, "--hosts-dir " + hosts + " --local", "--plain-http --platform linux/amd64",
			"--plain-http --all-platforms", "--plain-http --all-platforms --local", "--plain-http --skip-metadata", "--plain-http --local --print-chainid",
		} {
			u.ctr(append(append([]string{"images", "pull"}, strings.Fields(flags)...), name(pushed))...)
			equal(t, "digest with "+flags, row(t, u.ctr("images", "ls"), name(pushed))[2], want)
			u.ctr("images", "rm", name(pushed))
		}
	}
	has(t, u.fails(1, "images", "pull", "--plain-http", name("nothing")), "nothing", "404 Not Found")
	has(t, u.fails(1, "images", "pull", "--plain-http", "--platform", "linux/mips", name("daemon")), "linux/mips")

	// Layers that are not there yet, with their progress, labels, and what was said on the wire.
	n.ref = server.Addr + "/noise:latest"
	dump := u.Command("images", "pull", "--plain-http", "--http-dump", "--label", "a=b", n.ref)
	out, err := dump.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	has(t, string(out), "layer ("+n.layers[0].Digest.Encoded()[:12]+")", "saved", "HEAD /v2/noise/manifests/latest HTTP/1.1", n.target.Digest.String())
	n.whole(t, u.Daemon)
	has(t, strings.Join(row(t, u.ctr("images", "ls"), n.ref), " "), "a=b")
	check := row(t, u.ctr("images", "check"), n.ref)
	equal(t, "check", strings.Join(check[3:5], " ")+" "+check[len(check)-1], "complete (4/4) true")

	at := locked.Addr + "/a:1"
	has(t, u.fails(1, "images", "push", "--plain-http", at, ref), locked.Addr, "user and password")
	has(t, u.fails(1, "images", "push", "--plain-http", "-u", "joe:wrong", at, ref), "401")
	u.ctr("images", "push", "--plain-http", "-u", "joe:secret", at, ref)
	u.ctr("images", "pull", "--plain-http", "-u", "joe:secret", at)
	u.ctr("images", "pull", "--local", "--plain-http", "-u", "joe:secret", at)
	equal(t, "digest behind a password", row(t, u.ctr("images", "ls"), at)[2], want)

	// Parts.
	u.ctr("content", "fetch", "--plain-http", name("daemon"))
	u.ctr("content", "fetch", "--metadata-only", "--plain-http", name("local"))
	equal(t, "fetch-object", digest.FromString(u.ctr("content", "fetch-object", "--plain-http", name("daemon"))).String(), want)
	config := configOf(t, u, want)
	equal(t, "fetch-blob", digest.FromString(u.ctr("content", "fetch-blob", "--plain-http", name("daemon"), config)).String(), config)
	u.ctr("content", "push-object", "--plain-http", name("object"), config, "application/vnd.oci.image.config.v1+json")
	if _, err := os.Stat(server.Blob(strings.TrimPrefix(config, "sha256:"))); err != nil {
		t.Error(err)
	}
	equal(t, "ingests", strings.TrimSpace(u.ctr("content", "active")), "REF\tSIZE\tAGE")
	equal(t, "leases", u.ctr("leases", "ls", "-q"), "")
}

// TestCtr2Images: archives over the daemon's streams and by the client itself, names, and conversions.
func TestCtr2Images(t *testing.T) {
	u := ctr2(t)
	want := row(t, u.ctr("images", "ls"), ref)[2]
	dir := t.TempDir()
	for i, out := range [][]string{{}, {"--local"}, {"--all-platforms"}, {"--platform", "linux/amd64", "--skip-manifest-json", "--skip-non-distributable"}} {
		file := filepath.Join(dir, "x.tar")
		u.ctr(append(append([]string{"images", "export"}, out...), file, ref)...)
		equal(t, "skopeo of the archive", manifestOf(t, "oci-archive:"+file+":latest"), want)
		ins := [][]string{{}, {"--local"}, {"--no-unpack"}, {"--local", "--no-unpack"}, {"--all-platforms"}, {"--snapshotter", "native"}}
		if i > 0 {
			ins = ins[:1]
		}
		for _, in := range ins {
			u.ctr("images", "rm", "--sync", ref)
			u.ctr(append(append([]string{"images", "import"}, in...), file)...)
			check := row(t, u.ctr("images", "check"), ref)
			unpacked := len(in) == 0 || in[len(in)-1] != "--no-unpack" && in[0] != "--snapshotter"
			if check[2] != want || check[3] != "complete" || (check[len(check)-1] == "true") != unpacked {
				t.Errorf("exported with %q, imported with %q: %q", out, in, check)
			}
		}
	}
	u.ctr("images", "import", archive)
	u.ctr("images", "rm", ref)
	in := u.Command("images", "import", "--digests", "--base-name", "local/base", "--index-name", "local/index:1", "-")
	file, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	in.Stdin = file
	if out, err := in.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	names := u.ctr("images", "ls", "-q")
	has(t, names, "local/base@"+want+"\n", "local/index:1\n")
	if strings.Contains(names, ref) {
		t.Errorf("a name that does not begin with the base was taken: %s", names)
	}
	u.ctr("images", "import", archive)

	u.ctr("images", "tag", ref, "local/a:1", "local/b:1")
	u.ctr("images", "tag", "--local", "--force", ref, "local/a:1")
	u.ctr("images", "convert", "--oci", "--uncompress", ref, "local/plain:1")
	has(t, u.ctr("content", "get", row(t, u.ctr("images", "ls"), "local/plain:1")[2]), `"application/vnd.oci.image.layer.v1.tar"`)
	has(t, u.ctr("images", "usage", ref), "sha256:")
	has(t, u.ctr("images", "inspect", ref), ref, want, "application/vnd.oci.image.config.v1+json")
	has(t, u.ctr("images", "check", "-q"), ref+"\n")
	u.ctr("images", "prune", "--all")
	equal(t, "images after prune", u.ctr("images", "ls", "-q"), "")
}

// TestCtr2Rest: what the ctr of containerd 2 asks that Debian's does not.
func TestCtr2Rest(t *testing.T) {
	u := ctr2(t)
	var info struct {
		Features struct{ OCIVersionMin string }
		Name     string
	}
	text := u.ctr("plugins", "inspect-runtime")
	if err := json.Unmarshal([]byte(text), &info); err != nil || info.Name != runtime {
		t.Errorf("%v: %s", err, text)
	}
	has(t, u.ctr("plugins", "ls", "-d", "id==overlayfs"), "io.containerd.snapshotter.v1", "overlayfs", "remap-ids")
	has(t, u.ctr("info"), `"uuid"`, `"pid"`)
	equal(t, "deprecations", u.ctr("deprecations", "list"), "")
	equal(t, "sandboxes", strings.TrimSpace(u.ctr("sandboxes", "ls")), "ID CREATED RUNTIME")
	parent := strings.Fields(strings.Split(u.ctr("snapshots", "ls"), "\n")[1])[0]
	has(t, u.ctr("snapshots", "prepare", "--mounts", "k", parent), `"upperdir=`)
	u.ctr("snapshots", "label", "k", "a=b")
	u.ctr("snapshots", "diff", "--keep", "--media-type", "application/vnd.oci.image.layer.v1.tar+gzip", "k")
	has(t, u.ctr("snapshots", "usage", "-b", "k"), "k ")
	u.ctr("snapshots", "rm", "k")
	u.ctr("run", "-d", ref, "box", "sleep", "1000")
	has(t, u.ctr("t", "metrics", "--format", "json", "box"), `"usage"`)
	equal(t, "exec", u.ctr("t", "exec", "--exec-id", "e", "box", "echo", "here"), "here\n")
	u.ctr("t", "kill", "-s", "KILL", "--all", "box")
	until(t, "end", func() bool { return row(t, u.ctr("t", "ls"), "box")[2] == "STOPPED" })
	u.ctr("t", "rm", "box")
	u.ctr("c", "rm", "box")
}
