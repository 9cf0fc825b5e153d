package engine

import (
	"context"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
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

// TestFields: one row for each field of the runtime specification, its effect seen from inside a real container.
func TestFields(t *testing.T) {
	f := newFixture(t)
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 0, Size: 65536}}
	namespace := func(s *specs.Spec, typ specs.LinuxNamespaceType) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: typ})
	}
	caps := []string{"CAP_NET_RAW"} // bit 13
	for _, row := range []struct {
		field  string
		mod    func(*specs.Spec)
		script string
		want   string
	}{
		{"hostname", func(s *specs.Spec) { s.Hostname = "row" }, "hostname", "row"},
		{"domainname", func(s *specs.Spec) { s.Domainname = "row.test" }, "cat /proc/sys/kernel/domainname", "row.test"},
		{"root.readonly", func(s *specs.Spec) { s.Root.Readonly = true }, "touch /tmp/x 2>/dev/null || echo refused", "refused"},
		{"process.cwd", func(s *specs.Spec) { s.Process.Cwd = "/tmp" }, "pwd", "/tmp"},
		{"process.env", func(s *specs.Spec) { s.Process.Env = append(s.Process.Env, "A=b c") }, "echo $A", "b c"},
		{"process.user", func(s *specs.Spec) { s.Process.User = specs.User{UID: 7, GID: 8, AdditionalGids: []uint32{9}} }, "id -u; id -g; id -G", "7\n8\n8 9"},
		{"process.user.umask", func(s *specs.Spec) { v := uint32(0o27); s.Process.User.Umask = &v }, "umask", "0027"},
		{"process.noNewPrivileges", func(s *specs.Spec) { s.Process.NoNewPrivileges = true }, status("NoNewPrivs"), "1"},
		{"process.capabilities", func(s *specs.Spec) {
			s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
		}, status("CapEff"), "0000000000002000"},
		{"process.capabilities.ambient", func(s *specs.Spec) {
			s.Process.User.UID = 7
			s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps, Inheritable: caps, Ambient: caps}
		}, status("CapAmb"), "0000000000002000"},
		{"process.rlimits", func(s *specs.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 60, Hard: 70}}
		}, "ulimit -Sn; ulimit -Hn", "60\n70"},
		{"process.oomScoreAdj", func(s *specs.Spec) { v := 500; s.Process.OOMScoreAdj = &v }, "cat /proc/self/oom_score_adj", "500"},
		{"process.scheduler", func(s *specs.Spec) {
			s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch}
		}, "awk '{print $41}' /proc/self/stat", "3"},
		{"mounts.options", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"ro", "noexec", "nodev"}})
		}, "awk '$5==\"/tmp\"{print $6}' /proc/self/mountinfo", "ro,nodev,noexec,relatime"},
		{"mounts.options recursive", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts,
				specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "tmpfs"},
				specs.Mount{Destination: "/tmp", Type: "bind", Source: "/dev", Options: []string{"rbind", "rro"}})
		}, "awk '$5==\"/tmp\" || index($5,\"/tmp/\")==1{split($6,o,\",\"); print o[1]}' /proc/self/mountinfo | sort -u", "ro"},
		{"linux.maskedPaths", func(s *specs.Spec) { s.Linux.MaskedPaths = []string{"/proc/version"} }, "wc -c </proc/version", "0"},
		{"linux.readonlyPaths", func(s *specs.Spec) { s.Linux.ReadonlyPaths = []string{"/proc/sys"} },
			"echo x 2>/dev/null >/proc/sys/kernel/domainname || echo refused", "refused"},
		{"linux.sysctl", func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.msgmax": "4096"} }, "cat /proc/sys/kernel/msgmax", "4096"},
		{"linux.devices", func(s *specs.Spec) {
			mode := os.FileMode(0o640)
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/row", Type: "c", Major: 1, Minor: 3, FileMode: &mode}}
		}, "stat -c '%F %t:%T %a' /dev/row", "character special file 1:3 640"},
		{"linux.uidMappings", func(s *specs.Spec) {
			namespace(s, specs.UserNamespace)
			s.Linux.UIDMappings, s.Linux.GIDMappings = ids, ids
		}, "awk '{print $1, $2, $3}' /proc/self/uid_map", "0 0 65536"},
		{"linux.timeOffsets", func(s *specs.Spec) {
			namespace(s, specs.TimeNamespace)
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1_000_000}}
		}, "awk '$1==\"boottime\"{print $2}' /proc/self/timens_offsets", "1000000"},
		{"linux.seccomp", func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
				{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno},
			}}
		}, "mkdir /tmp/d 2>/dev/null || echo refused; " + status("Seccomp"), "refused\n2"},
		{"linux.personality", func(s *specs.Spec) {
			s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
		}, "cat /proc/self/personality", "00000008"},
	} {
		t.Run(row.field, func(t *testing.T) {
			if got := f.runShell(t, row.mod, row.script); got != row.want {
				t.Errorf("%s: got %q, want %q", row.field, got, row.want)
			}
		})
	}
}

