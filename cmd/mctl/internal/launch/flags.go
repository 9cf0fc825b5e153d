// Package launch makes containers: what `run` and `containers create` share. Flags become an OCI spec, a snapshot of the
// image's layers, and the container's record.
package launch

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"

	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/spec"
)

// Flags are those that describe a container.
type Flags struct {
	Runtime, Snapshotter string
	TTY                  bool
	Rootfs               bool // the image is a directory
	Config               string
	Sandbox              string // whose namespaces to join
	Labels               []string

	runcRoot                                        string
	runcSystemd                                     bool
	env, envFiles, mounts, devices, capAdd, capDrop []string
	rlimits, annotations, withNS                    []string
	cwd, user, hostname, memory, cgroup             string
	seccomp, seccompProfile                         string
	netHost, privileged, readOnly, newPrivs         bool
	cpus                                            float64
	cpuShares                                       uint64
	pids                                            int64
}

// Add adds the flags to a command's.
func (f *Flags) Add(fs *pflag.FlagSet) {
	fs.StringVar(&f.Runtime, "runtime", "io.containerd.runc.v2", "`name` or absolute path of the runtime")
	fs.StringVar(&f.Snapshotter, "snapshotter", "", "`name` of the snapshotter (default: the namespace's, or overlayfs)")
	fs.BoolVarP(&f.TTY, "tty", "t", false, "give the process a terminal")
	fs.BoolVar(&f.Rootfs, "rootfs", false, "IMAGE is a directory with a root file system")
	fs.StringVarP(&f.Config, "config", "c", "", "OCI spec `file` to use as it is; then there is no IMAGE")
	fs.StringArrayVar(&f.Labels, "label", nil, "label `KEY=VALUE` for the container")

	fs.StringArrayVarP(&f.env, "env", "e", nil, "environment `KEY=VALUE`; KEY alone takes the value it has here")
	fs.StringArrayVar(&f.envFiles, "env-file", nil, "`file` of KEY=VALUE lines")
	fs.StringVar(&f.cwd, "cwd", "", "working `directory`")
	fs.StringVarP(&f.user, "user", "u", "", "`USER[:GROUP]`, names or numbers")
	fs.StringVar(&f.hostname, "hostname", "", "host `name`")
	fs.StringArrayVar(&f.mounts, "mount", nil, "`type=bind,src=/tmp,dst=/host,options=rbind:ro`")
	fs.BoolVar(&f.readOnly, "read-only", false, "make the root file system read-only")
	fs.BoolVar(&f.netHost, "net-host", false, "stay in the host's network")
	fs.StringArrayVar(&f.withNS, "with-ns", nil, "join a namespace: `TYPE:PATH` (network, pid, mount, ipc, uts, user, cgroup)")
	fs.StringVar(&f.Sandbox, "sandbox", "", "be a member of this sandbox: share its namespaces and /dev/shm (`ID`)")
	fs.StringArrayVar(&f.annotations, "annotation", nil, "OCI annotation `KEY=VALUE`")

	fs.StringVarP(&f.memory, "memory-limit", "m", "", "memory in `bytes`, or as 64MiB")
	fs.Float64Var(&f.cpus, "cpus", 0, "processors' worth of CPU `time`")
	fs.Uint64Var(&f.cpuShares, "cpu-shares", 0, "`weight` of CPU time, 1024 being usual")
	fs.Int64Var(&f.pids, "pids-limit", 0, "`number` of processes and threads, -1: any")
	fs.StringArrayVar(&f.rlimits, "rlimit", nil, "resource limit `NAME=SOFT:HARD`")
	fs.StringVar(&f.cgroup, "cgroup", "", "`path` of the cgroup")

	fs.BoolVar(&f.privileged, "privileged", false, "take the fences away: all capabilities and devices")
	fs.StringArrayVar(&f.capAdd, "cap-add", nil, "`capability` to add, or ALL")
	fs.StringArrayVar(&f.capDrop, "cap-drop", nil, "`capability` to drop, or ALL")
	fs.StringArrayVar(&f.devices, "device", nil, "`path` of a device of the host's to give")
	fs.BoolVar(&f.newPrivs, "allow-new-privs", false, "let set-user-id programs and the like gain privileges")
	fs.StringVar(&f.seccomp, "seccomp", "", "filter system calls: `PROFILE` is a file, unconfined, or default")
	fs.Lookup("seccomp").NoOptDefVal = "default"
	fs.StringVar(&f.seccompProfile, "seccomp-profile", "", "the same as --seccomp=`FILE`")

	fs.StringVar(&f.runcRoot, "runc-root", "", "`directory` of the runtime's state")
	fs.BoolVar(&f.runcSystemd, "runc-systemd-cgroup", false, "let systemd make the cgroup")
}

