package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/reaper"
)

const (
	// execPrefix begins the name of an exec's cgroup below the container's: exec-ID, or exec2-ID when there is an exec-ID.
	execPrefix = "exec"
	// sameName is how many cgroups there can be of execs of one name, of which the earlier have left something running.
	sameName = 100
	// treeController is the hierarchy of v1 in which an exec has a cgroup of its own, if it must be possible to kill all of it.
	treeController = "freezer"
	// treeEnds is how long what an exec has begotten may take to end after SIGKILL.
	treeEnds = 10 * time.Second
)

// execCgroup makes a cgroup for an exec, below the container's. On v2 every exec gets one: nothing is limited in it, it is
// there to be counted and killed. On v1 it is made in one hierarchy only, and only for kill. It is empty where there can be none:
// the container's cgroup belongs to somebody else (is delegated), holds threads, or has no room; then the exec joins the
// container's own, as everywhere.
func (c *Container) execCgroup(execID string, kill bool) (dir string, sub map[string]string) {
	controller := ""
	if !cgroups.IsCgroup2UnifiedMode() {
		if controller = treeController; !kill {
			return "", nil
		}
	}
	base := c.cgroupDir(controller)
	var st unix.Stat_t
	if base == "" || unix.Stat(base, &st) != nil || int(st.Uid) != os.Geteuid() {
		return "", nil
	}
	for n := 1; n <= sameName; n++ {
		name := execPrefix + "-" + execID
		if n > 1 {
			name = execPrefix + strconv.Itoa(n) + "-" + execID
		}
		dir := filepath.Join(base, name)
		err := os.Mkdir(dir, 0o755)
		if errors.Is(err, fs.ErrExist) && unix.Rmdir(dir) == nil { // an earlier one's, empty by now
			err = os.Mkdir(dir, 0o755)
		}
		switch {
		case errors.Is(err, fs.ErrExist):
			continue
		case err != nil:
			c.engine.cfg.Log.Debug("an exec has no cgroup of its own", "exec", execID, "error", err)
			return "", nil
		}
		if kind, err := os.ReadFile(filepath.Join(dir, "cgroup.type")); controller == "" && (err != nil || string(bytes.TrimSpace(kind)) != "domain") {
			_ = unix.Rmdir(dir)
			return "", nil
		}
		return dir, map[string]string{controller: name}
	}
	return "", nil
}

// cgroupDir is the container's cgroup in a hierarchy of v1, or with an empty name on v2; empty when there is none.
func (c *Container) cgroupDir(controller string) string {
	c.dirsOnce.Do(func() {
		if lc, err := c.load(); err == nil {
			if st, err := lc.State(); err == nil {
				c.dirs = st.CgroupPaths
			}
		}
	})
	return c.dirs[controller]
}

// execDir finds the cgroup that a running exec was started in; empty when it has none of its own. If another incarnation
// started it, its process knows.
func (c *Container) execDir(execID string, pid int) string {
	c.execs.Lock()
	dir := c.execDirs[execID]
	c.execs.Unlock()
	if dir != "" {
		return dir
	}
	controller := ""
	if !cgroups.IsCgroup2UnifiedMode() {
		controller = treeController
	}
	base := c.cgroupDir(controller)
	paths, err := cgroups.ParseCgroupFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil || base == "" {
		return ""
	}
	_, after, found := strings.Cut(paths[controller], "/"+filepath.Base(base)+"/"+execPrefix)
	if !found {
		return ""
	}
	name, _, _ := strings.Cut(after, "/") // it may have gone on into a cgroup below
	if dir = filepath.Join(base, execPrefix+name); !strings.HasSuffix(name, "-"+execID) {
		return ""
	}
	if _, err := os.Stat(dir); err != nil {
		return ""
	}
	return dir
}

// KillExec kills a process of Exec and all that it has begotten, and returns when none of it is left, or DeadlineExceeded. Where
// the exec has a cgroup of its own, that is all that is in there, also what was made a daemon; else it is its descendants
// whose parents live. On v1, what is frozen ends when it is thawed.
func (c *Container) KillExec(execID string, p *reaper.Process) error {
	dir := c.execDir(execID, p.Pid())
	if dir == "" {
		return KillTree(p)
	}
	ctx, cancel := context.WithTimeout(context.Background(), treeEnds)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		pids, err := cgroups.GetAllPids(dir)
		if err != nil || len(pids) == 0 {
			c.ForgetExec(execID)
			return nil //nolint:nilerr // the cgroup is gone: nothing is left to kill
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err != nil { // v1, or a kernel before 5.14
			for _, pid := range pids {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v of an exec do not end: %w", pids, ctx.Err())
		case <-time.After(wait): // a cgroup tells nobody on v1
		}
	}
}

// ForgetExec removes the cgroup of an exec that has ended. One in which something runs on is removed when a later exec has
// ended, or with the container.
func (c *Container) ForgetExec(execID string) {
	c.execs.Lock()
	defer c.execs.Unlock()
	if dir := c.execDirs[execID]; dir != "" {
		delete(c.execDirs, execID)
		c.left = append(c.left, dir)
	}
	c.left = slices.DeleteFunc(c.left, func(dir string) bool { return !errors.Is(unix.Rmdir(dir), unix.EBUSY) })
}

// findLeft finds the cgroups that another incarnation has made for execs.
func (c *Container) findLeft() {
	for _, controller := range []string{"", treeController} {
		if base := c.cgroupDir(controller); base != "" {
			found, _ := filepath.Glob(filepath.Join(base, execPrefix+"*-*"))
			c.left = append(c.left, found...)
		}
	}
}

// KillTree kills a process and its descendants, as far as their parents live. Each is stopped before its children are looked for, so
// that there will be no more of them.
func KillTree(p *reaper.Process) error {
	all := []int{p.Pid()}
	if err := p.Signal(unix.SIGSTOP); err != nil {
		return nil //nolint:nilerr // it has ended
	}
	for i := 0; i < len(all); i++ {
		for _, child := range children(all[i]) {
			if unix.Kill(child, unix.SIGSTOP) == nil {
				all = append(all, child)
			}
		}
	}
	for _, pid := range all[1:] {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	if err := p.Signal(unix.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// children are those of all threads of a process, which is stopped.
func children(pid int) (out []int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		data, err := os.ReadFile(list)
		if err != nil {
			continue
		}
		for _, f := range strings.Fields(string(data)) {
			if n, err := strconv.Atoi(f); err == nil {
				out = append(out, n)
			}
		}
	}
	return out
}
