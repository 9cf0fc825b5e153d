package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/namespaces"
)

// TestCtrVersion: ctr finds a server, its parts, and namespaces that it can keep.
func TestCtrVersion(t *testing.T) { eachCtr(t, testCtrVersion) }

func testCtrVersion(t *testing.T) {
	u := newUser(t)
	matches(t, u.ctr("version"), `(?s)Client:.*Server:\s+Version:\s+\S+\s+Revision:\s+\S+\s+UUID: [0-9a-f-]{36}`)

	plugins := u.ctr("plugins", "ls")
	for _, want := range []string{"io.containerd.snapshotter.v1", "io.containerd.runtime.v2", "io.containerd.content.v1", "io.containerd.metadata.v1"} {
		if f := row(t, plugins, want); f[len(f)-1] != "ok" {
			t.Errorf("plugin %v does not work", f)
		}
	}
	equal(t, "one plugin", strings.Join(row(t, u.ctr("plugins", "ls", "id==overlayfs"), "io.containerd.snapshotter.v1"), " "),
		"io.containerd.snapshotter.v1 overlayfs linux/amd64 ok")

	u.ctr("namespaces", "create", "other", "a=b")
	equal(t, "namespace", strings.Join(row(t, u.ctr("ns", "ls"), "other"), " "), "other a=b")
	u.ctr("ns", "label", "other", "a=c", "d=e")
	equal(t, "labels", strings.Join(row(t, u.ctr("ns", "ls"), "other"), " "), "other a=c,d=e")
	row(t, u.ctr("ns", "ls", "-q"), u.Namespace)
	has(t, u.fails(1, "ns", "create", "other"), `"other"`, "already exists")
	has(t, u.fails(1, "ns", "rm", u.Namespace), u.Namespace, "must be empty")
	equal(t, "ns rm", u.ctr("ns", "rm", "other"), "other\n")
	if strings.Contains(u.ctr("ns", "ls"), "other") {
		t.Error("a namespace that was removed is listed")
	}
}

// TestCtrImages: an image through its life, with what is stored for it.
func TestCtrImages(t *testing.T) { eachCtr(t, testCtrImages) }

func testCtrImages(t *testing.T) {
	u := newUser(t)
	said := []string{"unpacking " + ref, "done"}
	if containerd2 != "" {
		said = []string{ref, "saved", "Importing"}
	}
	has(t, u.ctr("images", "import", archive), said...) // a second time

	image := row(t, u.ctr("images", "ls"), ref)
	equal(t, "type", image[1], "application/vnd.oci.image.manifest.v1+json")
	equal(t, "platform", image[5], "linux/amd64")
	equal(t, "images ls -q", u.ctr("images", "ls", "-q"), ref+"\n")
	equal(t, "a filter that fits nothing", u.ctr("images", "ls", "-q", "name==nothing"), "")
	check := row(t, u.ctr("images", "check"), ref)
	equal(t, "check", strings.Join(check[3:5], " ")+" "+check[len(check)-1], "complete (2/2) true")

	equal(t, "tag", u.ctr("images", "tag", ref, "example.org/x:1"), "example.org/x:1\n")
	if containerd2 == "" { // which takes the name from who has it
		has(t, u.fails(1, "images", "tag", ref, "example.org/x:1"), `"example.org/x:1"`, "already exists")
	}
	u.ctr("images", "tag", "--force", ref, "example.org/x:1")
	equal(t, "digest of the tag", row(t, u.ctr("images", "ls"), "example.org/x:1")[2], image[2])
	u.ctr("images", "label", "example.org/x:1", "k=v")
	has(t, strings.Join(row(t, u.ctr("images", "ls"), "example.org/x:1"), " "), "k=v")
	equal(t, "rm", u.ctr("images", "rm", "example.org/x:1"), "example.org/x:1\n")
	equal(t, "rm of what is not there", u.ctr("images", "rm", "nosuch"), "")
	has(t, u.fails(1, "images", "tag", "nosuch", "y"), `"nosuch"`, "not found")
	has(t, u.fails(1, "images", "export", filepath.Join(t.TempDir(), "x.tar"), "nosuch"), `"nosuch"`, "not found")

	// Out, and into another daemon: the same image.
	file := filepath.Join(t.TempDir(), "out.tar")
	u.ctr("images", "export", file, ref)
	other := newUser(t)
	other.ctr("images", "rm", ref)
	has(t, other.ctr("images", "import", file), said[0])
	equal(t, "digest on another daemon", row(t, other.ctr("images", "ls"), ref)[2], image[2])
	equal(t, "a run of it", other.ctr("run", "--rm", ref, "c", "echo", "here"), "here\n")

	dir := t.TempDir()
	u.ctr("images", "mount", ref, dir)
	if _, err := os.Stat(filepath.Join(dir, "bin/busybox")); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err == nil {
		t.Error("a mounted image can be written to")
	}
	u.ctr("images", "unmount", "--rm", dir)
	u.unmounted()
	var st, parent unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(filepath.Dir(dir), &parent); err != nil || st.Dev != parent.Dev {
		t.Errorf("the image is still mounted (%v)", err)
	}
	equal(t, "leases", u.ctr("leases", "ls", "-q"), "")

	// Content: every blob is listed and can be read.
	content := u.ctr("content", "ls")
	for _, line := range strings.Split(strings.TrimSpace(u.ctr("content", "ls", "-q")), "\n") {
		row(t, content, line)
		if u.ctr("content", "get", line) == "" {
			t.Errorf("blob %s is empty", line)
		}
	}
	has(t, u.ctr("content", "get", image[2]), `"schemaVersion":2`)
	u.ctr("content", "label", image[2], "a=b")
	has(t, strings.Join(row(t, u.ctr("content", "ls"), image[2]), " "), "a=b")
	missing := "sha256:" + strings.Repeat("0", 64)
	has(t, u.fails(1, "content", "get", missing), missing, "not found")
	cmd := u.Command("content", "ingest", "--expected-digest", missing, "upload")
	cmd.Stdin = strings.NewReader("other bytes")
	has(t, u.failing(1, cmd), missing)
	equal(t, "ingests", strings.TrimSpace(u.ctr("content", "active")), "REF\tSIZE\tAGE")
}

