package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/managerd/managerd/test/regproxy"
)

const diffOutside = `
[proxy_plugins.outside]
type = "diff"
address = "DIR/plugin.sock"
[plugins."io.containerd.service.v1.diff-service"]
default = ["outside", "walking"]
`

// TestDiffProxyKilled: a program that applies layers is killed in the middle of one, whichever: the pull fails with its name and
// leaves neither an image nor a snapshot that is not whole, and the next one goes well when it is back.
func TestDiffProxyKilled(t *testing.T) {
	registry := regproxy.Start(t, regproxy.Options{})
	n := makeNoise(t, registry.URL(), "killed", 5, 300_000, 200_000, 100_000)
	n.ref = registry.Addr + "/killed:latest"
	u := configured(t, diffOutside)
	p := newPlugin(u)
	u.start()
	mv := newMover(t, u.Daemon)
	for i, l := range n.layers {
		p.dieIn(l.Digest.String())
		if _, err := mv.move(plain(n.ref), stored(n.ref)); code(err) != "Unavailable" || !strings.Contains(err.Error(), "outside at "+p.socket()) {
			t.Errorf("layer %d: %v", i, err)
		}
		await(t, "a plugin that has died", p.dead)
		if out := u.ctr("images", "ls", "-q"); out != "" {
			t.Errorf("layer %d: left of the pull that failed: %s", i, out)
		}
		if out := u.ctr("snapshots", "ls"); rows(out) > i || strings.Contains(out, "Active") { // whole ones may stay for the next attempt
			t.Errorf("layer %d: left of the unpacking that failed: %s", i, out)
		}
		p.kill()
		p.start()
	}
	if _, err := mv.move(plain(n.ref), stored(n.ref)); err != nil {
		t.Fatal(err)
	}
	n.whole(t, u.Daemon)
	if out := u.ctr("snapshots", "ls"); rows(out) != len(n.layers) {
		t.Errorf("%s", out)
	}
	equal(t, "orphans", strings.TrimSpace(u.mctl("fsck")), "")
}

// TestUnpackSnapshotter: an image is unpacked to the snapshotter that unpack_config names, when nobody names one, and one that
// there is not is said, with no image left.
func TestUnpackSnapshotter(t *testing.T) {
	registry := regproxy.Start(t, regproxy.Options{})
	n := makeNoise(t, registry.URL(), "to", 6, 100_000, 100_000)
	n.ref = registry.Addr + "/to:latest"
	entry := func(snapshotter string) string {
		return "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\nsnapshotter = \"" + snapshotter + "\"\n"
	}
	anywhere := stored(n.ref)
	anywhere.Unpacks[0].Snapshotter = ""
	snapshotsIn := func(u *user, name string) int { return rows(u.ctr("snapshots", "--snapshotter", name, "ls")) }

	u := configured(t, entry("native"))
	u.start()
	mv := newMover(t, u.Daemon)
	if _, err := mv.move(plain(n.ref), anywhere); err != nil {
		t.Fatal(err)
	}
	if native, overlay := snapshotsIn(u, "native"), snapshotsIn(u, snapshotter); native != 2 || overlay != 0 {
		t.Errorf("%d snapshots in native, %d in %s", native, overlay, snapshotter)
	}
	u.ctr("images", "rm", "--sync", n.ref)
	if _, err := mv.move(plain(n.ref), stored(n.ref)); err != nil { // who names one has that
		t.Fatal(err)
	}
	if native, overlay := snapshotsIn(u, "native"), snapshotsIn(u, snapshotter); native != 0 || overlay != 2 {
		t.Errorf("%d snapshots in native, %d in %s", native, overlay, snapshotter)
	}
	u.ctr("images", "rm", "--sync", n.ref)

	u.configure(entry("nosuch"))
	u.restart(u.Stop)
	mv = newMover(t, u.Daemon)
	if _, err := mv.move(plain(n.ref), anywhere); code(err) != "InvalidArgument" || !strings.Contains(err.Error(), `"nosuch" is not loaded`) {
		t.Errorf("%v", err)
	}
	equal(t, "images", u.ctr("images", "ls", "-q"), "")
	if n := snapshotsIn(u, snapshotter); n != 0 {
		t.Errorf("%d snapshots", n)
	}
	u.configure(entry(snapshotter))
	u.restart(u.Stop)
	mv = newMover(t, u.Daemon)
	if _, err := mv.move(plain(n.ref), anywhere); err != nil {
		t.Fatal(err)
	}
	n.whole(t, u.Daemon)
}

// dieIn has the plugin die in the middle of the next application of a layer.
func (p *plugin) dieIn(layer string) {
	p.t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, "die"), []byte(layer), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// dead says whether it has died as it was to.
func (p *plugin) dead() bool {
	_, err := os.Stat(filepath.Join(p.dir, "die"))
	return os.IsNotExist(err)
}
