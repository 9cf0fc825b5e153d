package engine

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestExecAffinity: where an exec may run, before it is in the container's cgroup and after, is the container's word or its own. What
// it has of the first without the second is the kernel's: since 6.2 that keeps what was asked for when the cgroup changes.
func TestExecAffinity(t *testing.T) {
	f := newFixture(t)
	c := f.create(t, IO{}, func(s *specs.Spec) {
		s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0", Final: "0"}
	}, "sleep", "1000")
	start(t, c)
	initial := "1"
	if kernelBefore(t, 6, 2) {
		initial = "0-1"
	}
	for _, row := range []struct {
		name string
		own  *specs.CPUAffinity
		want string
	}{
		{"container", nil, "0"}, {"own", &specs.CPUAffinity{Initial: "0", Final: "1"}, "1"}, {"own, both", &specs.CPUAffinity{Final: "0-1"}, "0-1"},
		{"own, initial alone", &specs.CPUAffinity{Initial: "1"}, initial},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := f.execShell(t, c, func(p *specs.Process) { p.ExecCPUAffinity = row.own }, status("Cpus_allowed_list")); got != row.want {
				t.Errorf("allowed are %q, want %q", got, row.want)
			}
		})
	}
}

// kernelBefore says whether this kernel is older than a version.
func kernelBefore(t *testing.T, major, minor int) bool {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	var is [2]int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &is[0], &is[1]); err != nil {
		t.Fatal(err)
	}
	return is[0] < major || is[0] == major && is[1] < minor
}

// execShell runs a script in a container, and gives what it printed.
func (f *fixture) execShell(t *testing.T, c *Container, mod func(*specs.Process), script string) string {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	p := &specs.Process{Args: []string{"sh", "-c", script}, Env: []string{"PATH=/bin"}, Cwd: "/"}
	mod(p)
	proc, err := c.Exec(context.Background(), f.id(), p, IO{Stdout: w, Stderr: w})
	_ = w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Exit()
	var out strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		out.Write(buf[:n])
		if err != nil {
			return strings.TrimSpace(out.String())
		}
	}
}

// TestExecFields: what an exec has for itself, and what it cannot have.
func TestExecFields(t *testing.T) {
	f := newFixture(t)
	c := f.create(t, IO{}, func(s *specs.Spec) {
		s.Process.User.Umask, s.Process.OOMScoreAdj = number[uint32](0o27), number(500)
	}, "sleep", "1000")
	start(t, c)
	for _, row := range []struct {
		field  string
		mod    func(*specs.Process)
		script string
		want   string
	}{
		{"user", func(p *specs.Process) { p.User = specs.User{UID: 7, GID: 8, AdditionalGids: []uint32{9}} }, "id -u; id -G", "7\n8 9"},
		{"user.umask", func(p *specs.Process) { p.User.Umask = number[uint32](0o27) }, "umask", "0027"},
		{"oomScoreAdj", func(p *specs.Process) { p.OOMScoreAdj = number(500) }, "cat /proc/self/oom_score_adj", "500"},
		{"capabilities", func(p *specs.Process) { p.Capabilities = rawCaps }, status("CapEff"), "0000000000002000"},
		{"noNewPrivileges", func(p *specs.Process) { p.NoNewPrivileges = true }, status("NoNewPrivs"), "1"},
		{"rlimits", func(p *specs.Process) { p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 60, Hard: 70}} }, "ulimit -Hn", "70"},
		{"scheduler", func(p *specs.Process) { p.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Nice: 3} }, own + "${41} ${19}", "3 3"},
		{"ioPriority", func(p *specs.Process) {
			p.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 5}
		}, "ionice -p $$", "best-effort: prio 5"},
	} {
		t.Run(row.field, func(t *testing.T) {
			if got := f.execShell(t, c, row.mod, row.script); got != row.want {
				t.Errorf("got %q, want %q", got, row.want)
			}
		})
	}
	for field, mod := range map[string]func(*specs.Process){
		"process.user.umask":       func(p *specs.Process) { p.User.Umask = number[uint32](0o77) },
		"process.oomScoreAdj":      func(p *specs.Process) { p.OOMScoreAdj = number(501) },
		"RLIMIT_CORE":              func(p *specs.Process) { p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}, {Type: "RLIMIT_CORE"}} },
		"process.selinuxLabel":     func(p *specs.Process) { p.SelinuxLabel = "system_u:system_r:row_t:s0" },
		"process.apparmorProfile":  func(p *specs.Process) { p.ApparmorProfile = "no-such-profile" },
		"invalid io priority":      func(p *specs.Process) { p.IOPriority = &specs.LinuxIOPriority{Class: "NONE"} },
		"invalid scheduler policy": func(p *specs.Process) { p.Scheduler = &specs.Scheduler{Policy: "NONE"} },
		"CPUAffinity":              func(p *specs.Process) { p.ExecCPUAffinity = &specs.CPUAffinity{Final: "x"} },
		"RLIMIT_NONE":              func(p *specs.Process) { p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NONE"}} },
	} {
		if u, ok := unless[field]; ok && u.has() {
			continue
		}
		p := &specs.Process{Args: []string{"true"}, Env: []string{"PATH=/bin"}}
		mod(p)
		proc, err := c.Exec(context.Background(), f.id(), p, IO{})
		if err == nil {
			_ = proc.Signal(unix.SIGKILL)
			proc.Exit()
		}
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: error is %v", field, err)
		}
	}
}
