package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/mounts/stack"
	"github.com/managerd/managerd/test/harness"
)

type orphan struct {
	Kind, Object, Owner, Problem, Command, Error string
	Fixed                                        bool
}

// fsck runs mctl fsck, which must end with status, and gives what it found.
func (u *user) fsck(status int, args ...string) []orphan {
	u.t.Helper()
	out, err := harness.Output(u.Mctl(append([]string{"-o", "json", "fsck", "--older", "0s", "--state", u.State()}, args...)...))
	var found []orphan
	if harness.Status(err) != status || json.Unmarshal([]byte(out), &found) != nil {
		u.t.Fatalf("exit status %d, not %d: %v\n%s", harness.Status(err), status, err, out)
	}
	return found
}

// fallen makes one orphan of every kind, for real; want is what fsck must call each of them. The daemon runs at the end.
func fallen(t *testing.T, u *user, c *client, round int) (want []orphan) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ns := u.Namespace
	name := func(s string) string { return fmt.Sprint(s, round) }
	expect := func(kind, object, owner string) {
		want = append(want, orphan{Kind: kind, Object: object, Owner: owner})
	}
	bundles := filepath.Join(u.State(), "io.containerd.runtime.v2.task", ns)
	layers := filepath.Join(u.Root(), "io.containerd.snapshotter.v1.overlayfs", "snapshots")
	blobs := filepath.Join(u.Root(), "io.containerd.content.v1.content", "blobs", "sha256")

	// A container that does not run, and the scope that systemd made for it, or would have made.
	scoped, err := c.sh(name("scope"), "true")
	must(err)
	scoped.Linux.CgroupsPath = ns + ".slice:e2e:" + name("scope")
	must(errors.Join(c.prepare(name("scope")), c.container(name("scope"), scoped)))
	scope := "/" + ns + ".slice/e2e-" + name("scope") + ".scope"
	if strings.Contains(ns, "-") {
		first, _, _ := strings.Cut(ns, "-")
		scope = "/" + first + ".slice" + scope
	}
	for _, h := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		if err := os.MkdirAll(filepath.Join(h, scope), 0o755); err == nil {
			t.Cleanup(func() { // the slices, which are nobody's
				for dir := filepath.Dir(scope); dir != "/"; dir = filepath.Dir(dir) {
					_ = os.Remove(filepath.Join(h, dir))
				}
			})
			expect("cgroup", scope, ns+"/"+name("scope"))
			break
		}
	}
	// A container that was removed, and its cgroup and its storage, which are made again.
	_, err = c.run(name("cg"), "sleep 1000")
	must(err)
	before, err := filepath.Glob(layers + "/*")
	must(err)
	c.finish(t, name("cg"))
	after, err := filepath.Glob(layers + "/*")
	must(err)
	for _, h := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		if err := os.Mkdir(filepath.Join(h, ns, name("cg")), 0o755); err == nil {
			expect("cgroup", "/"+ns+"/"+name("cg"), ns+"/"+name("cg"))
			break
		}
	}
	// A record without storage; one that nobody uses.
	must(c.prepare(name("hollow")))
	newest, err := filepath.Glob(layers + "/*")
	must(err)
	for _, dir := range newest {
		if !slices.Contains(after, dir) && !slices.Contains(before, dir) {
			must(os.RemoveAll(dir))
		}
	}
	expect("snapshot", snapshotter+"/"+ns+"/"+name("hollow"), ns)
	must(c.prepareWith(name("unused it's"), nil))
	expect("snapshot", snapshotter+"/"+ns+"/"+name("unused it's"), ns)
	// A container whose snapshot is gone.
	must(c.make(name("lame"), "true"))
	must(c.removeSnapshot(name("lame")))
	expect("container", ns+"/"+name("lame"), ns+"/"+name("lame"))
	// A lease that has expired; one that keeps nothing.
	leases := leasesapi.NewLeasesClient(c.conn)
	_, err = leases.Create(c.ctx, &leasesapi.CreateRequest{ID: name("late"), Labels: map[string]string{"containerd.io/gc.expire": "2020-01-01T00:00:00Z"}})
	must(err)
	expect("lease", ns+"/"+name("late"), ns)
	_, err = leases.Create(c.ctx, &leasesapi.CreateRequest{ID: name("void")})
	must(err)
	_, err = leases.AddResource(c.ctx, &leasesapi.AddResourceRequest{ID: name("void"), Resource: &leasesapi.Resource{ID: "nothing", Type: "snapshots/overlayfs"}})
	must(err)
	expect("lease", ns+"/"+name("void"), ns)
	// Content without a record, a record without content, an ingest that nobody writes, a name for nothing.
	content := contentapi.NewContentClient(c.conn)
	write := func(ref, data string, commit bool) digest.Digest {
		s, err := content.Write(c.ctx)
		must(err)
		action := contentapi.WriteAction_WRITE
		if commit {
			action = contentapi.WriteAction_COMMIT
		}
		must(s.Send(&contentapi.WriteContentRequest{Action: action, Ref: ref, Total: int64(len(data) + 1), Data: []byte(data)}))
		_, err = s.Recv()
		must(errors.Join(err, s.CloseSend()))
		for err == nil {
			_, err = s.Recv()
		}
		return digest.FromString(data)
	}
	_ = write(name("half"), "half of it", false)
	expect("ingest", ns+"/"+name("half"), ns)
	lost := digest.FromString(name("lost"))
	s, err := content.Write(c.ctx)
	must(err)
	must(s.Send(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_COMMIT, Ref: name("lost"), Total: int64(len(name("lost"))), Data: []byte(name("lost"))}))
	_, err = s.Recv()
	must(errors.Join(err, s.CloseSend(), os.Remove(filepath.Join(blobs, lost.Encoded()))))
	expect("content", ns+"/"+lost.String(), ns)
	_, err = imagesapi.NewImagesClient(c.conn).Create(c.ctx, &imagesapi.CreateImageRequest{Image: &imagesapi.Image{
		Name: name("nothing:"), Target: &types.Descriptor{MediaType: "application/vnd.oci.image.index.v1+json", Digest: digest.FromString("?").String(), Size: 1},
	}})
	must(err)
	expect("image", ns+"/"+name("nothing:"), ns)
	// A task whose container's record is gone.
	_, err = c.run(name("bare"), "sleep 1000")
	must(err)
	must(c.deleteContainer(name("bare")))
	s2, err := c.sh(name("bare"), "sleep 1000")
	must(err)
	_, err = c.containers.Create(c.ctx, &containersapi.CreateContainerRequest{Container: &containersapi.Container{ // keeps its snapshot
		ID: name("keeper"), Snapshotter: snapshotter, SnapshotKey: name("bare"), Spec: encode(specURL, s2), Runtime: &containersapi.Container_Runtime{Name: runtime},
	}})
	must(err)
	expect("bundle", ns+"/"+name("bare"), ns+"/"+name("bare"))

	// A shim whose bundle somebody has removed, with the container that it runs.
	_, err = c.run(name("widow"), "sleep 1000")
	must(err)
	must(u.Kill())
	bundle := filepath.Join(bundles, name("widow"))
	must(unix.Unmount(filepath.Join(bundle, "rootfs"), unix.MNT_DETACH))
	must(os.RemoveAll(bundle))
	shim := ""
	for _, pid := range u.Shims() {
		if cwd, _ := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); strings.HasPrefix(cwd, bundle) {
			shim = fmt.Sprint(pid)
		}
	}
	if shim == "" {
		t.Fatalf("none of the shims %v works in %s", workingDirs(u.Shims()), bundle)
	}
	expect("shim", shim, ns+"/"+name("widow"))
	expect("cgroup", "/"+ns+"/"+name("widow"), ns+"/"+name("widow"))
	// A record that cannot be read.
	db, err := metadata.Open(filepath.Join(u.Root(), "metadata.db"))
	must(err)
	must(db.Update(func(tx *metadata.Tx) error {
		b, err := tx.MakeBucket(metadata.Path(ns, metadata.Leases)...)
		if err != nil {
			return err
		}
		return b.Put([]byte(name("unreadable")), []byte{0xff, 0xff})
	}))
	must(db.Close())
	expect("record", "v1/"+ns+`/leases/"`+name("unreadable")+`"`, ns)
	must(u.Start())

	// Storage and content without a record: a start removes such, so it is made now.
	for _, dir := range before {
		if !slices.Contains(after, dir) {
			must(os.MkdirAll(filepath.Join(dir, "fs", "etc"), 0o755))
			expect("snapshot", snapshotter+"/"+filepath.Base(dir), "")
		}
	}
	stray := digest.FromString(name("stray"))
	must(os.WriteFile(filepath.Join(blobs, stray.Encoded()), []byte(name("stray")), 0o600))
	expect("content", stray.String(), "")
	// A bundle that was being removed, one with a mount that nobody knows; a socket; FIFOs.
	old := filepath.Join(bundles, ".old-"+name("gone"))
	must(os.MkdirAll(old, 0o711))
	expect("bundle", old, ns+"/"+name("gone"))
	stranger := filepath.Join(bundles, name("stranger"))
	must(os.MkdirAll(filepath.Join(stranger, "rootfs"), 0o711))
	must(unix.Mount("tmpfs", filepath.Join(stranger, "rootfs"), "tmpfs", 0, ""))
	expect("mount", filepath.Join(stranger, "rootfs"), ns+"/"+name("stranger"))
	expect("bundle", stranger, ns+"/"+name("stranger"))
	socket := filepath.Join(u.State(), "s", name("0123"))
	l, err := net.Listen("unix", socket)
	must(err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	must(l.Close())
	expect("socket", socket, "")
	// Mounts for a client that were half made, and a loop device of such.
	half := stack.Path(u.State(), ns, name("half"))
	must(os.Mkdir(half, 0o700))
	_, err = stack.Mount(half, 0, &types.Mount{Type: "tmpfs", Source: "none"})
	must(err)
	expect("activation", half, "")
	adrift, file := stack.Path(u.State(), ns, name("adrift")), filepath.Join(u.Dir, name("file"))
	must(errors.Join(os.Mkdir(adrift, 0o700), os.WriteFile(file, make([]byte, 1<<20), 0o600)))
	_, device, err := stack.Attach(adrift, 0, file, false)
	must(errors.Join(err, os.RemoveAll(adrift)))
	expect("loop", device, "")
	fifo := filepath.Join(u.Dir, "fifo", name("mctl-"))
	must(os.MkdirAll(fifo, 0o700))
	must(unix.Mkfifo(filepath.Join(fifo, "x-stdout"), 0o600))
	expect("fifo", fifo, "")
	return want
}

