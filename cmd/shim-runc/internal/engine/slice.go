package engine

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/coreos/go-systemd/v22/unit"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/cgroups/systemd"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Slice is a transient slice of systemd: the cgroup of what has no process of its own, which a scope would need. Its name follows
// from linux.cgroupsPath in the form slice:prefix:name: NAME if that is a slice below SLICE, or else a slice of that name below it.
type Slice struct {
	unit   string
	config *cgroups.Cgroup
}

// IsSlice says whether linux.cgroupsPath is in systemd's form.
func IsSlice(cgroupsPath string) bool { return strings.Contains(cgroupsPath, ":") }

// NewSlice reads which slice the spec means, and its limits; nothing is made. InvalidArgument for a path that is none.
func NewSlice(cgroupsPath string, limits *specs.LinuxResources) (*Slice, error) {
	invalid := func(why string) (*Slice, error) {
		return nil, fmt.Errorf("linux.cgroupsPath %q: %s: %w", cgroupsPath, why, errdefs.ErrInvalidArgument)
	}
	parts := strings.Split(cgroupsPath, ":")
	if len(parts) != 3 || parts[2] == "" {
		return invalid("systemd's form is slice:prefix:name")
	}
	parent, prefix, name := parts[0], parts[1], parts[2]
	if parent == "" {
		parent = "system.slice"
	}
	above, is := strings.CutSuffix(parent, ".slice")
	if _, err := systemd.ExpandSlice(parent); err != nil || !is {
		return invalid(fmt.Sprintf("%q is not the name of a slice", parent))
	}
	if above == "-" {
		above = ""
	} else {
		above += "-"
	}
	if !strings.HasSuffix(name, ".slice") || !strings.HasPrefix(name, above) {
		name = strings.TrimPrefix(prefix+"."+strings.TrimSuffix(name, ".slice"), ".")
		name = above + unit.UnitNameEscape(name) + ".slice"
	}
	if _, err := systemd.ExpandSlice(name); err != nil {
		return invalid(fmt.Sprintf("%q is not the name of a slice", name))
	}
	config, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{UseSystemdCgroup: true, Spec: &specs.Spec{
		Linux: &specs.Linux{CgroupsPath: parent + ":" + prefix + ":" + name, Resources: limits},
	}}, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	config.SkipDevices = true // a slice has no processes; its containers have their rules
	return &Slice{unit: name, config: config}, nil
}

// Path is where the slice is in each hierarchy.
func (s *Slice) Path() string {
	path, _ := systemd.ExpandSlice(s.unit) // NewSlice has looked
	return path
}

// Make has systemd make the slice with its limits. FailedPrecondition where there is no systemd.
func (s *Slice) Make() error {
	m, err := s.manager()
	if err != nil {
		return err
	}
	if err := m.Apply(-1); err != nil {
		return fmt.Errorf("cannot make slice %s: %w", s.unit, err)
	}
	return s.set(m)
}

// Limit sets the limits.
func (s *Slice) Limit() error {
	m, err := s.manager()
	if err != nil {
		return err
	}
	return s.set(m)
}

func (s *Slice) set(m cgroups.Manager) error {
	if err := m.Set(s.config.Resources); err != nil {
		return fmt.Errorf("cannot set the limits of slice %s: %w", s.unit, err)
	}
	return nil
}

// Remove has systemd stop the slice, with what is in it. One that is not there is no error.
func (s *Slice) Remove() error {
	m, err := s.manager()
	if err != nil {
		return err
	}
	if err := m.Destroy(); err != nil {
		return fmt.Errorf("cannot remove slice %s: %w", s.unit, err)
	}
	return nil
}

func (s *Slice) manager() (cgroups.Manager, error) {
	if !systemd.IsRunningSystemd() {
		return nil, fmt.Errorf("slice %s needs systemd, which does not run here: %w", s.unit, errdefs.ErrFailedPrecondition)
	}
	return manager.New(s.config)
}
