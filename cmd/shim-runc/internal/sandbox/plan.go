// Package sandbox makes the namespaces that the containers of a sandbox share, and keeps them without a process: each is
// pinned by a bind mount in the sandbox's bundle, so that whoever made it may die. Only a pid namespace needs a process, its
// init; that is this program again (see Child), and does nothing but reap.
//
// What a sandbox is to hold is said in the words of the OCI runtime spec. The package knows neither the API nor containers.
package sandbox

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi"
)

// DefaultShmSize is the size of the shared /dev/shm, in bytes, when the spec does not give one: 64 MiB, as Docker and
// Kubernetes have it.
const DefaultShmSize = 64 << 20

// devShm is where the spec's mounts name the shared memory.
const devShm = "/dev/shm"

// kinds are the namespaces that a sandbox can hold, in the order in which they are pinned.
var kinds = []struct {
	kind specs.LinuxNamespaceType
	flag uintptr
}{
	{specs.UserNamespace, unix.CLONE_NEWUSER}, {specs.NetworkNamespace, unix.CLONE_NEWNET}, {specs.IPCNamespace, unix.CLONE_NEWIPC},
	{specs.UTSNamespace, unix.CLONE_NEWUTS}, {specs.PIDNamespace, unix.CLONE_NEWPID},
}

// Plan is what a sandbox is to hold.
type Plan struct {
	made   map[specs.LinuxNamespaceType]bool
	joined map[specs.LinuxNamespaceType]string // path

	hostname, domainname string
	sysctl               map[string]string
	uids, gids           []specs.LinuxIDMapping
	shm                  bool
	shmSize              uint64
	shmSource            string // somebody else's, that members are to have

	spec *specs.Spec
}

// Read makes a plan of a spec (nil or without a linux section: namespaces of its own for network, ipc and uts). netns, if not
// empty, is the path of the network namespace. What a sandbox cannot hold is refused: InvalidArgument.
func Read(spec *specs.Spec, netns string, annotations map[string]string) (*Plan, error) {
	if spec == nil {
		spec = &specs.Spec{}
	}
	p := &Plan{
		made: map[specs.LinuxNamespaceType]bool{}, joined: map[specs.LinuxNamespaceType]string{},
		hostname: spec.Hostname, domainname: spec.Domainname, shmSize: DefaultShmSize, spec: spec,
	}
	linux := spec.Linux
	if linux == nil {
		linux = &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
		}}
		spec.Linux = linux
	}
	for _, ns := range linux.Namespaces {
		switch {
		case shimapi.NamespaceName(string(ns.Type)) == "":
			return nil, invalid("a sandbox cannot hold a namespace of type %q; each container has its own", ns.Type)
		case p.Holds(ns.Type):
			return nil, invalid("linux.namespaces has %q twice", ns.Type)
		case ns.Path != "":
			p.joined[ns.Type] = ns.Path
		default:
			p.made[ns.Type] = true
		}
	}
	if netns != "" {
		if path := p.joined[specs.NetworkNamespace]; path != "" && path != netns {
			return nil, invalid("the network namespace is %s by the request and %s by the spec", netns, path)
		}
		delete(p.made, specs.NetworkNamespace)
		p.joined[specs.NetworkNamespace] = netns
	}
	for kind, path := range p.joined {
		if kind == specs.PIDNamespace || kind == specs.UserNamespace {
			return nil, invalid("a sandbox makes its %s namespace itself, it cannot hold %s", kind, path)
		}
		if !filepath.IsAbs(path) {
			return nil, invalid("path %q of the %s namespace is not absolute", path, kind)
		}
	}
	if err := p.readRest(spec); err != nil {
		return nil, err
	}
	if len(annotations) > 0 {
		merged := map[string]string{}
		for _, m := range []map[string]string{spec.Annotations, annotations} {
			for k, v := range m {
				merged[k] = v
			}
		}
		spec.Annotations = merged
	}
	return p, nil
}

func (p *Plan) readRest(spec *specs.Spec) error {
	if (p.hostname != "" || p.domainname != "") && !p.made[specs.UTSNamespace] {
		return invalid("hostname and domainname need a uts namespace of the sandbox's own")
	}
	if len(p.hostname) > 64 || len(p.domainname) > 64 { // __NEW_UTS_LEN
		return invalid("hostname and domainname have at most 64 bytes")
	}
	p.uids, p.gids = spec.Linux.UIDMappings, spec.Linux.GIDMappings
	if user := p.made[specs.UserNamespace]; user != (len(p.uids) > 0) || user != (len(p.gids) > 0) {
		return invalid("a user namespace and linux.uidMappings, linux.gidMappings need each other")
	}
	p.sysctl = spec.Linux.Sysctl
	if err := p.checkSysctls(p.sysctl); err != nil {
		return err
	}
	return p.readShm(spec.Mounts)
}