// workingDirs gives the directories that processes work in, by pid, or why that is not known.
func workingDirs(pids []int) map[int]string {
	out := map[int]string{}
	for _, pid := range pids {
		cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
		if out[pid] = cwd; err != nil {
			out[pid] = err.Error()
		}
	}
	return out
}

// TestFsck makes an orphan of every kind: each is found, with its owner and a command; the commands fix them, and --fix
// does. A container that runs meanwhile, and what looks like an orphan and is none, are not touched.
func TestFsck(t *testing.T) {
	u := hoarder(t)
	c := newClient(t, u.Daemon)
	pid, err := c.run("bystander", "sleep 1000")
	if err != nil {
		t.Fatal(err)
	}
	kept := keptByLabels(t, u, c)
	if found := u.fsck(0); len(found) != 0 {
		t.Errorf("at the beginning: %v", found)
	}
	for round := range 2 {
		want := fallen(t, u, c, round)
		// A process of somebody else in a cgroup that was ours.
		group := filepath.Join("/sys/fs/cgroup/pids", u.Namespace, fmt.Sprint("cg", round))
		foreign := exec.Command("sleep", "1000")
		if err := errors.Join(foreign.Start(), os.MkdirAll(group, 0o755), os.WriteFile(filepath.Join(group, "cgroup.procs"), fmt.Append(nil, foreign.Process.Pid), 0)); err != nil {
			t.Fatal(err)
		}
		found := u.fsck(1)
		for _, w := range want {
			i := slices.IndexFunc(found, func(o orphan) bool { return o.Kind == w.Kind && o.Object == w.Object })
			if i < 0 {
				t.Errorf("round %d: %s %s was not found; snapshots: %v", round, w.Kind, w.Object, c.layers(t))
				continue
			}
			if o := found[i]; o.Owner != w.Owner || o.Problem == "" || o.Command == "" || o.Fixed {
				t.Errorf("round %d: %+v", round, o)
			}
		}
		for _, o := range found {
			if !slices.ContainsFunc(want, func(w orphan) bool { return o.Kind == w.Kind && o.Object == w.Object }) {
				t.Errorf("round %d: nobody made %+v", round, o)
			}
		}
		if round == 0 {
			for _, o := range found {
				if o.Kind == "cgroup" {
					continue // see below
				}
				cmd := exec.Command("sh", "-c", o.Command)
				cmd.Env = append(os.Environ(), "PATH="+u.Bin+":"+os.Getenv("PATH"), "MANAGERD_ADDRESS="+u.Socket(), "MANAGERD_STATE="+u.State())
				if strings.HasPrefix(o.Command, "mctl fsck") {
					cmd = exec.Command("sh", "-c", o.Command+" --older 0s")
					cmd.Env = append(os.Environ(), "PATH="+u.Bin+":"+os.Getenv("PATH"), "MANAGERD_ADDRESS="+u.Socket(), "MANAGERD_STATE="+u.State())
				}
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%s: %v\n%s", o.Command, err, out)
				}
			}
		} else {
			for _, o := range u.fsck(1, "--fix") {
				if o.Fixed == (o.Kind == "cgroup" && o.Object == "/"+u.Namespace+"/"+fmt.Sprint("cg", round)) && o.Kind != "bundle" {
					t.Errorf("%+v", o)
				}
			}
		}
		if err := foreign.Process.Signal(unix.Signal(0)); err != nil {
			t.Errorf("somebody else's process was touched: %v", err)
		}
		_ = foreign.Process.Kill()
		_ = foreign.Wait()
		bare := fmt.Sprint("bare", round)
		if round == 1 { // it may run: --fix says what to do
			if out, err := harness.Output(u.Mctl("tasks", "rm", "-f", bare)); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		}
		u.fsck(0, "--fix")
		if found := u.fsck(0); len(found) != 0 {
			t.Errorf("round %d: left: %v", round, found)
		}
		if st, err := c.state("bystander", ""); err != nil || st.Pid != pid {
			t.Errorf("the container that runs: %v, %v", st, err)
		}
		for container, snapshot := range map[string]string{"widow": "widow", "keeper": "bare", "scope": "scope"} {
			if err := errors.Join(c.deleteContainer(fmt.Sprint(container, round)), c.removeSnapshot(fmt.Sprint(snapshot, round))); err != nil {
				t.Error(err)
			}
		}
	}
	for _, id := range kept {
		if err := c.removeSnapshot(id); err != nil {
			t.Errorf("a snapshot that a label keeps: %v", err)
		}
	}
	c.finish(t, "bystander")
}