// able says which fields this machine's kernel honours, which therefore are not refused here.
func able() map[string]bool {
	has := func(path string) bool { _, err := os.Stat(path); return err == nil }
	selinux := has("/sys/fs/selinux/enforce")
	return map[string]bool{
		"process.apparmorProfile": has("/sys/kernel/security/apparmor"), "process.selinuxLabel": selinux, "linux.mountLabel": selinux,
		"linux.resources.unified": has("/sys/fs/cgroup/cgroup.controllers"), "linux.intelRdt": has("/sys/fs/resctrl/info"),
	}
}

// TestFieldsRefused: what cannot be honoured is a sentence with the name of the thing, and nothing is left. (A capability
// that does not exist is logged and left out, as the specification has it.)
func TestFieldsRefused(t *testing.T) {
	f := newFixture(t)
	able := able()
	for _, row := range []struct {
		field string
		mod   func(*specs.Spec)
		says  string
	}{
		{"process.rlimits", func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NONE"}} }, "RLIMIT_NONE"},
		{"linux.namespaces", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: "none"})
		}, "none"},
		{"linux.namespaces.path", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: "/no/such"})
		}, "/no/such"},
		{"linux.sysctl", func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"vm.swappiness": "1"} }, "vm.swappiness"},
		{"process.apparmorProfile", func(s *specs.Spec) { s.Process.ApparmorProfile = "row" }, "apparmor"},
		{"process.selinuxLabel", func(s *specs.Spec) { s.Process.SelinuxLabel = "system_u:system_r:row_t:s0" }, "selinux"},
		{"linux.mountLabel", func(s *specs.Spec) { s.Linux.MountLabel = "system_u:object_r:row_t:s0" }, "linux.mountLabel"},
		{"linux.resources.unified", func(s *specs.Spec) {
			s.Linux.Resources = &specs.LinuxResources{Unified: map[string]string{"memory.high": "1"}}
		}, "unified"},
		{"linux.intelRdt", func(s *specs.Spec) { s.Linux.IntelRdt = &specs.LinuxIntelRdt{L3CacheSchema: "L3:0=f"} }, "intelRdt"},
		{"linux.memoryPolicy", func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: "MPOL_NONE"} }, "MPOL_NONE"},
		{"linux.seccomp.flags", func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{"NONE"}, Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActErrno}}}
		}, "NONE"},
		{"mounts.options", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nonsense"}})
		}, "nonsense"},
		{"process.ioPriority", func(s *specs.Spec) { s.Process.IOPriority = &specs.LinuxIOPriority{Class: "NONE"} }, "NONE"},
		{"process.scheduler", func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: "NONE"} }, "NONE"},
		{"linux.rootfsPropagation", func(s *specs.Spec) { s.Linux.RootfsPropagation = "none" }, "none"},
		{"linux.personality", func(s *specs.Spec) { s.Linux.Personality = &specs.LinuxPersonality{Domain: "NONE"} }, "NONE"},
	} {
		if able[row.field] {
			continue
		}
		t.Run(row.field, func(t *testing.T) {
			id := f.id()
			spec := testSpec(id, "true")
			row.mod(spec)
			c, err := f.Create(context.Background(), id, f.bundle, spec, IO{})
			if err == nil {
				_ = c.Signal(unix.SIGKILL, false)
				<-c.Init().Done()
				t.Fatalf("it is accepted; %v", c.Destroy())
			}
			if !strings.Contains(err.Error(), row.says) {
				t.Errorf("error is %v, want one that names %q", err, row.says)
			}
		})
	}
}