// readShm looks for a mount on /dev/shm: a tmpfs says how large it is to be, a bind that there is one already. No other
// mount means anything to a sandbox.
func (p *Plan) readShm(mounts []specs.Mount) error {
	p.shm = p.made[specs.IPCNamespace]
	for _, m := range mounts {
		if filepath.Clean(m.Destination) != devShm {
			return invalid("mount on %s: a sandbox has no root file system; only %s says something", m.Destination, devShm)
		}
		if m.Type == "bind" || m.Type == "" || m.Type == "none" {
			if !filepath.IsAbs(m.Source) {
				return invalid("source %q of the mount on %s is not an absolute path", m.Source, devShm)
			}
			p.shm, p.shmSource = false, m.Source
			continue
		}
		if m.Type != "tmpfs" {
			return invalid("mount on %s has type %q, must be tmpfs or bind", devShm, m.Type)
		}
		p.shm = true
		for _, o := range m.Options {
			if v, ok := strings.CutPrefix(o, "size="); ok {
				size, err := parseSize(v)
				if err != nil {
					return invalid("mount on %s: option %q is no size", devShm, o)
				}
				p.shmSize = size
			}
		}
	}
	return nil
}

// parseSize reads a size as tmpfs has it: bytes, or with k, m or g.
func parseSize(s string) (uint64, error) {
	shift := 0
	if s != "" {
		if at := strings.IndexByte("kmg", s[len(s)-1]|0x20); at >= 0 {
			shift, s = 10*(at+1), s[:len(s)-1]
		}
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err == nil && (n == 0 || n > 1<<62>>shift) {
		err = strconv.ErrRange
	}
	return n << shift, err
}

// Holds says whether the sandbox has a namespace of a type.
func (p *Plan) Holds(kind specs.LinuxNamespaceType) bool { return p.made[kind] || p.joined[kind] != "" }

// Kinds are the namespaces that are held, in a fixed order.
func (p *Plan) Kinds() (out []string) {
	for _, k := range kinds {
		if p.Holds(k.kind) {
			out = append(out, string(k.kind))
		}
	}
	return out
}

// SharesPID says whether the sandbox has a pid namespace, and so an init.
func (p *Plan) SharesPID() bool { return p.made[specs.PIDNamespace] }

// Shm says whether a tmpfs for /dev/shm is mounted in the bundle.
func (p *Plan) Shm() bool { return p.shm }

// Cgroup is the sandbox's cgroup, as a path or in systemd's form; empty for none.
func (p *Plan) Cgroup() string { return p.spec.Linux.CgroupsPath }

// Resources are the limits of that.
func (p *Plan) Resources() *specs.LinuxResources { return p.spec.Linux.Resources }

// Carried is the spec, as JSON, with what members need: the paths of the namespaces in bundle, and where /dev/shm is.
func (p *Plan) Carried(bundle string) ([]byte, error) {
	out := *p.spec
	linux := *p.spec.Linux
	linux.Namespaces = nil
	for _, k := range p.Kinds() {
		linux.Namespaces = append(linux.Namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(k), Path: Path(bundle, k)})
	}
	out.Linux, out.Mounts = &linux, nil
	if out.Version == "" {
		out.Version = specs.Version
	}
	switch source := p.shmSource; {
	case p.shm:
		source = filepath.Join(bundle, shimapi.ShmDir)
		fallthrough
	case source != "":
		out.Mounts = []specs.Mount{{Destination: devShm, Type: "bind", Source: source, Options: []string{"rbind", "rw"}}}
	}
	return json.Marshal(out)
}

// Path is where a namespace is pinned.
func Path(bundle, kind string) string {
	return filepath.Join(bundle, shimapi.NamespaceDir, shimapi.NamespaceName(kind))
}

// Platform is what the sandbox's containers run on.
func Platform() (os, arch string) { return runtime.GOOS, runtime.GOARCH }

func invalid(format string, a ...any) error {
	return fmt.Errorf(format+": %w", append(a, errdefs.ErrInvalidArgument)...)
}
