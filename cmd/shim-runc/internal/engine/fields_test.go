package engine

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runc/libcontainer/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	libseccomp "github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"
)

// runShell runs a script in a container of its own, and gives what it printed.
func (f *fixture) runShell(t *testing.T, mod func(*specs.Spec), script string) string {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	c := f.create(t, IO{Stdout: w, Stderr: w}, mod, "sh", "-c", script)
	_ = w.Close()
	start(t, c)
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	c.Init().Exit()
	return strings.TrimSpace(string(out))
}

// status prints one line of the process's own status, without its name.
func status(field string) string {
	return "grep ^" + field + ": /proc/self/status | cut -f2-"
}

// fieldRow is a field whose effect is seen from inside a container that runs a script.
type fieldRow struct {
	field  string // see proof
	mod    func(*specs.Spec)
	script string
	want   string
}

var (
	identity = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 0, Size: 65536}}
	netRaw   = []string{"CAP_NET_RAW"} // bit 13
	rawCaps  = &specs.LinuxCapabilities{Bounding: netRaw, Effective: netRaw, Permitted: netRaw}
)

func addNamespace(s *specs.Spec, typ specs.LinuxNamespaceType, path string) {
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: typ, Path: path})
}

// own is what a shell has to do to see its own scheduling attributes: a child may not have them.
const own = "read -r l </proc/self/stat; set -- $l; echo "

