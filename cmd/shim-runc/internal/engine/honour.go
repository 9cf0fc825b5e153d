package engine

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// honoured refuses what libcontainer would leave out without an error (InvalidArgument). What it refuses itself is not
// asked again.
func honoured(spec *specs.Spec) error {
	if err := processHonoured(spec.Process); err != nil {
		return err
	}
	if m := spec.Linux; len(m.UIDMappings)+len(m.GIDMappings) > 0 && !hasNamespace(spec, specs.UserNamespace) {
		return invalid("linux.uidMappings or gidMappings are set without a user namespace")
	}
	if p := spec.Linux.Personality; p != nil && len(p.Flags) > 0 {
		return invalid("linux.personality.flags %v: none is known", p.Flags)
	}
	if err := seccompHonoured(spec.Linux.Seccomp); err != nil {
		return err
	}
	return resourcesHonoured(spec.Linux.Resources)
}

// processHonoured refuses of a process, an exec too, what would not be as it says.
func processHonoured(p *specs.Process) error {
	seen := map[string]bool{}
	for _, r := range p.Rlimits {
		if seen[r.Type] {
			return invalid("process.rlimits has %s twice", r.Type)
		}
		seen[r.Type] = true
	}
	switch {
	case p.SelinuxLabel != "" && !selinux():
		return invalid("process.selinuxLabel is set, and this kernel has no SELinux")
	case p.ApparmorProfile != "" && !apparmor():
		return invalid("process.apparmorProfile is set, and this kernel has no AppArmor")
	}
	return nil
}

// apparmor says whether the kernel knows profiles.
func apparmor() bool {
	data, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return err == nil && strings.HasPrefix(string(data), "Y")
}

func hasNamespace(spec *specs.Spec, typ specs.LinuxNamespaceType) bool {
	return slices.ContainsFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == typ })
}

// seccompHonoured refuses errors that no filter can return, and a profile without what it is for.
func seccompHonoured(s *specs.LinuxSeccomp) error {
	if s == nil {
		return nil
	}
	returns := func(a specs.LinuxSeccompAction) bool { return a == specs.ActErrno || a == specs.ActTrace }
	switch {
	case s.DefaultAction == "":
		return invalid("linux.seccomp.defaultAction is missing")
	case s.DefaultErrnoRet != nil && !returns(s.DefaultAction):
		return invalid("linux.seccomp.defaultErrnoRet is set, and %s returns no error", s.DefaultAction)
	case s.ListenerMetadata != "" && s.ListenerPath == "":
		return invalid("linux.seccomp.listenerMetadata is set without a listenerPath")
	}
	for _, call := range s.Syscalls {
		if call.ErrnoRet != nil && !returns(call.Action) {
			return invalid("linux.seccomp.syscalls of %v: errnoRet is set, and %s returns no error", call.Names, call.Action)
		}
	}
	return nil
}

// resourcesHonoured refuses limits that this machine's version of cgroups does not have.
func resourcesHonoured(r *specs.LinuxResources) error {
	if r == nil {
		return nil
	}
	const anywhere = "no kernel of today has it"
	var v1, v2 string // why not; nothing where it is honoured
	if cgroups.IsCgroup2UnifiedMode() {
		v2 = "cgroup v2 has nothing like it"
	} else {
		v1 = "this kernel's cgroup v1 has nothing like it"
	}
	type limit struct {
		name string
		set  bool
		why  string
	}
	var limits []limit
	if m := r.Memory; m != nil {
		limits = append(limits,
			//lint:ignore SA1019 a client may set it all the same
			limit{"memory.kernel", m.Kernel != nil && *m.Kernel > 0, anywhere},
			limit{"memory.kernelTCP", m.KernelTCP != nil && *m.KernelTCP > 0, anywhere},
			limit{"memory.useHierarchy", m.UseHierarchy != nil && !*m.UseHierarchy, "cgroups always count what is below them"},
			limit{"memory.swappiness", m.Swappiness != nil, v2},
			limit{"memory.disableOOMKiller", m.DisableOOMKiller != nil && *m.DisableOOMKiller, v2},
		)
	}
	if c := r.CPU; c != nil {
		limits = append(limits,
			limit{"cpu.shares", v2 != "" && c.Shares != nil && c.Idle != nil && *c.Idle == 1, "an idle cgroup has none"},
			limit{"cpu.realtimeRuntime", c.RealtimeRuntime != nil && *c.RealtimeRuntime != 0, v2},
			limit{"cpu.realtimePeriod", c.RealtimePeriod != nil && *c.RealtimePeriod != 0, v2},
			limit{"cpu.burst", c.Burst != nil && *c.Burst > 0 && !anyCgroupHas("cpu/cpu.cfs_burst_us", "cpu,cpuacct/cpu.cfs_burst_us"), v1},
		)
	}
	if b := r.BlockIO; b != nil {
		limits = append(limits, limit{"blockIO.leafWeight", b.LeafWeight != nil && *b.LeafWeight != 0, v2})
		for _, d := range b.WeightDevice {
			limits = append(limits,
				limit{"blockIO.weightDevice.leafWeight", d.LeafWeight != nil && *d.LeafWeight != 0, v2},
				limit{"blockIO.weightDevice", d.Weight != nil && v2 != "" && !anyCgroupHas("*/io.bfq.weight"),
					"no disk of this machine is scheduled by BFQ, which alone weighs by device on cgroup v2"},
			)
		}
	}
	if n := r.Network; n != nil {
		limits = append(limits,
			limit{"network.classID", n.ClassID != nil && *n.ClassID != 0, v2},
			limit{"network.priorities", len(n.Priorities) > 0, v2},
		)
	}
	for _, l := range limits {
		if l.set && l.why != "" {
			return invalid("linux.resources.%s: %s", l.name, l.why)
		}
	}
	return nil
}

// anyCgroupHas says whether there is a file below the root of cgroups.
func anyCgroupHas(patterns ...string) bool {
	for _, p := range patterns {
		if found, _ := filepath.Glob("/sys/fs/cgroup/" + p); len(found) > 0 {
			return true
		}
	}
	return false
}

// execHonoured refuses what a process of a container cannot have for itself: libcontainer gives it the container's.
func (e *Engine) execHonoured(p *specs.Process, umask *uint32, oom *int) error {
	mask, score := uint32(0o022), e.clamp.oom
	if umask != nil {
		mask = *umask
	}
	if oom != nil {
		score = *oom
	}
	if u := p.User.Umask; u != nil && *u != mask {
		return invalid("process.user.umask %#o: an exec has its container's, %#o", *u, mask)
	}
	if o := p.OOMScoreAdj; o != nil && *o != score {
		return invalid("process.oomScoreAdj %d: an exec has its container's, %d", *o, score)
	}
	return processHonoured(p)
}
