package service_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

const (
	netNS, ipcNS, utsNS, pidNS, userNS = specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.PIDNamespace, specs.UserNamespace
)

// TestSandbox: two containers see each other's namespaces, and nothing of the machine's; no process holds them.
func TestSandbox(t *testing.T) {
	spec := boxSpec(netNS, ipcNS, utsNS)
	spec.Hostname, spec.Domainname = "pod", "example"
	spec.Mounts = []specs.Mount{{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"size=1m"}}}
	spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1", "net/ipv4/conf/lo/forwarding": "0"}
	b := serveBox(t, "sandbox", spec)
	of := b.startBox()
	if st := b.status(); st.State != shimapi.SandboxReady || st.Pid != uint32(b.cmd.Process.Pid) || st.CreatedAt.AsTime().IsZero() {
		t.Errorf("status: %v", st)
	}
	if d := b.describeBox(); d.Sandbox.GetState() != "running" || len(d.Sandbox.Namespaces) != 3 || len(d.Processes) != 0 {
		t.Errorf("describe: %v", d)
	}
	one, two := running(t, "one", joined(of)), running(t, "two", joined(of))
	look := func(f *fixture, name string) string {
		return f.capture(name, "sh", "-c", "for n in net ipc uts; do readlink /proc/self/ns/$n; done; hostname; cat /proc/sys/kernel/domainname; "+
			"cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/conf/lo/forwarding; cat /sys/class/net/lo/flags 2>/dev/null; "+
			"grep -c . /proc/net/dev; ip addr show lo | grep -o 'inet 127.0.0.1'; df -k /dev/shm | tail -1 | awk '{print $2}'")
	}
	first, second := look(one, "look1"), look(two, "look2")
	if first != second {
		t.Errorf("two members see %q and %q", first, second)
	}
	for _, name := range []string{"net", "ipc", "uts"} {
		if ours, err := os.Readlink("/proc/self/ns/" + name); err != nil || strings.Contains(first, ours) {
			t.Errorf("the %s namespace is the machine's: %q, %v", name, first, err)
		}
	}
	if !strings.Contains(first, "\npod\nexample\n1\n1\n0\n") || !strings.Contains(first, "inet 127.0.0.1") || !strings.HasSuffix(first, "\n1024\n") {
		t.Errorf("a member sees %q", first)
	}
	one.runExec("write", nil, "sh", "-c", "echo hello > /dev/shm/file")
	if got := two.capture("read", "cat", "/dev/shm/file"); got != "hello\n" {
		t.Errorf("/dev/shm of the other member: %q", got)
	}
	b.seen(first)
	if st := b.status(); !strings.Contains(st.Info["spec"], filepath.Join(b.dir, shimapi.ShmDir)) {
		t.Errorf("info: %v", st.Info)
	}
	// Stopped with members in it: they run on, and it is told how it ended. Nothing is mounted any more.
	b.stop(0)
	if status, err := b.waitBox(); status != 0 || err != nil {
		t.Errorf("wait: %d, %v", status, err)
	}
	if after := one.capture("after", "hostname"); after != "pod\n" {
		t.Errorf("after the stop: %q", after)
	}
	if left := mountsIn(b.dir); len(left) > 0 {
		t.Errorf("after the stop: %v", left)
	}
	if st := b.status(); st.State != shimapi.SandboxNotReady || st.ExitedAt.AsTime().IsZero() || st.Pid != 0 {
		t.Errorf("status: %v", st)
	}
	for _, name := range []string{"net", "ipc", "uts"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + name)
		shims, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", b.cmd.Process.Pid, name))
		if ours != shims || err1 != nil || err2 != nil {
			t.Errorf("after the stop the shim's %s is %s, must be %s", name, shims, ours)
		}
	}
	b.stop(0) // is no error
}

func (b *box) describeBox() *shim.DescribeResponse {
	b.t.Helper()
	d, err := b.Shim().Describe(ctx, &shim.DescribeRequest{})
	if err != nil {
		b.t.Fatal(shimapi.FromWire(err))
	}
	return d
}

