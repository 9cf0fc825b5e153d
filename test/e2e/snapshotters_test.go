package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/snapshots/devmapper"
	"github.com/managerd/managerd/manager/snapshots/snapshottest"
	"github.com/managerd/managerd/manager/snapshots/snapshottest/external"
	"github.com/managerd/managerd/shimapi/mount"
)

// TestSnapshotters: containers on each snapshotter that this machine can have, over the death of the daemon; nothing of
// them stays when they and the image are gone.
func TestSnapshotters(t *testing.T) {
	pools, datasets := pooled(t)
	u := newUser(t)
	dir := t.TempDir()
	t.Cleanup(func() { snapshottest.NoLoops(t, dir) })
	scratch := filepath.Join(dir, "scratch")
	snapshottest.Image(t, scratch, "ext4", 64<<20, "-q", "-F")
	config := fmt.Sprintf("version = 3\n[plugins.'io.containerd.snapshotter.v1.blockfile']\nscratch_file = %q\n%s", scratch, pools)
	roots := map[string]string{}
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("mkfs.btrfs"); err == nil && strings.Contains(string(known), "\tbtrfs\n") {
		roots["btrfs"] = snapshottest.On(t, "btrfs", 512<<20, "-q")
		config += fmt.Sprintf("[plugins.'io.containerd.snapshotter.v1.btrfs']\nroot_path = %q\n", roots["btrfs"])
	}
	file := filepath.Join(u.Dir, "config.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	u.Args = append(u.Args, "--config", file)
	again := func(end func() error) {
		t.Helper()
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if err := u.Start(); err != nil {
			t.Fatal(err)
		}
	}
	again(u.Stop)

	var works []string
	for line := range strings.Lines(u.ctr("plugins", "ls")) {
		if f := strings.Fields(line); f[0] == "io.containerd.snapshotter.v1" && f[len(f)-1] == "ok" {
			works = append(works, f[1])
			if roots[f[1]] == "" {
				roots[f[1]] = filepath.Join(u.Root(), "io.containerd.snapshotter.v1."+f[1])
			}
		}
	}
	has(t, strings.Join(works, " "), "overlayfs", "native", "blockfile")
	t.Logf("snapshotters: %s", strings.Join(works, " "))
	for _, name := range works {
		equal(t, name, u.ctr("run", "--snapshotter", name, "--rm", ref, "c", "sh", "-c", "echo x > /made && cat /made && echo /bin/sh"), "x\n/bin/sh\n")
		u.ctr("run", "--snapshotter", name, "-d", ref, "stays-"+name, "sleep", "1000")
	}
	again(u.Kill)
	for _, name := range works {
		equal(t, name, u.ctr("t", "exec", "--exec-id", "e", "stays-"+name, "sh", "-c", "echo y > /made && cat /made"), "y\n")
		equal(t, name, u.ctr("run", "--snapshotter", name, "--rm", ref, "c", "sh", "-c", "cat /made || echo after"), "after\n")
		u.ctr("t", "kill", "-s", "KILL", "stays-"+name)
		until(t, "stop", func() bool { return row(t, u.ctr("t", "ls"), "stays-"+name)[2] == "STOPPED" })
		u.ctr("t", "rm", "stays-"+name)
		u.ctr("c", "rm", "stays-"+name)
	}
	u.ctr("images", "rm", "--sync", ref)
	for _, name := range works {
		if name == "zfs" {
			equal(t, "datasets", snapshottest.Command(t, "zfs", "list", "-H", "-r", "-o", "name", datasets), datasets)
		} else if left, err := os.ReadDir(filepath.Join(roots[name], "snapshots")); err != nil || len(left) > 0 {
			t.Errorf("%s: stored: %v, %v", name, left, err)
		}
	}
}

// pooled makes the pools that this machine can have, of devmapper and of ZFS, and gives what a config.toml says of them.
func pooled(t *testing.T) (config, datasets string) {
	t.Helper()
	if devmapper.Supported() == nil {
		config = fmt.Sprintf("[plugins.'io.containerd.snapshotter.v1.devmapper']\npool_name = %q\nbase_image_size = \"64MB\"\n", snapshottest.ThinPool(t, 512<<20))
	}
	if snapshottest.ZFS() == nil {
		dataset, dir := snapshottest.Zpool(t, 512<<20)
		datasets = dataset
		config += fmt.Sprintf("[plugins.'io.containerd.snapshotter.v1.zfs']\nroot_path = %q\n", filepath.Join(dir, "root"))
	}
	return config, datasets
}

// TestSuspended: a container's device that is suspended keeps it waiting; mctl fsck names it and resumes it.
func TestSuspended(t *testing.T) {
	if err := devmapper.Supported(); err != nil {
		t.Skip(err)
	}
	pools, _ := pooled(t)
	u := newUser(t)
	file := filepath.Join(u.Dir, "config.toml")
	if err := os.WriteFile(file, []byte("version = 3\n"+pools), 0o600); err != nil {
		t.Fatal(err)
	}
	u.Args = append(u.Args, "--config", file)
	if err := errors.Join(u.Stop(), u.Start()); err != nil {
		t.Fatal(err)
	}
	u.ctr("run", "--snapshotter", "devmapper", "-d", ref, "waits", "sleep", "1000")
	device := ""
	for line := range strings.Lines(u.ctr("snapshots", "--snapshotter", "devmapper", "mounts", "/", "waits")) {
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "/dev/mapper/") {
				device = word
			}
		}
	}
	if device == "" {
		t.Fatal("the container's device is not known")
	}
	id := device[strings.LastIndexByte(device, '-')+1:]
	t.Cleanup(func() { _ = exec.Command("dmsetup", "resume", device).Run() }) // it is gone when all went well
	u.fsck(0)
	snapshottest.Command(t, "dmsetup", "suspend", device)
	found := u.fsck(1)
	if len(found) != 1 || found[0].Kind != "snapshot" || found[0].Object != "devmapper/"+id || found[0].Owner != u.Namespace {
		t.Fatalf("%+v", found)
	}
	has(t, found[0].Problem, filepath.Base(device)+" is suspended", `"waits"`)
	if fixed := u.fsck(0, "--fix"); len(fixed) != 1 || !fixed[0].Fixed {
		t.Errorf("%+v", fixed)
	}
	equal(t, "the container", u.ctr("t", "exec", "--exec-id", "e", "waits", "sh", "-c", "echo x > /made && sync && cat /made"), "x\n")
	snapshottest.Command(t, "dmsetup", "suspend", device)
	if err := errors.Join(u.Kill(), u.Start()); err != nil { // which looks for it, too
		t.Fatal(err)
	}
	equal(t, "the container", u.ctr("t", "exec", "--exec-id", "f", "waits", "sh", "-c", "echo y > /made && sync && cat /made"), "y\n")
	u.ctr("t", "kill", "-s", "KILL", "waits")
	until(t, "stop", func() bool { return row(t, u.ctr("t", "ls"), "waits")[2] == "STOPPED" })
	u.ctr("t", "rm", "waits")
	u.ctr("c", "rm", "waits")
}

