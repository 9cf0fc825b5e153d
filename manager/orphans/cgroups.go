package orphans

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/shimapi"
)

// hierarchies gives the mount points of the cgroup hierarchies, by controllers as /proc/PID/cgroup has them; cgroup v2's
// is "".
func hierarchies() map[string]string {
	data, _ := os.ReadFile("/proc/self/mountinfo")
	out := map[string]string{}
	for _, line := range strings.Split(string(data), "\n") {
		f := strings.Fields(line)
		dash := slices.Index(f, "-")
		if dash < 6 || len(f) < dash+4 || f[3] != "/" {
			continue
		}
		switch f[dash+1] {
		case "cgroup2":
			out[""] = unescape(f[4])
		case "cgroup":
			for _, o := range strings.Split(f[dash+3], ",") {
				if o != "rw" && o != "ro" {
					out[o] = unescape(f[4])
				}
			}
		}
	}
	return out
}

// groupsOf gives the directories of the cgroups that a process is in, but for the roots.
func groupsOf(pid int) (out []string) {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	mounts := hierarchies()
	for _, line := range strings.Split(string(data), "\n") {
		f := strings.SplitN(line, ":", 3)
		if len(f) != 3 || f[2] == "/" || strings.HasPrefix(f[2], "/..") {
			continue
		}
		for _, controller := range strings.Split(f[1], ",") {
			if m := mounts[controller]; m != "" {
				out = append(out, filepath.Join(m, f[2]))
				break
			}
		}
	}
	return out
}

// processesIn gives the processes of a cgroup and of those below it.
func processesIn(dir string) (out []int) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil //nolint:nilerr // what is gone has no processes
		}
		data, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		for _, f := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(f); err == nil && !slices.Contains(out, pid) {
				out = append(out, pid)
			}
		}
		return nil
	})
	return out
}

// cgroups finds those that were made for tasks that are not there. One with processes is fixed only when each of them has
// its root below this daemon's directories: another daemon may use the same path.
func (p Places) cgroups() ([]Orphan, error) {
	roots := map[string]bool{}
	for _, m := range hierarchies() {
		roots[m] = true
	}
	var out []Orphan
	for path, tasks := range p.Cgroups {
		path = filepath.Clean("/" + path)
		if slices.ContainsFunc(tasks, p.owned) || strings.Count(path, "/") < 2 {
			continue // and one at the top is hardly a container's alone
		}
		if tasks[0].Sandbox && p.holdsOwned(path) {
			continue // its members go first
		}
		t := tasks[0]
		var dirs []string
		var pids []int
		for m := range roots {
			dir := filepath.Join(m, path)
			if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
				continue
			}
			dirs = append(dirs, dir)
			for _, pid := range processesIn(dir) {
				if !slices.Contains(pids, pid) {
					pids = append(pids, pid)
				}
			}
		}
		if len(dirs) == 0 {
			continue
		}
		slices.Sort(dirs)
		problem, kill, foreign := "it was made for a "+t.kind()+" that is not there", []identity{}, 0
		for _, pid := range pids {
			if ticks, _ := started(pid); ticks != 0 && p.ours(pid) {
				kill = append(kill, identity{pid, ticks})
			} else {
				foreign = pid
			}
		}
		if len(pids) > 0 {
			problem += fmt.Sprintf("; %d processes run in it", len(pids))
		}
		o := New(Cgroup, path, t.String(), problem, func(ctx context.Context) error {
			var errs []error
			for _, i := range kill {
				errs = append(errs, i.kill(ctx))
			}
			if err := errors.Join(errs...); err != nil {
				return err
			}
			for _, dir := range dirs {
				errs = append(errs, removeTree(dir))
			}
			return errors.Join(errs...)
		})
		if foreign != 0 {
			o.Problem += fmt.Sprintf(", and process %d is not provably of this managerd: look at it first", foreign)
			o.Command = fmt.Sprintf("kill %d", foreign)
			o.Fix = func(context.Context) error {
				return fmt.Errorf("process %d in it is not provably one of this managerd; end it yourself", foreign)
			}
		}
		out = append(out, o)
	}
	slices.SortFunc(out, func(a, b Orphan) int { return strings.Compare(a.Object, b.Object) })
	return out, nil
}

// holdsOwned says whether the cgroup of something that is there is below path.
func (p Places) holdsOwned(path string) bool {
	for other, tasks := range p.Cgroups {
		if strings.HasPrefix(filepath.Clean("/"+other), path+"/") && slices.ContainsFunc(tasks, p.owned) {
			return true
		}
	}
	return false
}

// removeSandboxCgroup removes the cgroup that the shim of a sandbox has made, as the bundle's record has it. A slice is systemd's.
func removeSandboxCgroup(path string) error {
	data, err := os.ReadFile(filepath.Join(path, shimapi.SandboxFile))
	if err != nil {
		return nil //nolint:nilerr // none was made, or of a task
	}
	var r shimstate.Sandbox
	if err := r.Unmarshal(data); err != nil || !r.CgroupMade || strings.HasSuffix(r.Cgroup, ".slice") {
		return nil //nolint:nilerr // what it says nobody knows
	}
	var errs []error
	for _, m := range hierarchies() {
		errs = append(errs, removeTree(filepath.Join(m, filepath.Clean("/"+r.Cgroup))))
	}
	return errors.Join(errs...)
}

// ours says whether a process's root directory is stored below this daemon's directories.
func (p Places) ours(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return false
	}
	root, is := "", false
	for _, line := range strings.Split(string(data), "\n") {
		f := strings.Fields(line)
		dash := slices.Index(f, "-")
		if dash < 6 || len(f) < dash+4 || f[4] != "/" {
			continue
		}
		root = unescape(f[3])
		is = false
		for _, dir := range []string{p.Root, p.State} {
			is = is || dir != "" && (strings.HasPrefix(root, dir+"/") || strings.Contains(f[dash+3], "="+dir+"/"))
		}
	}
	return is // by what was mounted last
}
