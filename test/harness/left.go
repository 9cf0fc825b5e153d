package harness

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

// settling is how long what is ending may take to be gone.
const settling = 5 * time.Second

// Left looks for what the daemon's containers left behind, waiting a moment for what is just going: processes that name
// the daemon's directory or namespace, mounts and loop devices below its directory, bundles, cgroups of its namespace with anything in them.
func (d *Daemon) Left() []string {
	for deadline := time.Now().Add(settling); ; time.Sleep(20 * time.Millisecond) {
		left := append(d.processes(), d.mounts()...)
		left = append(left, d.bundles()...)
		left = append(left, cgroupsOf(d.Namespace)...)
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
	}
}

// Shims gives the pids of the living shims of this daemon.
func (d *Daemon) Shims() []int {
	var pids []int
	d.eachProcess(func(pid int, cmdline []string) {
		if filepath.Base(cmdline[0]) == "shim-runc" {
			pids = append(pids, pid)
		}
	})
	return pids
}

// eachProcess calls fn for every process whose command line names the daemon's directory.
func (d *Daemon) eachProcess(fn func(pid int, cmdline []string)) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		data, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil || !strings.Contains(string(data), d.Dir) || d.cmd != nil && pid == d.cmd.Process.Pid {
			continue
		}
		fn(pid, strings.Split(strings.TrimRight(string(data), "\x00"), "\x00"))
	}
}

func (d *Daemon) processes() (left []string) {
	d.eachProcess(func(pid int, cmdline []string) {
		left = append(left, fmt.Sprintf("process %d: %s", pid, strings.Join(cmdline, " ")))
	})
	return left
}

func (d *Daemon) mounts() (left []string) {
	data, _ := os.ReadFile("/proc/self/mountinfo")
	for _, line := range strings.Split(string(data), "\n") {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], d.Dir+"/") {
			left = append(left, "mount "+f[4])
		}
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range loops {
		if file, _ := os.ReadFile(l); strings.HasPrefix(string(file), d.Dir+"/") {
			left = append(left, "loop device of "+strings.TrimSpace(string(file)))
		}
	}
	return left
}

func (d *Daemon) bundles() (left []string) {
	found, _ := filepath.Glob(filepath.Join(d.State(), "io.containerd.runtime.v2.task", "*", "*"))
	for _, b := range found {
		left = append(left, "bundle "+b)
	}
	found, _ = filepath.Glob(filepath.Join(d.State(), "io.containerd.sandbox.controller.v1.shim", "*", "*"))
	for _, b := range found {
		left = append(left, "bundle of a sandbox "+b)
	}
	sockets, _ := filepath.Glob(filepath.Join(d.State(), "s", "*"))
	for _, s := range sockets {
		left = append(left, "socket "+s)
	}
	return left
}

// hierarchies are the directories in which the cgroup of a namespace may stand: each cgroup v1 controller, v2's root.
func hierarchies() []string {
	all := []string{"/sys/fs/cgroup"}
	entries, _ := os.ReadDir(all[0])
	for _, e := range entries {
		if e.IsDir() {
			all = append(all, filepath.Join(all[0], e.Name()))
		}
	}
	return all
}

// cgroupsOf lists the cgroups below that of a namespace: one a container that is still there.
func cgroupsOf(namespace string) (left []string) {
	for _, h := range hierarchies() {
		entries, _ := os.ReadDir(filepath.Join(h, namespace))
		for _, e := range entries {
			if e.IsDir() {
				left = append(left, "cgroup "+filepath.Join(h, namespace, e.Name()))
			}
		}
	}
	return left
}

// removeCgroups removes the cgroup of a namespace, which stays when its containers are gone.
func removeCgroups(namespace string) error {
	var errs []error
	for _, h := range hierarchies() {
		if err := os.Remove(filepath.Join(h, namespace)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