// seen checks that clients find the namespaces, which members have told, by the pid of the sandbox.
func (b *box) seen(members string) {
	b.t.Helper()
	for _, name := range []string{"net", "ipc", "uts"} {
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", b.status().Pid, name)); err != nil || !strings.Contains(members, ns+"\n") {
			b.t.Errorf("/proc/PID/ns/%s is %s (%v), members have %q", name, ns, err, members)
		}
	}
}

// TestSandboxPID: members see each other's processes, and the sandbox's init takes the exits of orphans. Its end is that of
// all in it.
func TestSandboxPID(t *testing.T) {
	b := serveBox(t, "pid", boxSpec(ipcNS, utsNS, pidNS))
	of := b.startBox()
	st := b.status()
	if st.Pid == 0 {
		t.Fatalf("status: %v", st)
	}
	one, two := running(t, "pidone", joined(of)), running(t, "pidtwo", joined(of))
	if got := two.capture("ps", "sh", "-c", "ps -o args | grep -c '[s]leep 1000'; readlink /proc/self/ns/pid"); !strings.HasPrefix(got, "2\n") ||
		!strings.HasSuffix(got, one.capture("ns", "readlink", "/proc/self/ns/pid")) {
		t.Errorf("one member sees of the other: %q", got)
	}
	// Fifty orphans end: all are children of the init then, and no zombie stays.
	one.runExec("orphans", nil, "sh", "-c", "for i in $(seq 50); do (sleep 0.2 & exec true) & done; wait")
	eventually(t, "no zombies", func() bool {
		return two.capture("zombies"+fmt.Sprint(time.Now().UnixNano()), "sh", "-c", "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l") == "0\n"
	})
	ended := make(chan uint32, 1)
	go func() {
		status, err := b.waitBox()
		if err != nil {
			t.Error(err)
		}
		ended <- status
	}()
	b.stop(30) // SIGTERM is enough: sleep obeys
	if status := <-ended; status != 0 {
		t.Errorf("the sandbox ended with %d", status)
	}
	if w := one.wait(""); w.ExitStatus != 143 {
		t.Errorf("the member ended with %d", w.ExitStatus)
	}
	two.wait("")
}

// TestSandboxPIDKilled: an init that is killed is the end of the sandbox, with its status.
func TestSandboxPIDKilled(t *testing.T) {
	for _, killShim := range []bool{false, true} {
		b := serveBox(t, "killed", boxSpec(utsNS, pidNS))
		of := b.startBox()
		member := running(t, "member", func(s *specs.Spec) {
			joined(of)(s)
			s.Process.Args = []string{"sh", "-c", "trap '' TERM; while :; do sleep 1; done"}
		})
		if killShim {
			pid := b.status().Pid
			b.succeed()
			if got := b.status().Pid; got != pid {
				t.Errorf("pid %d after %d", got, pid)
			}
		}
		eventually(t, "it ignores SIGTERM", func() bool {
			status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", member.state("").Pid))
			_, after, _ := strings.Cut(string(status), "SigIgn:\t")
			mask, _ := strconv.ParseUint(strings.Fields(after + " 0")[0], 16, 64)
			return mask&(1<<(unix.SIGTERM-1)) != 0
		})
		b.stop(1) // the member does not obey
		if status, err := b.waitBox(); status != 137 || err != nil {
			t.Errorf("wait: %d, %v", status, err)
		}
		if w := member.wait(""); w.ExitStatus != 137 {
			t.Errorf("the member ended with %d", w.ExitStatus)
		}
		if _, err := b.Sandbox().PingSandbox(ctx, &api.PingRequest{SandboxID: "killed"}); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("ping: %v", err)
		}
		b.succeed() // knows it still
		if status, err := b.waitBox(); status != 137 || err != nil {
			t.Errorf("wait, of a successor: %d, %v", status, err)
		}
	}
}

