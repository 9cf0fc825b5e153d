package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// cgroup is NAMESPACE/daemon in the cgroup v2 hierarchy, be it the only one or the one that stands beside v1. A daemon in
// it, its shims, and the containers' processes (those of v2 are in NAMESPACE/ID) are counted together. Empty where there
// is no v2: CPU time is not measured then.
type cgroup string

func newCgroup(namespace string) (cgroup, error) {
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err != nil {
			continue
		}
		dir := filepath.Join(root, namespace)
		return cgroup(dir), os.MkdirAll(filepath.Join(dir, "daemon"), 0o755)
	}
	return "", nil
}

// enter moves a process in; what it forks follows.
func (c cgroup) enter(pid int) error {
	if c == "" {
		return nil
	}
	return os.WriteFile(filepath.Join(string(c), "daemon", "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
}

// used is the CPU time so far.
func (c cgroup) used() (time.Duration, error) {
	if c == "" {
		return 0, nil
	}
	data, err := os.ReadFile(filepath.Join(string(c), "cpu.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, "usage_usec "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			return time.Duration(n) * time.Microsecond, err
		}
	}
	return 0, fmt.Errorf("%s/cpu.stat has no usage_usec", c)
}

// remove removes the inner group; the outer one is removed with those that the containers had.
func (c cgroup) remove() error {
	if c == "" {
		return nil
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := os.Remove(filepath.Join(string(c), "daemon"))
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if time.Now().After(deadline) { // what ends there takes a moment to be gone
			return err
		}
	}
}
