package cgroups

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Level says where in the hierarchy the limit is that was hit when the kernel killed for want of memory.
type Level string

// The levels.
const (
	LevelUnknown Level = ""
	LevelOwn     Level = "own"      // the cgroup's own limit
	LevelBelow   Level = "below"    // of one that its processes have made
	LevelAbove   Level = "ancestor" // of one that it is in
	LevelMachine Level = "machine"  // no limit: the machine's memory
)

// Limits watches which cgroup runs into its limit: one, and those that it is in.
//
// On v2 that is what memory.events.local counts as "oom" (Linux 5.2). On v1 it is memory.failcnt, which counts also when the kernel
// found memory after all: there the nearest cgroup that has been at its limit since the last time is taken.
type Limits struct {
	c    *Cgroup
	dirs []string // from the cgroup up to the one below the root
	seen []uint64
	all  uint64 // v2: seen of the cgroup and those below it
}

// Limits begins to watch. Nil where there is no memory controller.
func (c *Cgroup) Limits() *Limits {
	if c == nil || c.path == "" {
		return nil
	}
	top := Root
	if c.v1 != nil {
		top = filepath.Join(Root, "memory")
	}
	l := &Limits{c: c}
	for dir := c.path; dir != top && strings.HasPrefix(dir, top+"/"); dir = filepath.Dir(dir) {
		l.dirs = append(l.dirs, dir)
	}
	l.seen = make([]uint64, len(l.dirs))
	l.Hit()
	return l
}

// Hit says which limit has been hit since it was last called, and of which cgroup, as a path below the root of the hierarchy.
func (l *Limits) Hit() (level Level, path string) {
	if l == nil {
		return LevelUnknown, ""
	}
	level = LevelMachine
	for i, dir := range l.dirs {
		n, ok := l.count(dir)
		if !ok {
			if i == 0 {
				return LevelUnknown, "" // it has gone, or the kernel does not tell
			}
			continue
		}
		if n > l.seen[i] && level == LevelMachine {
			if level = LevelAbove; i == 0 {
				level = LevelOwn
			}
			path = l.name(dir)
		}
		l.seen[i] = n
	}
	if l.c.v2 != nil {
		all, _ := counter(filepath.Join(l.c.path, "memory.events"), "oom ")
		if all > l.all && level != LevelOwn {
			level, path = LevelBelow, l.name(l.c.path)
		}
		l.all = all
	}
	return level, path
}

func (l *Limits) name(dir string) string {
	rest := strings.TrimPrefix(dir, Root)
	if l.c.v1 != nil {
		rest = strings.TrimPrefix(rest, "/memory")
	}
	return rest
}

func (l *Limits) count(dir string) (uint64, bool) {
	if l.c.v2 != nil {
		return counter(filepath.Join(dir, "memory.events.local"), "oom ")
	}
	return counter(filepath.Join(dir, "memory.failcnt"), "")
}

// counter reads the number behind name, at the beginning of a line.
func counter(file, name string) (uint64, bool) {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, name); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}