var fieldRows = []fieldRow{
	{"ociVersion", func(s *specs.Spec) { s.Version = "1.0.2-dev" }, "echo ran", "ran"},
	{"hostname", func(s *specs.Spec) { s.Hostname = "row" }, "hostname", "row"},
	{"domainname", func(s *specs.Spec) { s.Domainname = "row.test" }, "cat /proc/sys/kernel/domainname", "row.test"},
	{"root.path", nil, "ls -d /bin/busybox", "/bin/busybox"},
	{"root.readonly", func(s *specs.Spec) { s.Root.Readonly = true }, "touch /tmp/x 2>/dev/null || echo refused", "refused"},
	{"process.args", func(s *specs.Spec) { s.Process.Args = append(s.Process.Args, "zero", "a b") }, "echo $0 $# \"$1\"", "zero 1 a b"},
	{"process.cwd", func(s *specs.Spec) { s.Process.Cwd = "/tmp" }, "pwd", "/tmp"},
	{"process.env", func(s *specs.Spec) { s.Process.Env = append(s.Process.Env, "A=b c") }, "echo $A", "b c"},
	{"process.user.{uid,gid,additionalGids}", func(s *specs.Spec) {
		s.Process.User = specs.User{UID: 7, GID: 8, AdditionalGids: []uint32{9}}
	}, "id -u; id -g; id -G", "7\n8\n8 9"},
	{"process.user.umask", func(s *specs.Spec) { v := uint32(0o27); s.Process.User.Umask = &v }, "umask", "0027"},
	{"process.noNewPrivileges", func(s *specs.Spec) { s.Process.NoNewPrivileges = true }, status("NoNewPrivs"), "1"},
	{"process.capabilities.{bounding,effective,permitted}", func(s *specs.Spec) { s.Process.Capabilities = rawCaps },
		status("CapBnd") + ";" + status("CapEff") + ";" + status("CapPrm"), "0000000000002000\n0000000000002000\n0000000000002000"},
	{"process.capabilities.{inheritable,ambient}", func(s *specs.Spec) {
		s.Process.User.UID = 7
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: netRaw, Effective: netRaw, Permitted: netRaw, Inheritable: netRaw, Ambient: netRaw}
	}, status("CapInh") + ";" + status("CapAmb"), "0000000000002000\n0000000000002000"},
	{"process.rlimits.{type,soft,hard}", func(s *specs.Spec) {
		s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 60, Hard: 70}}
	}, "ulimit -Sn; ulimit -Hn", "60\n70"},
	{"process.oomScoreAdj", func(s *specs.Spec) { v := 500; s.Process.OOMScoreAdj = &v }, "cat /proc/self/oom_score_adj", "500"},
	{"process.scheduler.{policy,nice}", func(s *specs.Spec) {
		s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Nice: 5}
	}, own + "${41} ${19}", "3 5"},
	{"process.scheduler.{flags,runtime,deadline,period}", func(s *specs.Spec) {
		s.Process.Scheduler = &specs.Scheduler{
			Policy: specs.SchedDeadline, Runtime: 20_000_000, Deadline: 50_000_000, Period: 100_000_000,
			Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork},
		}
	}, own + "${41}; cut -d' ' -f41 /proc/self/stat; true", "6\n0"},
	{"process.ioPriority.{class,priority}", func(s *specs.Spec) {
		s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 6}
	}, "ionice -p $$", "best-effort: prio 6"},
	{"process.ioPriority idle", func(s *specs.Spec) {
		s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_IDLE}
	}, "ionice -p $$", "idle"},
	{"mounts.{destination,type,source,options}", func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "row", Options: []string{"ro", "size=64k"}})
	}, "awk '$5==\"/tmp\"{print $6, $8, $9, $10}' /proc/self/mountinfo | cut -d, -f1-3", "ro,relatime tmpfs row rw,size=64k"},
	{"linux.maskedPaths", func(s *specs.Spec) { s.Linux.MaskedPaths = []string{"/proc/version"} }, "wc -c </proc/version", "0"},
	{"linux.readonlyPaths", func(s *specs.Spec) { s.Linux.ReadonlyPaths = []string{"/proc/sys"} },
		"echo x 2>/dev/null >/proc/sys/kernel/domainname || echo refused", "refused"},
	{"linux.sysctl", func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.msgmax": "4096"} }, "cat /proc/sys/kernel/msgmax", "4096"},
	{"linux.devices.{path,type,major,minor,fileMode,uid,gid}", func(s *specs.Spec) {
		mode, uid, gid := os.FileMode(0o640), uint32(3), uint32(4)
		s.Linux.Devices = []specs.LinuxDevice{
			{Path: "/dev/row", Type: "c", Major: 1, Minor: 3, FileMode: &mode, UID: &uid, GID: &gid},
			{Path: "/dev/rowb", Type: "b", Major: 7, Minor: 99}, {Path: "/dev/rowp", Type: "p"},
		}
	}, "stat -c '%F %t:%T %a %u:%g' /dev/row /dev/rowb /dev/rowp",
		"character special file 1:3 640 3:4\nblock special file 7:63 666 0:0\nfifo 0:0 666 0:0"},
	{"linux.{uidMappings,gidMappings}.{containerID,hostID,size}", func(s *specs.Spec) {
		addNamespace(s, specs.UserNamespace, "")
		s.Linux.UIDMappings = identity
		s.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 0, Size: 1000}, {ContainerID: 2000, HostID: 1000, Size: 9}}
	}, "awk '{print $1, $2, $3}' /proc/self/uid_map /proc/self/gid_map", "0 0 65536\n0 0 1000\n2000 1000 9"},
	{"linux.timeOffsets.{secs,nanosecs}", func(s *specs.Spec) {
		addNamespace(s, specs.TimeNamespace, "")
		s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1_000_000, Nanosecs: 5}, "monotonic": {Secs: 7}}
	}, "awk '{print $1, $2, $3}' /proc/self/timens_offsets", "monotonic 7 0\nboottime 1000000 5"},
	{"linux.memoryPolicy.{mode,nodes,flags}", func(s *specs.Spec) {
		s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0", Flags: []specs.MemoryPolicyFlagType{specs.MpolFStaticNodes}}
	}, "head -n 1 /proc/self/numa_maps | cut -d' ' -f2", "bind=static:0"},
	{"linux.personality.domain", func(s *specs.Spec) {
		s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
	}, "cat /proc/self/personality", "00000008"},
	{"linux.seccomp.{defaultAction,syscalls.names,syscalls.action}", func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno},
		}}
	}, "mkdir /tmp/d 2>/dev/null || echo refused; " + status("Seccomp"), "refused\n2"},
	{"linux.seccomp.syscalls.errnoRet", func(s *specs.Spec) {
		e := uint(unix.EXDEV)
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: &e},
		}}
	}, "mkdir /tmp/d 2>&1", "mkdir: can't create directory '/tmp/d': Invalid cross-device link"},
	{"linux.seccomp.syscalls.args.{index,value,valueTwo,op}", func(s *specs.Spec) {
		// One domain of uname's personality(2), and every mode of mkdir with the sticky bit.
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"kill"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 1, Value: 10, Op: specs.OpEqualTo}}},
			{Names: []string{"chmod", "fchmodat"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{
				{Index: 1, Value: unix.S_ISVTX, ValueTwo: unix.S_ISVTX, Op: specs.OpMaskedEqual},
			}},
		}}
	}, "kill -0 1 && echo kill; kill -10 1 2>/dev/null || echo refused; mkdir -p /tmp/args; chmod 700 /tmp/args && echo chmod; chmod 1700 /tmp/args 2>/dev/null || echo refused",
		"kill\nrefused\nchmod\nrefused"},
	{"linux.seccomp.defaultErrnoRet", func(s *specs.Spec) {
		e := uint(unix.EXDEV)
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, DefaultErrnoRet: &e, Syscalls: []specs.LinuxSyscall{
			{Names: mostSyscalls, Action: specs.ActAllow},
		}}
	}, "mkdir /tmp/d 2>&1", "mkdir: can't create directory '/tmp/d': Invalid cross-device link"},
	{"linux.seccomp.flags", func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow},
			Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno}},
		}
	}, "mkdir /tmp/d 2>/dev/null || echo refused", "refused"},
}