// TestRemapped: a container whose root is another user of the host, on layers that are shown to it as its own.
func TestRemapped(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	plugins, err := introspection.NewIntrospectionClient(c.conn).Plugins(c.ctx, &introspection.PluginsRequest{Filters: []string{"id==" + snapshotter}})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(plugins.Plugins[0].Capabilities, "remap-ids") {
		t.Skip("this kernel's overlayfs takes no layers with mapped IDs (Linux 5.19)")
	}
	if err := os.Chmod(u.Dir, 0o711); err != nil { // as /run is
		t.Fatal(err)
	}
	if err := c.prepareWith("c", map[string]string{
		"containerd.io/gc.root": "test", "containerd.io/snapshot/uidmapping": "0:100000:65536", "containerd.io/snapshot/gidmapping": "0:200000:65536",
	}); err != nil {
		t.Fatal(err)
	}
	s, err := c.sh("c", `[ "$(stat -c %u:%g / /bin/sh)" = "0:0
0:0" ] && echo x >/made && chmod 700 /bin && [ "$(stat -c %u:%g /made /bin)" = "0:0
0:0" ]`)
	if err != nil {
		t.Fatal(err)
	}
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	s.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	s.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	if err := c.container("c", s); err != nil {
		t.Fatal(err)
	}
	if _, err := c.create("c"); err != nil {
		t.Fatal(err)
	}
	if err := c.start("c", ""); err != nil {
		t.Fatal(err)
	}
	if code, err := c.wait("c", ""); err != nil || code != 0 {
		t.Errorf("exit status %d, %v", code, err)
	}
	m, err := c.mounts("c")
	if err != nil {
		t.Fatal(err)
	}
	for file, uid := range map[string]uint32{"made": 100000, "bin": 100000} { // as the host sees what was written, and copied up
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(mount.Option(m[0], "upperdir"), file), &st); err != nil || st.Uid != uid || st.Gid != uid+100000 {
			t.Errorf("%s: %d:%d, %v", file, st.Uid, st.Gid, err)
		}
	}
	if err := c.remove("c"); err != nil {
		t.Error(err)
	}
}

