package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/regproxy"
)

// incumbent is Debian's containerd, run privately, with its ctr.
type incumbent struct {
	t      *testing.T
	socket string
}

func startIncumbent(t *testing.T) *incumbent {
	t.Helper()
	dir, err := os.MkdirTemp("", "incumbent-") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	i := &incumbent{t, filepath.Join(dir, "c.sock")}
	path := func(name string) string { return filepath.Join(dir, name) }
	config := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.tracing"]
[grpc]
  address = %q
[ttrpc]
  address = %q
[plugins."io.containerd.internal.v1.opt"]
  path = %q
`, path("root"), path("state"), i.socket, path("t.sock"), path("opt"))
	if err := os.WriteFile(path("config.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(path("log"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command("containerd", "--config", path("config.toml"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		_ = os.RemoveAll(dir)
	})
	for deadline := time.Now().Add(harness.Starting); ; time.Sleep(20 * time.Millisecond) {
		if _, err = harness.Output(i.command("version")); err == nil {
			return i
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(path("log"))
			t.Fatalf("containerd does not serve: %v\n%s", err, text)
		}
	}
}

func (i *incumbent) command(args ...string) *exec.Cmd {
	return exec.Command("ctr", append([]string{"-a", i.socket, "-n", "test"}, args...)...)
}

func (i *incumbent) ctr(args ...string) string {
	i.t.Helper()
	out, err := harness.Output(i.command(args...))
	if err != nil {
		i.t.Fatal(err)
	}
	return out
}

// podman keeps its images below dir.
func podman(t *testing.T, dir string, args ...string) string {
	t.Helper()
	all := append([]string{"--root", filepath.Join(dir, "storage"), "--runroot", filepath.Join(dir, "run"), "--storage-driver", "vfs"}, args...)
	out, err := harness.Output(exec.Command("podman", all...))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// manifestOf is the digest of the manifest at one of skopeo's addresses.
func manifestOf(t *testing.T, at string) string {
	t.Helper()
	return digest.FromString(skopeo(t, "inspect", "--raw", at)).String()
}

// TestExchange: an image has the same digests whoever has it, and whichever way it came: from us to Debian's containerd,
// skopeo and podman, and back.
func TestExchange(t *testing.T) {
	u := newUser(t)
	other := startIncumbent(t)
	want := row(t, u.mctl("images", "ls"), ref)[2]
	config := configOf(t, u, want)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	clear := func() {
		u.mctl("images", "rm", "--sync", ref)
		equal(t, "content", u.mctl("content", "ls", "-q"), "")
	}

	// Out.
	u.mctl("images", "export", at("ours.tar"), ref)
	other.ctr("images", "import", at("ours.tar"))
	equal(t, "containerd of ours", row(t, other.ctr("images", "ls"), ref)[2], want)
	has(t, other.ctr("images", "check"), "complete (2/2)")
	equal(t, "skopeo of ours as OCI", manifestOf(t, "oci-archive:"+at("ours.tar")+":latest"), want)
	skopeo(t, "copy", "docker-archive:"+at("ours.tar"), "dir:"+at("dir"))
	equal(t, "skopeo of ours as Docker", digestOfFile(t, filepath.Join(at("dir"), strings.TrimPrefix(config, "sha256:"))), config)
	has(t, podman(t, dir, "load", "--input", at("ours.tar")), "busybox:latest")
	equal(t, "podman's config", "sha256:"+podman(t, dir, "image", "inspect", "--format", "{{.Id}}", ref), config)

	// Back, each in its form.
	other.ctr("images", "export", at("theirs.tar"), ref)
	podman(t, dir, "save", "--format", "docker-archive", "--output", at("podman-docker.tar"), ref)
	podman(t, dir, "save", "--format", "oci-archive", "--output", at("podman-oci.tar"), ref)
	skopeo(t, "copy", "oci-archive:"+at("ours.tar")+":latest", "docker-archive:"+at("skopeo-docker.tar")+":"+ref)
	skopeo(t, "copy", "--preserve-digests", "oci-archive:"+at("ours.tar")+":latest", "oci-archive:"+at("skopeo-oci.tar")+":latest")
	skopeo(t, "copy", "--preserve-digests", "oci-archive:"+at("ours.tar")+":latest", "oci:"+at("layout")+":latest")
	if _, err := harness.Output(exec.Command("tar", "-C", at("layout"), "-cf", at("layout.tar"), ".")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		file string
		same bool // the manifest; else the config only, layers are packed anew
	}{
		{"theirs.tar", true}, {"skopeo-oci.tar", true}, {"layout.tar", true},
		{"skopeo-docker.tar", false}, {"podman-docker.tar", false}, {"podman-oci.tar", false},
	} {
		clear()
		u.mctl("images", "import", "--base-name", "docker.io/library/busybox", at(c.file))
		got := row(t, u.mctl("images", "ls"), ref)[2]
		if c.same {
			equal(t, c.file, got, want)
		}
		equal(t, "config of "+c.file, configOf(t, u, got), config)
		equal(t, "a run of "+c.file, u.ctr("run", "--rm", ref, "c", "echo", "here"), "here\n")
	}

	// Through a registry.
	server := regproxy.Start(t, regproxy.Options{})
	name := func(who string) string { return server.Addr + "/" + who + ":1" }
	clear()
	u.mctl("images", "import", at("ours.tar"))
	u.mctl("images", "push", "--plain-http", name("ours"), ref)
	other.ctr("images", "push", "--plain-http", name("containerd"), ref)
	skopeo(t, "copy", "--preserve-digests", "--dest-tls-verify=false", "oci:"+at("layout")+":latest", "docker://"+name("skopeo"))
	for _, who := range []string{"ours", "containerd", "skopeo"} {
		equal(t, "skopeo of "+who, digest.FromString(skopeo(t, "inspect", "--raw", "--tls-verify=false", "docker://"+name(who))).String(), want)
		equal(t, "mctl of "+who, u.mctl("images", "pull", "--plain-http", name(who)), name(who)+" "+want+"\n")
		u.ctr("images", "pull", "--plain-http", name(who))
		equal(t, "ctr of "+who, row(t, u.ctr("images", "ls"), name(who))[2], want)
		other.ctr("images", "pull", "--plain-http", name(who))
		equal(t, "containerd of "+who, row(t, other.ctr("images", "ls"), name(who))[2], want)
		podman(t, dir, "pull", "--quiet", "--tls-verify=false", name(who))
		equal(t, "podman of "+who, podman(t, dir, "image", "inspect", "--format", "{{.Digest}}", name(who)), want)
	}
}

func digestOfFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return digest.FromBytes(data).String()
}

// configOf is the digest of the config that a manifest in the store names.
func configOf(t *testing.T, u *user, manifest string) string {
	t.Helper()
	text := u.mctl("content", "get", manifest)
	_, rest, ok := strings.Cut(text, `"config":{`)
	i := strings.Index(rest, `"digest":"`)
	if !ok || i < 0 {
		t.Fatalf("no config in %s", text)
	}
	return rest[i+len(`"digest":"`):][:len("sha256:")+64]
}