// Validate finds what can be known to be wrong before anything is asked of anybody.
func (f *Flags) Validate() error {
	if f.Config != "" && f.Rootfs {
		return fmt.Errorf("--config and --rootfs exclude each other: the root file system is in the config")
	}
	if _, err := KeyValues(f.Labels); err != nil {
		return fmt.Errorf("--label: %w", err)
	}
	if _, err := KeyValues(f.annotations); err != nil {
		return fmt.Errorf("--annotation: %w", err)
	}
	if f.memory != "" {
		if n, err := units.RAMInBytes(f.memory); err != nil || n < 0 {
			return fmt.Errorf("--memory-limit %q is no number of bytes, as 67108864 or 64MiB", f.memory)
		}
	}
	for _, m := range f.mounts {
		if _, err := spec.ParseMount(m); err != nil {
			return fmt.Errorf("--mount: %w", err)
		}
	}
	for _, r := range f.rlimits {
		if _, err := spec.ParseRlimit(r); err != nil {
			return fmt.Errorf("--rlimit: %w", err)
		}
	}
	for _, n := range f.withNS {
		if _, err := parseNamespace(n); err != nil {
			return fmt.Errorf("--with-ns: %w", err)
		}
	}
	return nil
}

// KeyValues reads KEY=VALUE pairs.
func KeyValues(pairs []string) (map[string]string, error) {
	m := map[string]string{}
	for _, p := range pairs {
		k, v, ok := strings.Cut(p, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("%q is not KEY=VALUE: %w", p, errdefs.ErrInvalidArgument)
		}
		m[k] = v
	}
	return m, nil
}

// options are what the flags say about a spec. Size is that of the terminal, if known.
func (f *Flags) options(image *ocispec.ImageConfig, args []string, width, height uint) ([]spec.Option, error) {
	env, err := f.environment()
	if err != nil {
		return nil, err
	}
	annotations, err := KeyValues(f.annotations)
	if err != nil {
		return nil, err
	}
	opts := []spec.Option{spec.Image(image, args), spec.Env(env...), spec.Annotations(annotations)}
	add := func(given bool, o func() spec.Option) {
		if given {
			opts = append(opts, o())
		}
	}
	var mounts []specs.Mount
	for _, text := range f.mounts {
		m, err := spec.ParseMount(text)
		if err != nil {
			return nil, err
		}
		mounts = append(mounts, m)
	}
	add(f.TTY, func() spec.Option { return spec.Terminal(width, height) })
	add(f.cwd != "", func() spec.Option { return spec.Cwd(f.cwd) })
	add(f.hostname != "", func() spec.Option { return spec.Hostname(f.hostname) })
	add(f.readOnly, spec.ReadonlyRootfs)
	add(f.cgroup != "", func() spec.Option { return spec.CgroupsPath(f.cgroup) })
	add(f.privileged, spec.Privileged)
	add(len(mounts) > 0, func() spec.Option { return spec.Mounts(mounts...) })
	add(f.netHost, spec.HostNetwork)
	for _, n := range f.withNS {
		ns, err := parseNamespace(n)
		if err != nil {
			return nil, err
		}
		opts = append(opts, join(ns))
	}
	add(len(f.capAdd)+len(f.capDrop) > 0, func() spec.Option { return spec.Capabilities(f.capAdd, f.capDrop) })
	for _, d := range f.devices {
		opts = append(opts, spec.Device(d))
	}
	if f.memory != "" {
		n, err := units.RAMInBytes(f.memory)
		if err != nil {
			return nil, err
		}
		opts = append(opts, spec.MemoryLimit(uint64(n)))
	}
	add(f.cpus != 0, func() spec.Option { return spec.CPUs(f.cpus) })
	add(f.cpuShares != 0, func() spec.Option { return spec.CPUShares(f.cpuShares) })
	add(f.pids != 0, func() spec.Option { return spec.PidsLimit(f.pids) })
	add(len(f.rlimits) > 0, func() spec.Option { return spec.Rlimits(f.rlimits...) })
	add(f.newPrivs, func() spec.Option { return spec.NoNewPrivileges(false) })
	// The profile depends on the capabilities.
	add(f.seccomp != "", func() spec.Option { return spec.Seccomp(f.seccomp) })
	add(f.seccompProfile != "", func() spec.Option { return spec.Seccomp(f.seccompProfile) })
	return opts, nil
}

