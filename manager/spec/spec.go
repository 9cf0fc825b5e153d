// Package spec builds the OCI runtime spec (config.json) of a container, from defaults and options: what a client
// does before it asks for a container to be created. Clients link it, so it knows no store, no wire and no other
// package of the manager.
//
// Options apply in the order given and the later wins; two depend on what came before them and say so (Seccomp, User).
// An option that does not fit is an error that wraps errdefs.ErrInvalidArgument or errdefs.ErrNotFound and names what
// it is about; the spec is then of no use.
package spec

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Option edits a spec under construction. It may read the container's root file system, where it is told where that
// is mounted, and the host's /dev, /etc and /proc.
type Option func(*specs.Spec) error

// New gives the spec of the container id of namespace: the Linux defaults (see defaults.go), then opts. What it runs
// comes from Image or Args. A user name that Image left is looked up at the end, in the root file system if Root.Path
// is absolute: a spec never comes out that would silently run as root.
func New(id, namespace string, opts ...Option) (*specs.Spec, error) {
	// Both become parts of a cgroup's path.
	for _, n := range []struct{ what, name string }{{"container id", id}, {"namespace", namespace}} {
		if n.name == "" || n.name == "." || n.name == ".." || strings.ContainsAny(n.name, "/\x00") {
			return nil, fmt.Errorf("%s %q cannot be part of a path: %w", n.what, n.name, errdefs.ErrInvalidArgument)
		}
	}
	s := defaults(id, namespace, unified())
	if err := Apply(s, opts...); err != nil {
		return nil, fmt.Errorf("cannot make the spec of container %q: %w", id, err)
	}
	if err := User("", "")(s); err != nil {
		return nil, fmt.Errorf("cannot make the spec of container %q: %w", id, err)
	}
	return s, nil
}

// Apply applies opts to s, in order, and stops at the first error. A nil option is passed over.
func Apply(s *specs.Spec, opts ...Option) error {
	for _, o := range opts {
		if o == nil {
			continue
		}
		if err := o(s); err != nil {
			return err
		}
	}
	return nil
}

// Hostname sets the host name, which its own UTS namespace has; the kernel takes 64 bytes at most.
func Hostname(name string) Option {
	return func(s *specs.Spec) error {
		if len(name) > 64 || strings.ContainsRune(name, 0) {
			return fmt.Errorf("host name %q is no host name of at most 64 bytes: %w", name, errdefs.ErrInvalidArgument)
		}
		s.Hostname = name
		return nil
	}
}

// Annotations adds to the spec's annotations, and replaces those of the same key.
func Annotations(m map[string]string) Option {
	return func(s *specs.Spec) error {
		for k, v := range m {
			if k == "" {
				return fmt.Errorf("annotation with value %q has no key: %w", v, errdefs.ErrInvalidArgument)
			}
			if s.Annotations == nil {
				s.Annotations = make(map[string]string, len(m))
			}
			s.Annotations[k] = v
		}
		return nil
	}
}

// Rootfs sets the root file system's path; one that is not absolute is below the bundle.
func Rootfs(dir string) Option {
	return func(s *specs.Spec) error {
		if dir == "" || strings.ContainsRune(dir, 0) {
			return fmt.Errorf("root file system %q is no path: %w", dir, errdefs.ErrInvalidArgument)
		}
		root(s).Path = path.Clean(dir)
		return nil
	}
}

// ReadonlyRootfs makes the root file system read-only for the container.
func ReadonlyRootfs() Option {
	return func(s *specs.Spec) error {
		root(s).Readonly = true
		return nil
	}
}

// CgroupsPath sets the cgroup: an absolute path below each hierarchy's mount, or systemd's "slice:prefix:name".
func CgroupsPath(p string) Option {
	return func(s *specs.Spec) error {
		systemd := strings.Count(p, ":") == 2 && !strings.HasPrefix(p, "/") && !strings.HasSuffix(p, ":")
		if strings.ContainsRune(p, 0) || !systemd && (!path.IsAbs(p) || path.Clean(p) == "/") {
			return fmt.Errorf("cgroup %q is neither an absolute path nor SLICE:PREFIX:NAME: %w", p, errdefs.ErrInvalidArgument)
		}
		if !systemd {
			p = path.Clean(p)
		}
		linux(s).CgroupsPath = p
		return nil
	}
}

// The parts of a spec are pointers, and a spec that came from elsewhere may lack any of them.

func root(s *specs.Spec) *specs.Root {
	if s.Root == nil {
		s.Root = &specs.Root{}
	}
	return s.Root
}

func process(s *specs.Spec) *specs.Process {
	if s.Process == nil {
		s.Process = &specs.Process{Cwd: "/"}
	}
	return s.Process
}

func linux(s *specs.Spec) *specs.Linux {
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	return s.Linux
}

func resources(s *specs.Spec) *specs.LinuxResources {
	l := linux(s)
	if l.Resources == nil {
		l.Resources = &specs.LinuxResources{}
	}
	return l.Resources
}
