// Package cgroups reads what the kernel counts for a container's cgroup, watches it for OOM kills, and ends everything in
// it, on cgroup v1, v2 and the hybrid of both. It knows nothing of containers beyond the pid it is given.
package cgroups

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// Root is where the hierarchies are mounted.
const Root = "/sys/fs/cgroup"

// Cgroup is one cgroup: one directory on v2, one per controller on v1. It holds no descriptors.
type Cgroup struct {
	v1   cgroup1.Cgroup
	v2   *cgroup2.Manager
	path string // v2: the directory; v1: the memory controller's, empty without it
	any  string // a directory that is there as long as the cgroup is
}

// Load finds the cgroup that process pid is in. NotFound when the process or its cgroup has gone.
func Load(pid int) (*Cgroup, error) {
	fail := func(err error) (*Cgroup, error) {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, cgroup1.ErrCgroupDeleted) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
		return nil, fmt.Errorf("cannot load cgroup of process %d: %w", pid, err)
	}
	if cgroups.Mode() == cgroups.Unified {
		group, err := cgroup2.PidGroupPath(pid)
		if err != nil {
			return fail(err)
		}
		m, err := cgroup2.Load(group)
		if err != nil {
			return fail(err)
		}
		dir := filepath.Join(Root, group)
		return &Cgroup{v2: m, path: dir, any: dir}, nil
	}
	paths, err := cgroup1.ParseCgroupFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return fail(err)
	}
	dirs := map[string]string{}
	for name, path := range paths {
		name = strings.TrimPrefix(name, "name=")
		if dir := findDir(name, path, pid); name != "" && dir != "" {
			dirs[name] = dir
		}
	}
	c, err := loadV1(dirs)
	if err != nil {
		return fail(err)
	}
	return c, nil
}

// At is the cgroup with the given directories, one per controller on v1, the one under the empty name on v2: for a cgroup
// that has no process any more. NotFound when it has gone.
func At(dirs map[string]string) (*Cgroup, error) {
	fail := func(err error) (*Cgroup, error) {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, cgroup1.ErrCgroupDeleted) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
		return nil, fmt.Errorf("cannot load cgroup: %w", err)
	}
	if cgroups.Mode() == cgroups.Unified {
		dir := dirs[""]
		if _, err := os.Stat(dir); err != nil {
			return fail(err)
		}
		m, err := cgroup2.Load(strings.TrimPrefix(dir, Root))
		if err != nil {
			return fail(err)
		}
		return &Cgroup{v2: m, path: dir, any: dir}, nil
	}
	there := map[string]string{}
	for name, dir := range dirs {
		if _, err := os.Stat(dir); err == nil {
			there[name] = dir
		}
	}
	c, err := loadV1(there)
	if err != nil {
		return fail(err)
	}
	return c, nil
}

// Stats reads the counters: a cgroup1/stats.Metrics or a cgroup2/stats.Metrics of github.com/containerd/cgroups/v3,
// whose fields say their units. A controller that cannot be read is left out.
func (c *Cgroup) Stats() (proto.Message, error) {
	if c.v2 != nil {
		m, err := c.v2.Stat()
		if err != nil {
			return nil, fmt.Errorf("cannot read cgroup %s: %w", c.path, err)
		}
		return m, nil
	}
	m, err := c.v1.Stat(cgroup1.IgnoreNotExist)
	if err != nil {
		return nil, fmt.Errorf("cannot read cgroup %s: %w", c.any, err)
	}
	return m, nil
}

// OOMKills is how many processes of the cgroup the kernel has killed for want of memory (memory.events on v2,
// memory.oom_control on v1).
func (c *Cgroup) OOMKills() (uint64, error) {
	if c.path == "" {
		return 0, fmt.Errorf("no memory controller: %w", errdefs.ErrUnavailable)
	}
	name := "memory.events"
	if c.v1 != nil {
		name = "memory.oom_control"
	}
	data, err := os.ReadFile(filepath.Join(c.path, name))
	if err != nil {
		return 0, err
	}
	for _, line := range strings.Split(string(data), "\n") {
		if v, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strconv.ParseUint(strings.TrimSpace(v), 10, 64)
		}
	}
	return 0, fmt.Errorf("no oom_kill in %s: %w", name, errdefs.ErrNotImplemented)
}

// settling is how long after an event the counter is read again and again: version 1 tells before it kills, and of several
// kills at once.
const settling = time.Second

// WatchOOM calls fn with the count of OOM kills, when there have been any, and each time it has grown, from one goroutine,
// until ctx ends or the cgroup is removed. It returns when the watch is set up.
func (c *Cgroup) WatchOOM(ctx context.Context, fn func(kills uint64)) error {
	if c.path == "" {
		return fmt.Errorf("cannot watch for OOM: no memory controller: %w", errdefs.ErrUnavailable)
	}
	events, err := c.oomFile()
	if err != nil {
		return fmt.Errorf("cannot watch %s for OOM: %w", c.path, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = events.Close() })
	go func() {
		defer func() {
			stop()
			_ = events.Close()
		}()
		var seen uint64
		var until time.Time // the counter is read again until then
		buf := make([]byte, 4096)
		for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
			kills, err := c.OOMKills()
			if err != nil {
				return // the removal of the cgroup is an event too
			}
			if kills > seen {
				seen = kills
				fn(kills)
			}
			var next time.Time // none: until there is an event
			if now := time.Now(); now.Before(until) {
				next = now.Add(wait)
			}
			_ = events.SetReadDeadline(next)
			switch _, err := events.Read(buf); {
			case errors.Is(err, os.ErrDeadlineExceeded):
			case err != nil:
				return
			case c.v1 != nil:
				until, wait = time.Now().Add(settling), time.Millisecond/2
			}
		}
	}()
	return nil
}

// oomFile gives something that becomes readable when the OOM counters may have changed: an eventfd registered on v1's
// memory.oom_control, an inotify of v2's memory.events.
func (c *Cgroup) oomFile() (*os.File, error) {
	if c.v1 != nil {
		fd, err := c.v1.RegisterMemoryEvent(cgroup1.OOMEvent())
		if err != nil {
			return nil, err
		}
		if err := unix.SetNonblock(int(fd), true); err != nil {
			_ = unix.Close(int(fd))
			return nil, err
		}
		return os.NewFile(fd, "oom-eventfd"), nil
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	if _, err := unix.InotifyAddWatch(fd, filepath.Join(c.path, "memory.events"), unix.IN_MODIFY|unix.IN_DELETE_SELF); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "oom-inotify"), nil
}

// Kill ends every process of the cgroup and of those below it, frozen ones too, and returns when none is left: cgroup.kill
// on v2, SIGKILL until it is empty on v1. DeadlineExceeded names those that do not end by ctx's deadline.
func (c *Cgroup) Kill(ctx context.Context) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		pids, err := c.Pids()
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			return nil
		}
		if c.v2 != nil {
			err = c.v2.Kill()
		} else {
			err = Signal(pids, unix.SIGKILL, c.Pids)
			_ = c.v1.Thaw() // a frozen process dies when it is thawed
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot kill cgroup %s: %w", c.any, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v of cgroup %s do not end: %w", pids, c.any, ctx.Err())
		case <-time.After(wait): // a v1 cgroup tells nobody that it has run empty
		}
	}
}

// Pids lists the processes of the cgroup and of those below it; none when it has gone.
func (c *Cgroup) Pids() ([]int, error) {
	var pids []int
	err := filepath.WalkDir(c.any, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		data, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
				return nil
			}
			return err
		}
		for _, f := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(f); err == nil {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list cgroup %s: %w", c.any, err)
	}
	return pids, nil
}