// environment is that of the files, then that of the flags, so that the latter win.
func (f *Flags) environment() (all []string, err error) {
	add := func(e string) {
		if !strings.Contains(e, "=") {
			v, ok := os.LookupEnv(e)
			if !ok {
				return
			}
			e += "=" + v
		}
		all = append(all, e)
	}
	for _, name := range f.envFiles {
		file, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("cannot read --env-file: %w", err)
		}
		lines := bufio.NewScanner(file)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			if l := strings.TrimLeft(lines.Text(), " \t"); l != "" && l[0] != '#' {
				add(l)
			}
		}
		_ = file.Close()
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("cannot read --env-file %s: %w", name, err)
		}
	}
	for _, e := range f.env {
		add(e)
	}
	return all, nil
}

// parseNamespace reads TYPE:PATH.
func parseNamespace(s string) (specs.LinuxNamespace, error) {
	kind, path, ok := strings.Cut(s, ":")
	switch t := specs.LinuxNamespaceType(kind); t {
	case specs.NetworkNamespace, specs.PIDNamespace, specs.MountNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.UserNamespace, specs.CgroupNamespace:
		if ok && filepath.IsAbs(path) {
			return specs.LinuxNamespace{Type: t, Path: path}, nil
		}
	}
	return specs.LinuxNamespace{}, fmt.Errorf("%q is not TYPE:PATH, TYPE one of network, pid, mount, ipc, uts, user, cgroup, PATH absolute: %w", s, errdefs.ErrInvalidArgument)
}

// join puts the container into an existing namespace.
func join(ns specs.LinuxNamespace) spec.Option {
	return func(s *specs.Spec) error {
		if s.Linux == nil {
			s.Linux = &specs.Linux{}
		}
		for i, have := range s.Linux.Namespaces {
			if have.Type == ns.Type {
				s.Linux.Namespaces[i] = ns
				return nil
			}
		}
		s.Linux.Namespaces = append(s.Linux.Namespaces, ns)
		return nil
	}
}

// readSpec reads --config.
func readSpec(file string) (*specs.Spec, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("cannot read --config: %w", err)
	}
	var s specs.Spec
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("%s is no OCI spec: %w", file, err)
	}
	if s.Root != nil && s.Root.Path != "" && !filepath.IsAbs(s.Root.Path) {
		return nil, fmt.Errorf("%s: root.path %q is not absolute: no bundle stands around it", file, s.Root.Path)
	}
	return &s, nil
}

// Arguments splits a command line: IMAGE ID [ARG...], or with --config ID alone.
func (f *Flags) Arguments(given []string) (image, id string, args []string, err error) {
	switch {
	case f.Config != "" && len(given) == 1:
		id = given[0]
	case f.Config != "":
		return "", "", nil, fmt.Errorf("with --config only the ID is given, %d arguments are too many or too few", len(given))
	case len(given) < 2:
		return "", "", nil, fmt.Errorf("IMAGE and ID are needed")
	default:
		image, id, args = given[0], given[1], given[2:]
	}
	if err := identifiers.Validate(id); err != nil {
		return "", "", nil, fmt.Errorf("container id: %w", err)
	}
	return image, id, args, nil
}