// keptByLabels makes snapshots that no container has, one for each way that a label keeps one.
func keptByLabels(t *testing.T, u *user, c *client) (ids []string) {
	t.Helper()
	ref := "containerd.io/gc.ref.snapshot." + snapshotter
	for id, labels := range map[string]map[string]string{
		"rooted":       {"containerd.io/gc.root": "yes", ref + "/1": "of another"},
		"goes with it": {"containerd.io/gc.bref.container": "bystander"},
		"of a sandbox": nil,
		"of another":   nil,
	} {
		if err := c.prepareWith(id, labels); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	s := u.sandboxes()
	_, err := s.Create(s.ctx, &sandboxapi.StoreCreateRequest{Sandbox: &types.Sandbox{SandboxID: "pod", Labels: map[string]string{ref: "of a sandbox"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := s.Delete(s.ctx, &sandboxapi.StoreDeleteRequest{SandboxID: "pod"}); err != nil {
			t.Error(err)
		}
	})
	return ids
}

// TestFsckWithoutManager: what can be judged without a daemon is; who is asked for more says what was not looked at.
func TestFsckWithoutManager(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	for _, id := range []string{"stays", "widow"} {
		if _, err := c.run(id, "sleep 1000"); err != nil {
			t.Fatal(err)
		}
	}
	if err := u.Kill(); err != nil {
		t.Fatal(err)
	}
	bundle := filepath.Join(u.State(), "io.containerd.runtime.v2.task", u.Namespace, "widow")
	if err := errors.Join(unix.Unmount(filepath.Join(bundle, "rootfs"), unix.MNT_DETACH), os.RemoveAll(bundle)); err != nil {
		t.Fatal(err)
	}
	has(t, func() string {
		cmd := u.Mctl("fsck", "--state", u.State())
		out, err := cmd.CombinedOutput()
		if harness.Status(err) != 1 {
			t.Errorf("exit status %d", harness.Status(err))
		}
		return string(out)
	}(), "no managerd answers", "its bundle is gone", u.Namespace+"/widow", "were not looked at")
	found := u.fsck(0, "--fix")
	kinds := map[string]bool{}
	for _, o := range found {
		kinds[o.Kind] = kinds[o.Kind] || o.Fixed
		if o.Owner != u.Namespace+"/widow" && o.Kind != "socket" {
			t.Errorf("%+v", o)
		}
	}
	if !kinds["shim"] {
		t.Errorf("%v", found)
	}
	u.fsck(0, "--fix")
	begin := time.Now()
	if err := u.Start(); err != nil {
		t.Fatal(err)
	}
	t.Logf("started in %s", time.Since(begin))
	if st, err := c.state("stays", ""); err != nil || st.Pid == 0 {
		t.Errorf("%v, %v", st, err)
	}
	c.finish(t, "stays")
	if err := errors.Join(c.deleteContainer("widow"), c.removeSnapshot("widow")); err != nil {
		t.Error(err)
	}
}
