package service_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/blackbox"
)

// encoded gives runtime options as they are sent.
func encoded(t *testing.T, opts any) *anypb.Any {
	t.Helper()
	a, err := typeurl.MarshalAnyToProto(opts)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// ran runs a container with runtime options, and gives what it printed.
func ran(t *testing.T, id string, opts any, mod func(*specs.Spec), script string) string {
	t.Helper()
	spec := shimbin.Spec(id, "sh", "-c", script)
	if mod != nil {
		mod(spec)
	}
	f := serve(t, id, spec)
	_, out, _ := f.fifos("io")
	f.create(func(r *task.CreateTaskRequest) { r.Options, r.Stdout = encoded(t, opts), out })
	got := read(t, out)
	f.start("")
	f.wait("")
	f.remove("")
	return strings.TrimSpace(<-got)
}

// TestOptionShimCgroup: the shim is where it shall be, and one that is not there is named.
func TestOptionShimCgroup(t *testing.T) {
	path := fmt.Sprintf("/managerd-shim-own-%d", os.Getpid())
	dirs := []string{"/sys/fs/cgroup" + path}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.procs"); err != nil { // v1
		dirs = []string{"/sys/fs/cgroup/pids" + path, "/sys/fs/cgroup/freezer" + path}
	}
	for _, dir := range dirs {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { // after the shim has ended
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
	}
	f := serve(t, "shimcgroup", shimbin.Spec("shimcgroup", "sleep", "1000"))
	_, err := f.Create(ctx, &task.CreateTaskRequest{ID: f.id, Bundle: f.dir, Rootfs: bind(), Options: encoded(t, &options.Options{ShimCgroup: path + "/none"})})
	if err == nil || !strings.Contains(err.Error(), path+"/none") || !strings.Contains(err.Error(), "ShimCgroup") {
		t.Errorf("error is %v", err)
	}
	pid := f.create(func(r *task.CreateTaskRequest) { r.Options = encoded(t, &options.Options{ShimCgroup: path}) }).Pid
	if data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", f.cmd.Process.Pid)); err != nil || !strings.Contains(string(data), path+"\n") {
		t.Errorf("the shim is in %s, %v", data, err)
	}
	if data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid)); err != nil || !strings.Contains(string(data), shimbin.CgroupParent) {
		t.Errorf("the container is in %s, %v", data, err)
	}
}

// TestOptionIoOwner: a container without rights of its own may open its streams anew, because they are its user's.
func TestOptionIoOwner(t *testing.T) {
	user := func(s *specs.Spec) { s.Process.User = specs.User{UID: 77, GID: 78} }
	got := ran(t, "ioowner", &options.Options{IoUid: 77, IoGid: 78}, user, "stat -L -c %u:%g /proc/self/fd/1; echo again >/proc/self/fd/1")
	if got != "77:78\nagain" {
		t.Errorf("got %q", got)
	}
}

// TestOptionRoot: the state is below it, by namespace, for as long as there is a container.
func TestOptionRoot(t *testing.T) {
	root := t.TempDir()
	f := serve(t, "root", shimbin.Spec("root", "true"))
	f.create(func(r *task.CreateTaskRequest) { r.Options = encoded(t, &options.Options{Root: root}) })
	state := filepath.Join(root, "test", "root", "state.json")
	if _, err := os.Stat(state); err != nil {
		t.Error(err)
	}
	f.start("")
	f.wait("")
	f.remove("")
	if _, err := os.Stat(filepath.Dir(state)); !os.IsNotExist(err) {
		t.Errorf("the state is left: %v", err)
	}
}

// TestOptionNoNewKeyring: with it the container has the keyring of its shim, without it one of its own.
func TestOptionNoNewKeyring(t *testing.T) {
	if _, err := os.Stat("/proc/keys"); err != nil {
		t.Skip("this kernel has no keys")
	}
	const script = "grep -c _ses /proc/keys"
	if got := ran(t, "ownkeys", &options.Options{}, nil, script); got == "0" {
		t.Error("it has no keyring of its own")
	}
	if got := ran(t, "shimkeys", &options.Options{NoNewKeyring: true}, nil, script+" | grep -c _ses.shimkeys"); got != "0" {
		t.Errorf("it has a keyring of its own: %q", got)
	}
}

