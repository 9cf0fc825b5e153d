package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// ipcSysctls are those that each ipc namespace has for itself (ipc_namespaces(7)); so are all below fs.mqueue.
var ipcSysctls = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni",
	"kernel.shm_rmid_forced",
}

// namespaceOf is the type of the namespace that a sysctl belongs to, empty for one of the whole machine. Names are written
// with dots, or with slashes where a part has dots itself.
func namespaceOf(name string) specs.LinuxNamespaceType {
	dotted := strings.ReplaceAll(name, "/", ".")
	switch {
	case strings.HasPrefix(dotted, "net."):
		return specs.NetworkNamespace
	case slices.Contains(ipcSysctls, dotted), strings.HasPrefix(dotted, "fs.mqueue."):
		return specs.IPCNamespace
	}
	return ""
}

func (p *Plan) checkSysctls(sysctl map[string]string) error {
	for _, name := range sorted(sysctl) {
		switch kind := namespaceOf(name); {
		case name == "kernel.hostname" || name == "kernel.domainname":
			return invalid("sysctl %s: the spec has fields for it, hostname and domainname", name)
		case kind == "":
			return invalid("sysctl %s belongs to the whole machine, not to a namespace", name)
		case !p.Holds(kind):
			return invalid("sysctl %s needs a %s namespace, which the sandbox does not hold", name, kind)
		case slices.Contains(strings.FieldsFunc(name, func(r rune) bool { return r == '/' }), ".."):
			return invalid("sysctl %q is no name", name)
		}
	}
	return nil
}

// of selects the sysctls of those namespaces that pick says.
func of(sysctl map[string]string, pick func(specs.LinuxNamespaceType) bool) map[string]string {
	out := map[string]string{}
	for name, value := range sysctl {
		if pick(namespaceOf(name)) {
			out[name] = value
		}
	}
	return out
}

// writeSysctls sets them in the namespaces of the calling thread.
func writeSysctls(sysctl map[string]string) error {
	for _, name := range sorted(sysctl) {
		file := name
		if !strings.Contains(name, "/") {
			file = strings.ReplaceAll(name, ".", "/")
		}
		if err := os.WriteFile(filepath.Join("/proc/sys", file), []byte(sysctl[name]), 0); err != nil {
			return invalid("cannot set sysctl %s to %q: %w", name, sysctl[name], err)
		}
	}
	return nil
}

func sorted(m map[string]string) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// within runs fn on a thread that is in pinned namespaces of the given types. The thread ends behind it.
func within(bundle string, types []specs.LinuxNamespaceType, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good
		done <- func() error {
			for _, kind := range types {
				path := Path(bundle, string(kind))
				fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
				if err == nil {
					err = unix.Setns(fd, 0)
					_ = unix.Close(fd)
				}
				if err != nil {
					return fmt.Errorf("cannot enter namespace %s: %w", path, err)
				}
			}
			return fn()
		}()
	}()
	return <-done
}
