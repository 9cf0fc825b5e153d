package cgroups

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/cgroups/v3/cgroup1"
)

// loadV1 is the cgroup with the given directories, which are there, by their controllers.
//
// The library would look the hierarchies up in /proc/self/mountinfo. A read of that can miss lines while others mount,
// which under load happens; where they are is known.
func loadV1(dirs map[string]string) (*Cgroup, error) {
	v1, err := cgroup1.Load(func(name cgroup1.Name) (string, error) {
		rel, err := filepath.Rel(Root, dirs[string(name)])
		if err != nil || strings.HasPrefix(rel, "..") {
			return "", cgroup1.ErrControllerNotActive
		}
		_, path, _ := strings.Cut(rel, "/")
		return "/" + path, nil
	}, cgroup1.WithHierarchy(hierarchy), func(c *cgroup1.InitConfig) error {
		c.InitCheck = cgroup1.AllowAny // we read what there is, and set nothing
		return nil
	})
	if err != nil {
		return nil, err
	}
	c := &Cgroup{v1: v1, path: dirs["memory"]}
	for _, name := range []string{"memory", "freezer", "devices", "cpu", "pids"} {
		if c.any == "" {
			c.any = dirs[name]
		}
	}
	if c.any == "" {
		return nil, cgroup1.ErrCgroupDeleted
	}
	return c, nil
}

// hierarchy has the controllers of v1 that this machine has, by the directories below Root.
func hierarchy() ([]cgroup1.Subsystem, error) {
	all := []cgroup1.Subsystem{
		cgroup1.NewNamed(Root, "systemd"), cgroup1.NewFreezer(Root), cgroup1.NewPids(Root), cgroup1.NewNetCls(Root),
		cgroup1.NewNetPrio(Root), cgroup1.NewPerfEvent(Root), cgroup1.NewCpuset(Root), cgroup1.NewCpu(Root),
		cgroup1.NewCpuacct(Root), cgroup1.NewMemory(Root), cgroup1.NewBlkio(Root), cgroup1.NewRdma(Root), cgroup1.NewDevices(Root),
	}
	if h, err := cgroup1.NewHugetlb(Root); err == nil {
		all = append(all, h)
	}
	return slices.DeleteFunc(all, func(s cgroup1.Subsystem) bool {
		_, err := os.Stat(filepath.Join(Root, string(s.Name())))
		return err != nil
	}), nil
}

// findDir is the directory of a controller for the path that /proc/PID/cgroup has; empty when there is none. Inside a
// container without a cgroup namespace only the end of the path is visible: that part which holds the process. And of a
// process that is ending the kernel says that it is in the root, which must not be taken for its cgroup.
func findDir(controller, path string, pid int) string {
	dir := filepath.Join(Root, controller, path)
	if path != "/" {
		if _, err := os.Stat(dir); err == nil {
			return dir
		}
	} else if holds(dir, pid) {
		return dir
	}
	for rest := strings.TrimPrefix(path, "/"); ; {
		var more bool
		if _, rest, more = strings.Cut(rest, "/"); !more {
			return ""
		}
		if dir := filepath.Join(Root, controller, rest); holds(dir, pid) {
			return dir
		}
	}
}

// holds says whether a living process is in a cgroup.
func holds(dir string, pid int) bool {
	procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	return err == nil && slices.Contains(strings.Fields(string(procs)), strconv.Itoa(pid))
}