// mostSyscalls are those that a shell of busybox and the way to it may need: all but mkdir.
var mostSyscalls = func() (names []string) {
	for n := range 470 {
		if name, err := libseccomp.ScmpSyscall(n).GetName(); err == nil && name != "mkdir" && name != "mkdirat" {
			names = append(names, name)
		}
	}
	return names
}()

// TestFields: the effect of each field is seen from inside a real container.
func TestFields(t *testing.T) {
	f := newFixture(t)
	for _, row := range fieldRows {
		t.Run(row.field, func(t *testing.T) {
			if got := f.runShell(t, row.mod, row.script); got != row.want {
				t.Errorf("%s: got %q, want %q", row.field, got, row.want)
			}
		})
	}
}

// unless says whether this machine's kernel honours a field that others refuse. The one of the VM does if vm is set.
var unless = map[string]struct {
	kernel string
	has    func() bool
	vm     bool
}{
	"process.apparmorProfile": {"AppArmor", apparmor, true},
	"process.selinuxLabel":    {"SELinux", selinux, false},
	"linux.mountLabel":        {"SELinux", selinux, false},
	"linux.intelRdt.{closID,schemata,l3CacheSchema,memBwSchema,enableMonitoring}": {"resctrl", func() bool { return exists("/sys/fs/resctrl/info") }, false},
	"linux.seccomp.flags SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": {"SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV and libseccomp 2.6", func() bool {
		return seccomp.FlagSupported(specs.LinuxSeccompFlagWaitKillableRecv) == nil
	}, false},
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

// refusedRow is what cannot be honoured, and what the error has to name.
type refusedRow struct {
	field string
	mod   func(*specs.Spec)
	says  string
}

func number[T any](v T) *T { return &v }

var refusedRows = []refusedRow{
	{"ociVersion 2", func(s *specs.Spec) { s.Version = "2.0.0" }, "ociVersion"},
	{"solaris", func(s *specs.Spec) { s.Solaris = &specs.Solaris{} }, "solaris"},
	{"windows", func(s *specs.Spec) { s.Windows = &specs.Windows{} }, "windows"},
	{"vm", func(s *specs.Spec) { s.VM = &specs.VM{} }, "vm"},
	{"zos", func(s *specs.Spec) { s.ZOS = &specs.ZOS{} }, "zos"},
	{"freebsd", func(s *specs.Spec) { s.FreeBSD = &specs.FreeBSD{} }, "freebsd"},
	{"process.commandLine", func(s *specs.Spec) { s.Process.CommandLine = "true" }, "process.commandLine"},
	{"process.user.username", func(s *specs.Spec) { s.Process.User.Username = "row" }, "process.user.username"},
	{"process.rlimits.type unknown", func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NONE"}} }, "RLIMIT_NONE"},
	{"process.rlimits.type twice", func(s *specs.Spec) {
		s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}, {Type: "RLIMIT_CORE"}}
	}, "RLIMIT_CORE"},
	{"process.execCPUAffinity malformed", func(s *specs.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "x"} }, "CPUAffinity"},
	{"linux.namespaces.type unknown", func(s *specs.Spec) { addNamespace(s, "none", "") }, "none"},
	{"linux.namespaces.path missing", func(s *specs.Spec) { addNamespace(s, specs.NetworkNamespace, "/no/such") }, "/no/such"},
	{"linux.namespaces.path of another kind", func(s *specs.Spec) { addNamespace(s, specs.NetworkNamespace, "/proc/self/ns/uts") }, "net"},
	{"linux.sysctl of the machine", func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"vm.swappiness": "1"} }, "vm.swappiness"},
	{"process.apparmorProfile", func(s *specs.Spec) { s.Process.ApparmorProfile = "row" }, "process.apparmorProfile"},
	{"process.selinuxLabel", func(s *specs.Spec) { s.Process.SelinuxLabel = "system_u:system_r:row_t:s0" }, "process.selinuxLabel"},
	{"linux.mountLabel", func(s *specs.Spec) { s.Linux.MountLabel = "system_u:object_r:row_t:s0" }, "linux.mountLabel"},
	{"linux.intelRdt.{closID,schemata,l3CacheSchema,memBwSchema,enableMonitoring}", func(s *specs.Spec) {
		s.Linux.IntelRdt = &specs.LinuxIntelRdt{ClosID: "row", Schemata: []string{"L3:0=f"}}
	}, "intelRdt"},
	{"linux.memoryPolicy.mode unknown", func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: "MPOL_NONE"} }, "MPOL_NONE"},
	{"linux.seccomp.defaultAction missing", func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{} }, "linux.seccomp.defaultAction"},
	{"linux.seccomp.syscalls.action unknown", func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: "SCMP_ACT_NONE"}}}
	}, "SCMP_ACT_NONE"},
	{"linux.seccomp.syscalls.errnoRet without an error", func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir"}, Action: specs.ActAllow, ErrnoRet: number[uint](1)},
		}}
	}, "errnoRet"},
	{"linux.seccomp.defaultErrnoRet without an error", func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, DefaultErrnoRet: number[uint](1)}
	}, "defaultErrnoRet"},
	{"linux.seccomp.listenerMetadata alone", func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerMetadata: "x"}
	}, "listenerMetadata"},
	{"linux.seccomp.listenerPath missing", func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActNotify}}}
	}, "listenerPath"},
	{"linux.seccomp.listenerPath of nobody", func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: "/no/such.sock", Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir"}, Action: specs.ActNotify},
		}}
	}, "/no/such.sock"},
	{"linux.seccomp.architectures unknown", func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{"SCMP_ARCH_NONE"}}
	}, "SCMP_ARCH_NONE"},
	{"linux.seccomp.flags unknown", func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{"NONE"}}
	}, "NONE"},
	{"linux.seccomp.flags SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}}
	}, "libseccomp"},
	{"mounts.options unknown", func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nonsense"}})
	}, "nonsense"},
	{"mounts.options for a file system on a bind", func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/tmp", Type: "bind", Source: "/tmp", Options: []string{"bind", "size=1"}})
	}, "size=1"},
	{"mounts.uidMappings of no bind", func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", UIDMappings: identity, GIDMappings: identity})
	}, "id-mapped"},
	{"process.ioPriority.class unknown", func(s *specs.Spec) { s.Process.IOPriority = &specs.LinuxIOPriority{Class: "NONE"} }, "NONE"},
	{"process.scheduler.policy unknown", func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: "NONE"} }, "NONE"},
	{"linux.rootfsPropagation unknown", func(s *specs.Spec) { s.Linux.RootfsPropagation = "none" }, "none"},
	{"linux.personality.domain unknown", func(s *specs.Spec) { s.Linux.Personality = &specs.LinuxPersonality{Domain: "NONE"} }, "NONE"},
	{"linux.personality.flags", func(s *specs.Spec) {
		s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux, Flags: []specs.LinuxPersonalityFlag{"ADDR_NO_RANDOMIZE"}}
	}, "linux.personality.flags"},
	{"linux.devices.type unknown", func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/row", Type: "x"}} }, `device type "x"`},
	{"linux.timeOffsets without its namespace", func(s *specs.Spec) {
		s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1}}
	}, "time namespace"},
	{"linux.uidMappings without its namespace", func(s *specs.Spec) { s.Linux.UIDMappings = identity }, "user namespace"},
	{"linux.netDevices without its namespace", func(s *specs.Spec) {
		s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth9": {}}
	}, "network devices"},
	{"hooks.createRuntime.path relative", func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "bin/true"}}}
	}, "hooks.createRuntime[0].path"},
	{"hooks.poststop.timeout of nothing", func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/bin/true", Timeout: number(0)}}}
	}, "hooks.poststop[0].timeout"},
}