const outsideEnv = "E2E_SNAPSHOTTER"

// TestOutsideSnapshotter: containers on a snapshotter that is another process, which is killed and started again, as is the
// daemon. What runs runs on.
func TestOutsideSnapshotter(t *testing.T) {
	u := newUser(t)
	dir := t.TempDir()
	_, kill := external.Start(t, "^TestServeSnapshots$", outsideEnv, dir)
	file := filepath.Join(u.Dir, "config.toml")
	config := fmt.Sprintf("version = 3\n[proxy_plugins.outside]\ntype = \"snapshot\"\naddress = %q\n", external.Socket(dir))
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	u.Args = append(u.Args, "--config", file)
	again := func(end func() error) {
		t.Helper()
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if err := u.Start(); err != nil {
			t.Fatal(err)
		}
	}
	again(u.Stop)
	run := func(args ...string) []string { return append([]string{"run", "--snapshotter", "outside"}, args...) }
	equal(t, "output", u.ctr(run("--rm", ref, "c", "echo", "x")...), "x\n")
	u.ctr(run("-d", ref, "stays", "sleep", "1000")...)
	kill()
	has(t, u.fails(1, run("--rm", ref, "c", "echo", "x")...), "outside", "unavailable")
	again(u.Kill) // it starts without the other program
	equal(t, "output", u.ctr("t", "exec", "--exec-id", "e", "stays", "echo", "y"), "y\n")
	equal(t, "output", u.ctr("run", "--rm", ref, "other", "echo", "z"), "z\n")
	external.Start(t, "^TestServeSnapshots$", outsideEnv, dir)
	equal(t, "output", u.ctr(run("--rm", ref, "again", "echo", "x")...), "x\n")
	u.ctr("t", "kill", "-s", "KILL", "stays")
	until(t, "stop", func() bool { return row(t, u.ctr("t", "ls"), "stays")[2] == "STOPPED" })
	u.ctr("t", "rm", "stays")
	for _, id := range []string{"stays", "c"} {
		if strings.Contains(u.ctr("c", "ls", "-q"), id+"\n") {
			u.ctr("c", "rm", id)
		}
	}
	u.ctr("images", "rm", "--sync", ref)
	if left, err := os.ReadDir(filepath.Join(dir, "outside", "snapshots")); err != nil || len(left) > 0 {
		t.Errorf("stored there: %v, %v", left, err)
	}
}

// TestServeSnapshots is that process.
func TestServeSnapshots(t *testing.T) {
	dir := os.Getenv(outsideEnv)
	if dir == "" {
		t.Skip("this is a part of TestOutsideSnapshotter")
	}
	t.Fatal(external.Serve(dir, "outside"))
}