// TestSandboxKilled: a sandbox whose shim is killed loses nothing; new members join what the old ones are in, and each event is
// told once. So it is with an upgrade, and a call that waits does not notice that.
func TestSandboxKilled(t *testing.T) {
	spec := boxSpec(netNS, ipcNS, utsNS)
	spec.Hostname = "pod"
	b := serveBox(t, "survivor", spec)
	of := b.startBox()
	one := running(t, "s-one", joined(of))
	one.runExec("write", nil, "sh", "-c", "echo hello > /dev/shm/file")
	for i := range 3 {
		b.succeed()
		if _, err := b.Sandbox().PingSandbox(ctx, &api.PingRequest{SandboxID: b.id}); err != nil {
			t.Fatal(err)
		}
		waited := make(chan error, 1)
		if i == 2 {
			go func() {
				_, err := b.waitBox()
				waited <- err
			}()
		}
		pid := b.describeBox().Pid
		r, err := b.Shim().Upgrade(ctx, &shim.UpgradeRequest{Binary: binary})
		if err != nil || r.Version == "" {
			t.Fatal(shimapi.FromWire(err))
		}
		if d := b.describeBox(); d.Pid != pid || d.Sandbox.GetState() != "running" {
			t.Errorf("after the upgrade: %v", d)
		}
		two := running(t, fmt.Sprintf("s-two%d", i), joined(of))
		b.seen(two.capture("look", "sh", "-c", "for n in net ipc uts; do readlink /proc/self/ns/$n; done"))
		if got := two.capture("read", "sh", "-c", "hostname; cat /dev/shm/file"); got != "pod\nhello\n" {
			t.Errorf("a member that came later sees %q", got)
		}
		if i == 2 {
			b.stop(0)
			if err := <-waited; err != nil {
				t.Errorf("a wait from before the upgrade: %v", err)
			}
		}
	}
	events, err := b.Shim().Events(ctx, &shim.EventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{shimapi.TopicSandboxCreate, shimapi.TopicSandboxStart, shimapi.TopicSandboxExit} {
		if e, err := events.Recv(); err != nil || e.Topic != want {
			t.Errorf("event %v, %v, want %s", e, err, want)
		}
	}
}

// TestSandboxUser: a user namespace owns the others, and its root has /dev/shm.
func TestSandboxUser(t *testing.T) {
	spec := boxSpec(netNS, ipcNS, utsNS, userNS)
	spec.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	spec.Linux.GIDMappings = spec.Linux.UIDMappings
	spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shmmni": "77"}
	b := serveBox(t, "user", spec)
	of := b.startBox()
	if st := b.status(); st.Pid != 0 { // nobody is in all of them
		t.Errorf("status: %v", st)
	}
	fi, err := os.Stat(filepath.Join(b.dir, shimapi.ShmDir))
	if err != nil {
		t.Fatal(err)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); !ok || st.Uid != 100000 || st.Gid != 100000 {
		t.Errorf("/dev/shm belongs to %+v", fi.Sys())
	}
	ns, err := os.Open(filepath.Join(b.dir, shimapi.NamespaceDir, "net"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ns.Close() }()
	owner, err := unix.IoctlRetInt(int(ns.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		t.Fatal(err)
	}
	var of1, of2 unix.Stat_t
	err1 := unix.Fstat(owner, &of1)
	_ = unix.Close(owner)
	if err2 := unix.Stat(filepath.Join(b.dir, shimapi.NamespaceDir, "user"), &of2); err1 != nil || err2 != nil || of1.Ino != of2.Ino {
		t.Errorf("the network belongs to user namespace %d, the sandbox's is %d", of1.Ino, of2.Ino)
	}
	spec = shimbin.Spec("u-one", "sleep", "1000")
	joined(of)(spec)
	member := serve(t, "u-one", spec)
	for _, dir := range []string{filepath.Dir(lower), filepath.Dir(member.dir), filepath.Dir(b.dir)} { // others' root must get there
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	member.create(nil)
	member.start("")
	if got := member.capture("look", "sh", "-c", "cat /proc/self/uid_map /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni; touch /dev/shm/x && echo made"); strings.Join(strings.Fields(got), " ") != "0 100000 65536 1 77 made" {
		t.Errorf("a member sees %q", got)
	}
}

// TestSandboxNetPath: the network is somebody else's, by its path; what is no network is refused, and leaves nothing.
func TestSandboxNetPath(t *testing.T) {
	other := serveBox(t, "owner", boxSpec(netNS))
	path := other.startBox().Linux.Namespaces[0].Path
	b := serveBox(t, "guest", nil) // no spec at all
	for _, bad := range []string{"/proc/self/ns/ipc", "/dev/null", "/nowhere", "relative"} {
		if err := b.createBox(func(r *api.CreateSandboxRequest) { r.NetnsPath = bad }); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), bad) {
			t.Errorf("%s: %v", bad, err)
		}
		if left := mountsIn(b.dir); len(left) > 0 {
			t.Errorf("%s: %v", bad, left)
		}
	}
	if err := b.createBox(func(r *api.CreateSandboxRequest) {
		r.NetnsPath, r.Annotations = path, map[string]string{"a": "b"}
	}); err != nil {
		t.Fatal(err)
	}
	var a, c unix.Stat_t
	if err := errorsOf(unix.Stat(path, &a), unix.Stat(filepath.Join(b.dir, shimapi.NamespaceDir, "net"), &c)); err != nil || a.Ino != c.Ino {
		t.Errorf("net is %d, must be %d: %v", c.Ino, a.Ino, err)
	}
	if st := b.status(); st.State != shimapi.SandboxNotReady || st.Info["state"] != "created" || !strings.Contains(st.Info["spec"], `"a":"b"`) {
		t.Errorf("status: %v", st)
	}
}

func errorsOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// TestSandboxMetrics: the sandbox has a cgroup of its own, with its members' in it and a limit; both go with it.
func TestSandboxMetrics(t *testing.T) {
	spec := boxSpec(utsNS)
	limit := int64(64)
	spec.Linux.CgroupsPath = shimbin.CgroupParent + "/pod"
	spec.Linux.Resources = &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &limit}}
	b := serveBox(t, "metrics", spec)
	of := b.startBox()
	member := running(t, "m-one", func(s *specs.Spec) {
		joined(of)(s)
		s.Linux.CgroupsPath = shimbin.CgroupParent + "/pod/m-one"
	})
	r, err := b.Sandbox().SandboxMetrics(ctx, &api.SandboxMetricsRequest{SandboxID: "metrics"})
	if err != nil || r.Metrics.GetID() != "metrics" || len(r.Metrics.GetData().GetValue()) == 0 {
		t.Errorf("metrics: %v, %v", r, err)
	}
	limits := func() string {
		files, _ := filepath.Glob("/sys/fs/cgroup" + "/pids" + shimbin.CgroupParent + "/pod/pids.max")
		files = append(files, "/sys/fs/cgroup"+shimbin.CgroupParent+"/pod/pids.max")
		data, err := os.ReadFile(files[0])
		if err != nil {
			t.Error(err)
		}
		return strings.TrimSpace(string(data))
	}
	if got := limits(); got != "64" {
		t.Errorf("limit %s", got)
	}
	limit = 65
	spec.Hostname = "renamed"
	update := func(fields ...string) error {
		data, err := json.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		_, err = b.Sandbox().UpdateSandbox(ctx, &api.UpdateSandboxRequest{
			SandboxID: "metrics", Fields: fields, Sandbox: &types.Sandbox{SandboxID: "metrics", Spec: &anypb.Any{Value: data}},
		})
		return err
	}
	if err := update("labels.a"); err != nil || limits() != "64" {
		t.Errorf("an update of labels: %v, limit %s", err, limits())
	}
	if err := update("spec"); err != nil || limits() != "65" {
		t.Errorf("an update of the spec: %v, limit %s", err, limits())
	}
	if got := member.capture("name", "hostname"); got != "renamed\n" {
		t.Errorf("hostname %q", got)
	}
	b.succeed()
	if st := b.status(); !strings.Contains(st.Info["spec"], "renamed") {
		t.Errorf("a successor knows %v", st.Info)
	}
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: ipcNS})
	if err := update(); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an update of the namespaces: %v", err)
	}
	plain := serveBox(t, "plain", boxSpec(utsNS))
	plain.startBox()
	if _, err := plain.Sandbox().SandboxMetrics(ctx, &api.SandboxMetricsRequest{SandboxID: "plain"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("metrics without a cgroup: %v", err)
	}
}

