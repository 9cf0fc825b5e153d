package spec

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// HostNetwork leaves the container in the host's network, and gives it the host's names: /etc/resolv.conf and
// /etc/hosts, read-only, where the host has them and nothing was mounted there before.
func HostNetwork() Option {
	return func(s *specs.Spec) error {
		l := linux(s)
		l.Namespaces = slices.DeleteFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
		for _, file := range []string{"/etc/resolv.conf", "/etc/hosts"} {
			mounted := slices.ContainsFunc(s.Mounts, func(m specs.Mount) bool { return path.Clean(m.Destination) == file })
			if st, err := os.Stat(file); err != nil || !st.Mode().IsRegular() || mounted {
				continue
			}
			s.Mounts = append(s.Mounts, specs.Mount{Destination: file, Type: "bind", Source: file, Options: []string{"rbind", "ro"}})
		}
		return nil
	}
}

// NetNS puts the container in the network namespace at path (/run/netns/NAME, /proc/PID/ns/net).
func NetNS(file string) Option {
	return func(s *specs.Spec) error {
		if !path.IsAbs(file) || strings.ContainsRune(file, 0) {
			return fmt.Errorf("network namespace %q is not an absolute path: %w", file, errdefs.ErrInvalidArgument)
		}
		l, ns := linux(s), specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: file}
		if i := slices.IndexFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == ns.Type }); i >= 0 {
			l.Namespaces[i] = ns
		} else {
			l.Namespaces = append(l.Namespaces, ns)
		}
		return nil
	}
}
