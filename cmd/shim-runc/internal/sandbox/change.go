package sandbox

import (
	"reflect"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Change is what is to be done to a sandbox that is there.
type Change struct {
	Hostname string // empty: none
	Sysctl   map[string]string
	Limits   *specs.LinuxResources // nil: none
	Spec     *specs.Spec           // what follows, as Plan.Carried has it
}

// Compare says what leads from now, a spec as Carried gave it, to want, in the client's words. InvalidArgument for what cannot
// be changed: the namespaces, and what they were made with.
func Compare(now, want *specs.Spec) (*Change, error) {
	p, err := Read(want, "", nil)
	if err != nil {
		return nil, err
	}
	var held []string
	for _, ns := range now.Linux.Namespaces {
		held = append(held, string(ns.Type))
	}
	switch {
	case !reflect.DeepEqual(held, p.Kinds()):
		return nil, invalid("its namespaces are %v, and cannot become %v", held, p.Kinds())
	case now.Linux.CgroupsPath != want.Linux.CgroupsPath:
		return nil, invalid("linux.cgroupsPath %q cannot become %q", now.Linux.CgroupsPath, want.Linux.CgroupsPath)
	case now.Domainname != want.Domainname:
		return nil, invalid("domainname %q cannot become %q", now.Domainname, want.Domainname)
	case now.Hostname != want.Hostname && want.Hostname == "":
		return nil, invalid("hostname %q cannot be taken away", now.Hostname)
	case !same(now.Linux.UIDMappings, want.Linux.UIDMappings) || !same(now.Linux.GIDMappings, want.Linux.GIDMappings):
		return nil, invalid("linux.uidMappings and linux.gidMappings cannot be changed")
	}
	c := &Change{Sysctl: map[string]string{}}
	if now.Hostname != want.Hostname {
		c.Hostname = want.Hostname
	}
	for name, value := range want.Linux.Sysctl {
		if old, ok := now.Linux.Sysctl[name]; !ok || old != value {
			c.Sysctl[name] = value
		}
	}
	if want.Linux.Resources != nil && !reflect.DeepEqual(now.Linux.Resources, want.Linux.Resources) {
		c.Limits = want.Linux.Resources
	}
	next, linux := *now, *now.Linux
	next.Linux, next.Hostname, linux.Sysctl, linux.Resources = &linux, want.Hostname, want.Linux.Sysctl, want.Linux.Resources
	c.Spec = &next
	return c, nil
}

func same(a, b []specs.LinuxIDMapping) bool {
	return len(a) == 0 && len(b) == 0 || reflect.DeepEqual(a, b)
}

// Apply does what is to be done in the namespaces.
func (c *Change) Apply(bundle string) error {
	if c.Hostname != "" {
		if err := SetHostname(bundle, c.Hostname); err != nil {
			return err
		}
	}
	return SetSysctls(bundle, c.Sysctl)
}
