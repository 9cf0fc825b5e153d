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
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/shimapi"
)

// ending is how long a process may take to be gone after SIGKILL.
const ending = 10 * time.Second

// leaving is how long shims whose task is gone may take to be gone too.
const leaving = time.Second

// process is a shim of ours, as /proc shows it.
type process struct {
	id      identity
	task    Task
	bundle  string
	deleted bool // the directory in which it works is gone
}

// identity is a process for as long as it lives: its number and when it began.
type identity struct {
	pid   int
	ticks uint64 // field 22 of /proc/PID/stat
}

func (i identity) alive() bool { return bundle.InitAlive(uint32(i.pid), i.ticks) }

// kill ends the process, and no other that has its number by now, and waits until it is gone.
func (i identity) kill(ctx context.Context) error {
	err := bundle.SignalInit(uint32(i.pid), i.ticks, unix.SIGKILL)
	if err != nil && !i.alive() {
		return nil
	}
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(ending); i.alive(); {
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("process %d does not end: %s", i.pid, Stuck(i.pid))
		}
		time.Sleep(5 * time.Millisecond) // it may be nobody's child, of whom nobody is told
	}
	return nil
}

// Stuck says why a process does not end that was killed, as well as those in its cgroup: which of them are in uninterruptible
// sleep, where in the kernel they wait, and the cgroup. If none is, it says that of the process itself.
func Stuck(pid int) string {
	const most = 8
	var out []string
	for _, g := range groupsOf(pid) {
		for _, p := range processesIn(g) {
			if said := waits(p); strings.Contains(said, "state D,") && !slices.Contains(out, said) && len(out) < most {
				out = append(out, said)
			}
		}
	}
	if len(out) == 0 {
		return waits(pid)
	}
	return strings.Join(out, "; ")
}

// waits says in which state a process is, where in the kernel it waits, and in which cgroup it is.
func waits(pid int) string {
	read := func(name string) string {
		data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		return strings.TrimSpace(string(data))
	}
	state := "?"
	if stat := read("stat"); strings.Contains(stat, ")") {
		if f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:]); len(f) > 0 {
			state = f[0]
		}
	}
	groups := strings.Split(read("cgroup"), "\n")
	_, group, _ := strings.Cut(groups[len(groups)-1], "::")
	for _, g := range groups {
		if parts := strings.SplitN(g, ":", 3); len(parts) == 3 && (group == "" || group == "/") {
			group = parts[2]
		}
	}
	return fmt.Sprintf("pid %d, state %s, wchan %s, cgroup %s", pid, state, read("wchan"), group)
}

func started(pid int) (ticks uint64, parent int) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0
	}
	f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(f) < 20 {
		return 0, 0
	}
	ticks, _ = strconv.ParseUint(f[19], 10, 64)
	parent, _ = strconv.Atoi(f[1])
	return ticks, parent
}

// processes finds the shims of ours of this daemon: by their command line, which names the bundle.
func (p Places) processes() (out []process) {
	eachPID(func(pid int) {
		ticks, _ := started(pid) // before the rest is read: a later process of that number is another one
		cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
		if err != nil || ticks == 0 || !strings.HasPrefix(cwd, p.bundleDir(false)+"/") && !strings.HasPrefix(cwd, p.bundleDir(true)+"/") {
			return // no shim of ours works elsewhere; and of strangers nothing is read that may hang with them
		}
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			return
		}
		argv := strings.Split(strings.TrimRight(string(data), "\x00"), "\x00")
		if verb := argv[len(argv)-1]; verb != shimapi.VerbServe && verb != shimapi.VerbAdopt {
			return
		}
		s := process{id: identity{pid, ticks}}
		for i := range len(argv) - 1 {
			switch argv[i] {
			case "-namespace":
				s.task.Namespace = argv[i+1]
			case "-sandbox":
				s.task.Sandbox = true
			case "-id":
				s.task.ID = argv[i+1]
			case "-bundle":
				s.bundle = argv[i+1]
			}
		}
		if s.bundle != filepath.Join(p.bundleDir(s.task.Sandbox), s.task.Namespace, s.task.ID) {
			return
		}
		in, err := os.Stat(fmt.Sprintf("/proc/%d/cwd", pid))
		is, err2 := os.Stat(s.bundle)
		if err != nil {
			return
		}
		s.deleted = err2 != nil || !os.SameFile(in, is)
		out = append(out, s)
	})
	return out
}

func eachPID(fn func(pid int)) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			fn(pid)
		}
	}
}