// refused fails the test unless a create is refused by a sentence that names what it must.
func (f *fixture) refused(t *testing.T, mod func(*specs.Spec), says string) {
	t.Helper()
	id := f.id()
	spec := testSpec(id, "true")
	mod(spec)
	c, err := f.Create(context.Background(), id, f.bundle, spec, IO{})
	if err == nil {
		_ = c.Signal(unix.SIGKILL, false)
		<-c.Init().Done()
		t.Fatalf("it is accepted; %v", c.Destroy())
	}
	if !strings.Contains(err.Error(), says) {
		t.Errorf("error is %v, want one that names %q", err, says)
	}
}

// TestFieldsRefused: what cannot be honoured is a sentence with the name of the thing, and nothing is left. (A capability
// that does not exist is logged and left out, as the specification has it.)
func TestFieldsRefused(t *testing.T) {
	f := newFixture(t)
	for _, row := range refusedRows {
		if u, ok := unless[row.field]; ok && u.has() {
			continue
		}
		t.Run(row.field, func(t *testing.T) { f.refused(t, row.mod, row.says) })
	}
}

// TestAppArmor: a profile that the kernel has confines the init, and an exec that names it; another is refused by its name.
func TestAppArmor(t *testing.T) {
	if !apparmor() {
		t.Skip("this kernel has no AppArmor: see TestFieldsRefused")
	}
	f := newFixture(t)
	name := fmt.Sprintf("engine-test-%d", os.Getpid())
	profile := filepath.Join(t.TempDir(), "profile")
	rules := "profile " + name + " flags=(attach_disconnected) {\n file,\n capability,\n network,\n signal,\n unix,\n deny /tmp/denied w,\n}\n"
	if err := os.WriteFile(profile, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	command(t, "apparmor_parser", "--replace", "--skip-cache", profile)
	t.Cleanup(func() { command(t, "apparmor_parser", "--remove", profile) })
	const script = "cat /proc/self/attr/current; touch /tmp/denied 2>/dev/null || echo refused; touch /tmp/allowed && echo made"
	want := name + " (enforce)\nrefused\nmade"
	if got := f.runShell(t, func(s *specs.Spec) { s.Process.ApparmorProfile = name }, script); got != want {
		t.Errorf("init: %q, want %q", got, want)
	}
	c := f.create(t, IO{}, func(s *specs.Spec) { s.Process.ApparmorProfile = "unconfined" }, "sleep", "1000")
	start(t, c)
	if got := f.execShell(t, c, func(p *specs.Process) { p.ApparmorProfile = name }, script); got != want {
		t.Errorf("exec: %q, want %q", got, want)
	}
	if got := f.execShell(t, c, func(*specs.Process) {}, "cat /proc/1/attr/current"); got != "unconfined" {
		t.Errorf("the profile is %q", got)
	}
	f.refused(t, func(s *specs.Spec) { s.Process.ApparmorProfile = "no-such-profile" }, "apparmor")
}
