package spec

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// capabilityNames are the capabilities of linux/capability.h, each at the index that is its number.
var capabilityNames = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
	"CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
	"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
	"CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

// Capabilities adds to and drops from what the process may do. Names are with or without CAP_, in any case; "ALL" in
// add starts from everything, in drop from nothing (and drop's ALL is heard before add's other names, so that
// "drop ALL, add X" leaves X). A name in both lists is dropped. An unknown name is an error.
func Capabilities(add, drop []string) Option {
	return func(s *specs.Spec) error {
		add, addAll, err := capabilities(add)
		if err != nil {
			return err
		}
		drop, dropAll, err := capabilities(drop)
		if err != nil {
			return err
		}
		p := process(s)
		if p.Capabilities == nil {
			p.Capabilities = &specs.LinuxCapabilities{}
		}
		var all []string
		if addAll {
			if all, err = grantable(); err != nil {
				return err
			}
		}
		c := p.Capabilities
		for _, set := range sets(c) {
			granted := set != &c.Inheritable && set != &c.Ambient
			if addAll && granted {
				*set = slices.Clone(all)
			}
			if dropAll {
				*set = nil
			}
			if granted {
				for _, name := range add {
					if !slices.Contains(*set, name) {
						*set = append(*set, name)
					}
				}
			}
			*set = slices.DeleteFunc(*set, func(name string) bool { return slices.Contains(drop, name) })
		}
		return nil
	}
}

// sets are the five sets of c.
func sets(c *specs.LinuxCapabilities) []*[]string {
	return []*[]string{&c.Bounding, &c.Permitted, &c.Effective, &c.Inheritable, &c.Ambient}
}

// capabilities gives the full names of names, and whether ALL was among them.
func capabilities(names []string) (full []string, all bool, err error) {
	for _, name := range names {
		n := strings.ToUpper(name)
		if n == "ALL" {
			all = true
			continue
		}
		n = "CAP_" + strings.TrimPrefix(n, "CAP_")
		if !slices.Contains(capabilityNames, n) {
			return nil, false, fmt.Errorf("capability %q is unknown: %w", name, errdefs.ErrInvalidArgument)
		}
		full = append(full, n)
	}
	return full, all, nil
}

// grantable are the capabilities that the kernel knows, but for those outside this process's bounding set: on a
// machine whose init gave some up (a virtual machine's, a container's) no runtime can grant them, and one that is
// told to refuses to start the container.
func grantable() ([]string, error) {
	const lastFile, statusFile = "/proc/sys/kernel/cap_last_cap", "/proc/thread-self/status"
	data, err := os.ReadFile(lastFile)
	if err != nil {
		return nil, fmt.Errorf("cannot tell the kernel's capabilities: %w", err)
	}
	last, err := strconv.Atoi(string(bytes.TrimSpace(data)))
	if err != nil {
		return nil, fmt.Errorf("cannot tell the kernel's capabilities: %s: %w", lastFile, err)
	}
	status, err := os.ReadFile(statusFile)
	if err != nil {
		return nil, fmt.Errorf("cannot tell this process's capabilities: %w", err)
	}
	for line := range strings.Lines(string(status)) {
		value, ok := strings.CutPrefix(line, "CapBnd:")
		if !ok {
			continue
		}
		bounding, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err != nil {
			return nil, fmt.Errorf("cannot tell this process's capabilities: %s: %w", statusFile, err)
		}
		var names []string
		for i, name := range capabilityNames {
			if i <= last && bounding&(1<<i) != 0 {
				names = append(names, name)
			}
		}
		return names, nil
	}
	return nil, fmt.Errorf("cannot tell this process's capabilities: %s has no CapBnd: %w", statusFile, errdefs.ErrNotFound)
}