// shims finds those whose bundle is gone, whose task is not there, or which another keeps.
func (p Places) shims() ([]Orphan, error) {
	var out []Orphan
	deadline := time.Now().Add(leaving)
	for _, s := range p.processes() {
		for (s.deleted || !p.owned(s.task)) && s.id.alive() && time.Now().Before(deadline) {
			time.Sleep(20 * time.Millisecond) // its task was just deleted: it is about to end
		}
		if !s.id.alive() {
			continue
		}
		problem := ""
		switch {
		case s.deleted:
			problem = "its bundle is gone"
		case !p.owned(s.task):
			problem = "there is no such " + s.task.kind()
		default:
			b := &bundle.Bundle{Namespace: s.task.Namespace, ID: s.task.ID, Path: s.bundle, Sandbox: s.task.Sandbox}
			keeper := uint32(0)
			records, _ := b.Ledger() // what can be read of a damaged one counts
			for _, r := range records {
				if r.Header != nil {
					keeper = r.Header.ShimPid
				}
			}
			if keeper == 0 || keeper == uint32(s.id.pid) || !b.Keeps(keeper) {
				continue // it is the one, or is about to be
			}
			problem = fmt.Sprintf("the "+s.task.kind()+" is kept by another shim, process %d", keeper)
		}
		children := []identity{}
		if s.deleted || !p.owned(s.task) {
			children = p.childrenOf(s.id.pid)
		}
		if n := len(children); n > 0 {
			problem += fmt.Sprintf("; %d processes of its %s run", n, map[bool]string{false: "container", true: "sandbox"}[s.task.Sandbox])
		}
		out = append(out, New(Shim, strconv.Itoa(s.id.pid), s.task.String(), problem, func(ctx context.Context) error {
			return p.endShim(ctx, s, children)
		}))
	}
	return out, nil
}

// childrenOf gives the processes that a shim is the parent of: it runs nothing but its container's. The shims of a sandbox's
// members are not the sandbox's.
func (p Places) childrenOf(shim int) (out []identity) {
	shims := p.processes()
	eachPID(func(pid int) {
		if slices.ContainsFunc(shims, func(s process) bool { return s.id.pid == pid }) {
			return
		}
		if ticks, parent := started(pid); parent == shim && ticks != 0 {
			out = append(out, identity{pid, ticks})
		}
	})
	return out
}

// endShim ends an orphaned shim and what it is the parent of, and removes their cgroups when they are empty then.
func (p Places) endShim(ctx context.Context, s process, children []identity) error {
	groups := s.groups(children)
	errs := []error{s.id.kill(ctx)} // first: it would tell, and write, of the others
	for _, c := range children {
		errs = append(errs, c.kill(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return p.Clear(ctx, groups)
}

// groups gives the cgroups of a shim's children that are neither its own nor ours: those are the container's.
func (s process) groups(children []identity) []string {
	var out []string
	not := append(groupsOf(os.Getpid()), groupsOf(s.id.pid)...)
	for _, c := range children {
		for _, g := range groupsOf(c.pid) {
			if !slices.Contains(not, g) && !slices.Contains(out, g) {
				out = append(out, g)
			}
		}
	}
	slices.Sort(out)
	return out
}

// Groups gives the cgroups of the container of a task whose shim lives.
func (p Places) Groups(t Task) (out []string) {
	for _, s := range p.processes() {
		if s.task == t {
			out = append(out, s.groups(p.childrenOf(s.id.pid))...)
		}
	}
	return out
}

// Clear ends what still runs in the cgroups of a container that is gone, and removes them.
func (p Places) Clear(ctx context.Context, groups []string) error {
	var errs []error
	for _, g := range groups {
		for _, pid := range processesIn(g) {
			ticks, _ := started(pid)
			if ticks != 0 && slices.Contains(processesIn(g), pid) { // the number is still that of one of them
				errs = append(errs, identity{pid, ticks}.kill(ctx))
			}
		}
		errs = append(errs, removeTree(g))
	}
	return errors.Join(errs...)
}

// removeTree removes an empty cgroup and those below it.
func removeTree(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, d := range slices.Backward(dirs) {
		var err error
		for deadline := time.Now().Add(ending); ; time.Sleep(5 * time.Millisecond) { // a process that has just ended still counts
			if err = unix.Rmdir(d); !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				break
			}
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("cannot remove cgroup %s: %w", d, err)
		}
	}
	return nil
}

// EndShims ends the shims of a task and the processes that they are parents of, whatever state they are in.
func (p Places) EndShims(ctx context.Context, t Task) error {
	var errs []error
	for _, s := range p.processes() {
		if s.task == t {
			errs = append(errs, p.endShim(ctx, s, p.childrenOf(s.id.pid)))
		}
	}
	return errors.Join(errs...)
}