// TestSandboxBad: what makes no sense is refused with a sentence, and nothing is left; what comes in the wrong order, too.
func TestSandboxBad(t *testing.T) {
	with := func(mod func(*specs.Spec)) *specs.Spec {
		s := boxSpec(utsNS, ipcNS)
		mod(s)
		return s
	}
	mount := func(m specs.Mount) *specs.Spec { return with(func(s *specs.Spec) { s.Mounts = []specs.Mount{m} }) }
	for name, c := range map[string]struct {
		spec any
		says string
	}{
		"mount namespace":  {boxSpec(specs.MountNamespace), "mount"},
		"twice":            {boxSpec(utsNS, utsNS), "twice"},
		"pid by path":      {with(func(s *specs.Spec) { s.Linux.Namespaces[0] = specs.LinuxNamespace{Type: pidNS, Path: "/proc/1/ns/pid"} }), "pid"},
		"hostname":         {with(func(s *specs.Spec) { s.Hostname, s.Linux.Namespaces = "x", nil }), "hostname"},
		"long hostname":    {with(func(s *specs.Spec) { s.Hostname = strings.Repeat("x", 65) }), "64"},
		"sysctl of all":    {with(func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"vm.swappiness": "1"} }), "vm.swappiness"},
		"sysctl outside":   {with(func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"} }), "network"},
		"sysctl value":     {with(func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.shmmni": "many"} }), "kernel.shmmni"},
		"sysctl dots":      {with(func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"fs/mqueue/../../kernel/panic": "1"} }), "panic"},
		"user alone":       {boxSpec(userNS), "uidMappings"},
		"mappings":         {with(func(s *specs.Spec) { s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 1}} }), "uidMappings"},
		"mount elsewhere":  {mount(specs.Mount{Destination: "/data", Type: "tmpfs"}), "/data"},
		"mount type":       {mount(specs.Mount{Destination: "/dev/shm", Type: "proc"}), "proc"},
		"shm size":         {mount(specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Options: []string{"size=lots"}}), "size=lots"},
		"shm without size": {mount(specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Options: []string{"size=0"}}), "size=0"},
		"systemd cgroup":   {with(func(s *specs.Spec) { s.Linux.CgroupsPath = "a.slice:b" }), "slice:prefix:name"},
		"systemd parent":   {with(func(s *specs.Spec) { s.Linux.CgroupsPath = "a.scope:b:c" }), "a.scope"},
		"no JSON object":   {"text", "malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			b := serveBox(t, "bad", c.spec)
			if err := b.createBox(nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "bad") {
				t.Errorf("create: %v", err)
			}
			if left := mountsIn(b.dir); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			if d := b.describeBox(); d.Sandbox.GetState() != "" {
				t.Errorf("describe: %v", d)
			}
		})
	}
	b := serveBox(t, "order", boxSpec(utsNS))
	s := b.Sandbox()
	ask := map[string]func(id string) error{
		"start": func(id string) error {
			_, err := s.StartSandbox(ctx, &api.StartSandboxRequest{SandboxID: id})
			return err
		},
		"stop": func(id string) error {
			_, err := s.StopSandbox(ctx, &api.StopSandboxRequest{SandboxID: id})
			return err
		},
		"wait": func(id string) error {
			_, err := s.WaitSandbox(ctx, &api.WaitSandboxRequest{SandboxID: id})
			return err
		},
		"status": func(id string) error {
			_, err := s.SandboxStatus(ctx, &api.SandboxStatusRequest{SandboxID: id})
			return err
		},
		"ping": func(id string) error { _, err := s.PingSandbox(ctx, &api.PingRequest{SandboxID: id}); return err },
		"metrics": func(id string) error {
			_, err := s.SandboxMetrics(ctx, &api.SandboxMetricsRequest{SandboxID: id})
			return err
		},
		"update": func(id string) error {
			_, err := s.UpdateSandbox(ctx, &api.UpdateSandboxRequest{SandboxID: id})
			return err
		},
	}
	for name, do := range ask {
		if err := do("order"); !errdefs.IsNotFound(err) {
			t.Errorf("%s of what was not created: %v", name, err)
		}
		if err := do("other"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "other") {
			t.Errorf("%s of another: %v", name, err)
		}
	}
	if p, err := s.Platform(ctx, &api.PlatformRequest{SandboxID: "order"}); err != nil || p.Platform.GetOS() != "linux" || p.Platform.GetArchitecture() == "" {
		t.Errorf("platform: %v, %v", p, err)
	}
	b.startBox()
	if err := b.createBox(nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("created twice: %v", err)
	}
	if err := ask["start"]("order"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("started twice: %v", err)
	}
}
