package cgroups

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// dirs are the directories of the cgroup path, as seen from the root of each hierarchy, there or not.
func dirs(path string) (map[string]string, error) {
	path = filepath.Join("/", path) // no way out by ".."
	if path == "/" {
		return nil, fmt.Errorf("the root is nobody's cgroup: %w", errdefs.ErrInvalidArgument)
	}
	if cgroups.Mode() == cgroups.Unified {
		return map[string]string{"": filepath.Join(Root, path)}, nil
	}
	subsystems, err := hierarchy()
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, s := range subsystems {
		out[string(s.Name())] = filepath.Join(Root, string(s.Name()), path)
	}
	return out, nil
}

// AtPath is the cgroup of that name in each hierarchy. NotFound when there is none.
func AtPath(path string) (*Cgroup, error) {
	d, err := dirs(path)
	if err != nil {
		return nil, err
	}
	return At(d)
}

// Make makes the cgroup path, with limits (nil: none); processes and cgroups below it come later. AlreadyExists when there is
// one, in any hierarchy.
func Make(path string, limits *specs.LinuxResources) (*Cgroup, error) {
	d, err := dirs(path)
	if err != nil {
		return nil, err
	}
	for _, dir := range d {
		if _, err := os.Stat(dir); err == nil {
			return nil, fmt.Errorf("cgroup %s: %w", path, errdefs.ErrAlreadyExists)
		}
	}
	if limits == nil {
		limits = &specs.LinuxResources{}
	}
	path = filepath.Join("/", path)
	if cgroups.Mode() == cgroups.Unified {
		_, err = cgroup2.NewManager(Root, path, cgroup2.ToResources(limits))
	} else {
		_, err = cgroup1.New(cgroup1.StaticPath(path), limits, cgroup1.WithHierarchy(hierarchy))
	}
	if err == nil {
		var c *Cgroup
		if c, err = At(d); err == nil {
			return c, nil
		}
	}
	return nil, errors.Join(fmt.Errorf("cannot make cgroup %s: %w", path, err), Remove(path))
}

// Limit changes the limits of a cgroup.
func (c *Cgroup) Limit(limits *specs.LinuxResources) error {
	var err error
	if c.v2 != nil {
		err = c.v2.Update(cgroup2.ToResources(limits))
	} else {
		err = c.v1.Update(limits)
	}
	if err != nil {
		return fmt.Errorf("cannot set the limits of cgroup %s: %w", c.any, err)
	}
	return nil
}

// Remove removes the cgroup path, with the empty ones below it; one that is not there is no error.
func Remove(path string) error {
	d, err := dirs(path)
	if err != nil {
		return err
	}
	if cgroups.Mode() != cgroups.Unified { // what was made below it may be in hierarchies that we do not use
		all, err := filepath.Glob(Root + "/*")
		if err != nil {
			return err
		}
		for _, hierarchy := range all {
			d[filepath.Base(hierarchy)] = filepath.Join(hierarchy, path)
		}
	}
	var errs []error
	for _, dir := range d {
		var below []string
		_ = filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				below = append(below, p)
			}
			return nil
		})
		slices.Sort(below)
		for _, p := range slices.Backward(below) {
			if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