// keep has a lease keep something that is still to be made.
func (u *user) keep(kind, id string) {
	u.t.Helper()
	c := newClient(u.t, u.Daemon)
	api := leasesapi.NewLeasesClient(c.conn)
	ctx := namespaces.With(context.Background(), u.Namespace)
	_, err := api.Create(ctx, &leasesapi.CreateRequest{ID: "keep"})
	if err == nil {
		_, err = api.AddResource(ctx, &leasesapi.AddResourceRequest{ID: "keep", Resource: &leasesapi.Resource{ID: id, Type: kind}})
	}
	if err != nil {
		u.t.Fatal(err)
	}
}

// TestCtrSnapshots: snapshots and leases by hand.
func TestCtrSnapshots(t *testing.T) { eachCtr(t, testCtrSnapshots) }

func testCtrSnapshots(t *testing.T) {
	u := newUser(t)
	list := u.ctr("snapshots", "ls")
	if rows(list) != 1 {
		t.Fatalf("an image of one layer has other than one snapshot:\n%s", list)
	}
	f := strings.Fields(strings.Split(list, "\n")[1])
	parent := f[0]
	equal(t, "kind", f[1], "Committed")

	u.ctr("snapshots", "prepare", "work", parent)
	equal(t, "work", strings.Join(row(t, u.ctr("snapshots", "ls"), "work"), " "), "work "+parent+" Active")
	u.keep("snapshots/overlayfs", "see") // ctr 1.6 says nothing that would
	u.ctr("snapshots", "view", "see", parent)
	tree := u.ctr("snapshots", "tree")
	matches(t, tree, `(?m)^ `+parent+`\n(  \\_ (see|work)\n){2}$`)
	has(t, u.ctr("snapshots", "info", "work"), `"Kind": "Active"`, `"Name": "work"`, `"Parent": "`+parent+`"`)
	has(t, u.ctr("snapshots", "mounts", "/nowhere", "work"), "mount -t overlay overlay /nowhere -o ", "upperdir=", "lowerdir=")
	matches(t, strings.Join(row(t, u.ctr("snapshots", "usage", "work"), "work"), " "), `^work \d.* \d+$`)
	u.ctr("snapshots", "label", "work", "a=b")
	has(t, u.ctr("snapshots", "info", "work"), `"a": "b"`)
	has(t, u.fails(1, "snapshots", "prepare", "work", parent), `"work"`, "already exists")
	has(t, u.fails(1, "snapshots", "prepare", "more", "nosuch"), `"nosuch"`, "not found")
	has(t, u.fails(1, "snapshots", "rm", parent), parent, "failed precondition")
	u.ctr("snapshots", "commit", "done", "work")
	has(t, u.ctr("snapshots", "info", "done"), `"Kind": "Committed"`)
	has(t, u.fails(1, "snapshots", "info", "work"), `"work"`, "not found")
	u.ctr("snapshots", "rm", "done")
	u.ctr("snapshots", "rm", "see")
	if rows(u.ctr("snapshots", "ls")) != 1 {
		t.Error("snapshots that were removed are listed")
	}
	equal(t, "another snapshotter", strings.TrimSpace(u.ctr("snapshots", "--snapshotter", "native", "ls")), "KEY PARENT KIND")

	u.ctr("leases", "rm", "keep")
	equal(t, "lease", u.ctr("leases", "create", "--id", "l1", "a=b"), "l1\n")
	has(t, strings.Join(row(t, u.ctr("leases", "ls"), "l1"), " "), "a=b")
	has(t, u.fails(1, "leases", "create", "--id", "l1"), `"l1"`, "already exists")
	equal(t, "leases rm", u.ctr("leases", "rm", "l1"), "l1\n")
	equal(t, "leases ls", u.ctr("leases", "ls", "-q"), "")
}