// TestOptionNoPivotRoot: the container runs as ever, and what would not be safe so is refused.
func TestOptionNoPivotRoot(t *testing.T) {
	opts := &options.Options{NoPivotRoot: true}
	if got := ran(t, "nopivot", opts, nil, "ls -d /bin/busybox; ls -d "+os.TempDir()+"/shim-service-test-* 2>/dev/null"); got != "/bin/busybox" {
		t.Errorf("got %q", got)
	}
	spec := shimbin.Spec("private", "true")
	spec.Linux.RootfsPropagation = "private"
	f := serve(t, "private", spec)
	_, err := f.Create(ctx, &task.CreateTaskRequest{ID: f.id, Bundle: f.dir, Rootfs: bind(), Options: encoded(t, opts)})
	if err == nil || !strings.Contains(err.Error(), "pivot_root") {
		t.Errorf("error is %v", err)
	}
}

// TestOptionSystemdCgroup: the container is in a scope of systemd's, in both forms of the options; without systemd that is an
// error which says so.
func TestOptionSystemdCgroup(t *testing.T) {
	for name, opts := range map[string]any{
		"runc": &options.Options{SystemdCgroup: true}, "toml": &runtimeoptions.Options{ConfigBody: []byte("SystemdCgroup = true")},
	} {
		t.Run(name, func(t *testing.T) {
			id := "systemd" + name
			spec := shimbin.Spec(id, "sleep", "1000")
			spec.Linux.CgroupsPath = "system.slice:shim-test:" + id
			f := serve(t, id, spec)
			resp, err := f.Create(ctx, &task.CreateTaskRequest{ID: id, Bundle: f.dir, Rootfs: bind(), Options: encoded(t, opts)})
			if _, serr := os.Stat("/run/systemd/system"); serr != nil {
				if err == nil || !strings.Contains(err.Error(), "systemd") {
					t.Errorf("error is %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", resp.Pid))
			if err != nil || !strings.Contains(string(data), "/system.slice/shim-test-"+id+".scope") {
				t.Errorf("cgroup is %s, %v", data, err)
			}
		})
	}
}

// TestClampsTold: what was clamped is in the shim's log and in its black box, and the container runs with it.
func TestClampsTold(t *testing.T) {
	var have unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &have); err != nil {
		t.Fatal(err)
	}
	score := -900
	spec := shimbin.Spec("clamps", "sh", "-c", "ulimit -Hn; cat /proc/self/oom_score_adj")
	spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: have.Max + 1, Soft: 100}}
	spec.Process.OOMScoreAdj = &score
	f := serve(t, "clamps", spec)
	hdr, data := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, [2]unix.CapUserData{}
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		t.Fatal(err)
	}
	able := data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
	clamps := []string{"clamped rlimit", "clamped oom_score_adj"}
	f.heard = func(log string) {
		for _, c := range clamps {
			if strings.Contains(log, c) == able {
				t.Errorf("able %v, and the log: %s", able, log)
			}
		}
	}
	_, out, _ := f.fifos("io")
	f.create(func(r *task.CreateTaskRequest) { r.Stdout = out })
	got := read(t, out)
	f.start("")
	f.wait("")
	own, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%d\n%s", have.Max, own)
	if able {
		want = fmt.Sprintf("%d\n-900\n", have.Max+1)
	}
	if said := <-got; said != want {
		t.Errorf("the container has %q, want %q", said, want)
	}
	entries, err := blackbox.Read(filepath.Join(f.dir, shimapi.BlackBoxFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range clamps {
		if told := slices.ContainsFunc(entries, func(e blackbox.Entry) bool { return strings.Contains(e.Text, c) }); told == able {
			t.Errorf("able %v, and %q in the black box: %v", able, c, told)
		}
	}
}

// TestWarningsTold: what libcontainer only warns of is in the same two places.
func TestWarningsTold(t *testing.T) {
	caps := []string{"CAP_ROW", "CAP_KILL"}
	spec := shimbin.Spec("warnings", "true")
	spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Permitted: caps}
	f := serve(t, "warnings", spec)
	f.heard = func(log string) {
		if !strings.Contains(log, "CAP_ROW") {
			t.Errorf("the log: %s", log)
		}
	}
	f.create(nil)
	f.start("")
	f.wait("")
	f.remove("")
	entries, err := blackbox.Read(filepath.Join(f.dir, shimapi.BlackBoxFile))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(entries, func(e blackbox.Entry) bool { return strings.Contains(e.Text, "CAP_ROW") }) {
		t.Errorf("not in the black box: %+v", entries)
	}
}
