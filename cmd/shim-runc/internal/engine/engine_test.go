package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/reaper"
)

func init() { InitHook() }

var reap *reaper.Reaper

func TestMain(m *testing.M) {
	_, err := applets()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if reap, err = reaper.New(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	for _, l := range leftCgroups(cgroups.Root) {
		fmt.Fprintln(os.Stderr, "cgroup left behind:", l)
		code = max(code, 1)
	}
	removeParents()
	os.Exit(code)
}

var cgroupParent = fmt.Sprintf("/managerd-engine-test-%d", os.Getpid())

// leftCgroups are the cgroups of this run's containers that are still there: below root on v2, below every hierarchy of v1
// there.
func leftCgroups(root string) (left []string) {
	for _, pattern := range []string{root + cgroupParent + "/*", root + "/*" + cgroupParent + "/*"} {
		found, _ := filepath.Glob(pattern)
		for _, f := range found {
			if fi, err := os.Stat(f); err == nil && fi.IsDir() {
				left = append(left, f)
			}
		}
	}
	return left
}

// TestLeftCgroups: what TestMain looks for is found on v1 as well as on v2.
func TestLeftCgroups(t *testing.T) {
	root := t.TempDir()
	var want []string
	for _, dir := range []string{root, filepath.Join(root, "memory"), filepath.Join(root, "pids")} {
		c := filepath.Join(dir, cgroupParent, "c1")
		if err := os.MkdirAll(c, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, cgroupParent, "cgroup.procs"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		want = append(want, c)
	}
	if left := leftCgroups(root); !slices.Equal(left, want) {
		t.Errorf("found %q, not %q", left, want)
	}
}

// applets are the programs in busybox. They are asked for once, before the reaper begins: it would reap a child that it
// was not told of.
var applets = sync.OnceValues(func() ([]byte, error) { return exec.Command("/bin/busybox", "--list").Output() })

// removeParents removes the (empty) parent cgroup of this run in every hierarchy.
func removeParents() {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupParent)
	for _, d := range append(dirs, "/sys/fs/cgroup"+cgroupParent) {
		_ = os.Remove(d)
	}
}

// fixture is an engine with a bundle whose rootfs is busybox.
type fixture struct {
	*Engine
	bundle, root string
	n            int
	mu           sync.Mutex
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	dir := t.TempDir()
	f := &fixture{bundle: dir, root: filepath.Join(dir, "runc")}
	for _, d := range []string{"bin", "proc", "sys", "dev", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(dir, "rootfs", d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "rootfs/bin/busybox"), busybox, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := applets()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range strings.Fields(string(out)) {
		_ = os.Symlink("busybox", filepath.Join(dir, "rootfs/bin", a))
	}
	f.Engine = New(Config{Root: f.root, Reaper: reap})
	return f
}

func (f *fixture) id() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n++
	return fmt.Sprintf("c%d", f.n)
}

func testSpec(id string, args ...string) *specs.Spec {
	return &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: "rootfs"},
		Process: &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: cgroupParent + "/" + id,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			},
		},
	}
}

func (f *fixture) create(t testing.TB, io IO, mod func(*specs.Spec), args ...string) *Container {
	t.Helper()
	id := f.id()
	spec := testSpec(id, args...)
	if mod != nil {
		mod(spec)
	}
	c, err := f.Create(context.Background(), id, f.bundle, spec, io)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Signal(unix.SIGKILL, false)
		<-c.Init().Done()
		if err := c.Destroy(); err != nil {
			t.Error(err)
		}
		if err := c.Destroy(); err != nil {
			t.Errorf("second destroy: %v", err)
		}
		if _, err := os.Stat(filepath.Join(f.root, id)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("state of %s is left behind", id)
		}
	})
	return c
}

func start(t testing.TB, c *Container) {
	t.Helper()
	if err := c.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestExitCodes(t *testing.T) {
	f := newFixture(t)
	for _, code := range []int{0, 1, 7, 42, 255} {
		c := f.create(t, IO{}, nil, "sh", "-c", fmt.Sprintf("exit %d", code))
		select {
		case <-c.Init().Done():
			t.Fatal("ran before it was started")
		default:
		}
		start(t, c)
		if e := c.Init().Exit(); e.Status != code {
			t.Errorf("exit %d, want %d", e.Status, code)
		}
		if err := c.Start(context.Background()); err == nil {
			t.Error("started twice")
		}
	}
}

func TestOutput(t *testing.T) {
	f := newFixture(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	c := f.create(t, IO{Stdout: w}, func(s *specs.Spec) {
		s.Process.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{5}}
	}, "sh", "-c", "id -u; id -G; cat /proc/1/comm; true")
	_ = w.Close()
	start(t, c)
	out, err := io.ReadAll(r)
	if err != nil || string(out) != "1000\n1000 5\nsh\n" {
		t.Errorf("got %q, %v", out, err)
	}
}

func TestTerminal(t *testing.T) {
	f := newFixture(t)
	var master *os.File
	c := f.create(t, IO{Console: func(m *os.File) error { master = m; return nil }}, func(s *specs.Spec) {
		s.Process.Terminal = true
		s.Process.ConsoleSize = &specs.Box{Width: 111, Height: 44}
	}, "sh", "-c", "stty size; tty")
	defer func() { _ = master.Close() }()
	start(t, c)
	out, _ := io.ReadAll(master) // ends with EIO, as terminals do
	if got := strings.ReplaceAll(string(out), "\r", ""); got != "44 111\n/dev/pts/0\n" {
		t.Errorf("got %q", got)
	}
}

func TestExecParallel(t *testing.T) {
	f := newFixture(t)
	c := f.create(t, IO{}, nil, "sleep", "1000")
	start(t, c)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p, err := c.Exec(context.Background(), fmt.Sprint("e", i), &specs.Process{
				Args: []string{"sh", "-c", fmt.Sprintf("exit %d", i)}, Env: []string{"PATH=/bin"}, Cwd: "/",
			}, IO{})
			if err != nil {
				t.Error(err)
				return
			}
			if e := p.Exit(); e.Status != i {
				t.Errorf("exec %d exited with %d", i, e.Status)
			}
		}()
	}
	wg.Wait()
	pids, err := c.Pids()
	if err != nil || len(pids) != 1 || pids[0] != c.Init().Pid() {
		t.Errorf("pids %v, %v", pids, err)
	}
}

func TestPauseResumeUpdate(t *testing.T) {
	f := newFixture(t)
	c := f.create(t, IO{}, nil, "sleep", "1000")
	start(t, c)
	if err := c.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := c.Resume(); err != nil {
		t.Fatal(err)
	}
	limit := int64(64 << 20)
	if err := c.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"/sys/fs/cgroup/memory" + cgroupParent + "/" + c.ID() + "/memory.limit_in_bytes", "/sys/fs/cgroup" + cgroupParent + "/" + c.ID() + "/memory.max"} {
		if data, err := os.ReadFile(name); err == nil && strings.TrimSpace(string(data)) != fmt.Sprint(limit) {
			t.Errorf("%s is %s", name, data)
		}
	}
	// A paused container dies of SIGKILL.
	if err := c.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := c.Signal(unix.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if e := c.Init().Exit(); e.Status != 137 {
		t.Errorf("exit %d, want 137", e.Status)
	}
}

// TestSharedPID: without a pid namespace nothing dies with init but what we end.
func TestSharedPID(t *testing.T) {
	f := newFixture(t)
	c := f.create(t, IO{}, hostPID, "sh", "-c", "sleep 1000 & sleep 1000 & exit 3")
	if !c.SharedPID() {
		t.Fatal("a container in the host's pid namespace says it has its own")
	}
	start(t, c)
	if e := c.Init().Exit(); e.Status != 3 {
		t.Errorf("exit %d", e.Status)
	}
	pids, err := c.Pids()
	if err != nil || len(pids) != 2 {
		t.Errorf("pids %v, %v", pids, err)
	}
	if err := c.Signal(unix.SIGKILL, true); err != nil {
		t.Fatal(err)
	}
	if pids, _ := c.Pids(); len(pids) != 0 {
		t.Errorf("still there: %v", pids)
	}
}

func TestBadSpecs(t *testing.T) {
	f := newFixture(t)
	for name, c := range map[string]struct {
		mod  func(*specs.Spec)
		want string
	}{
		"no process":      {func(s *specs.Spec) { s.Process = nil }, "process is missing"},
		"no args":         {func(s *specs.Spec) { s.Process.Args = nil }, "process.args is empty"},
		"relative cwd":    {func(s *specs.Spec) { s.Process.Cwd = "x" }, `process.cwd "x"`},
		"no root":         {func(s *specs.Spec) { s.Root = nil }, "root.path is missing"},
		"missing rootfs":  {func(s *specs.Spec) { s.Root.Path = "/nowhere/at/all" }, "/nowhere/at/all"},
		"rootfs a file":   {func(s *specs.Spec) { s.Root.Path = "/etc/passwd" }, "is not a directory"},
		"no linux":        {func(s *specs.Spec) { s.Linux = nil }, "linux section is missing"},
		"unknown rlimit":  {func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_FOO"}} }, "RLIMIT_FOO"},
		"missing command": {func(s *specs.Spec) { s.Process.Args = []string{"frobnicate"} }, `exec: "frobnicate": executable file not found in $PATH`},
		"bad namespace": {func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: "moon"})
		}, "moon"},
	} {
		t.Run(name, func(t *testing.T) {
			id := f.id()
			spec := testSpec(id, "true")
			c.mod(spec)
			_, err := f.Create(context.Background(), id, f.bundle, spec, IO{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want one about %q", err, c.want)
			}
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%v is not an invalid argument", err)
			}
			if _, err := os.Stat(filepath.Join(f.root, id)); !errors.Is(err, os.ErrNotExist) {
				t.Error("state is left behind")
			}
			if left, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupParent + "/" + id); len(left) > 0 {
				t.Errorf("cgroups are left behind: %v", left)
			}
		})
	}
}

// TestRemove ends a container that another shim left behind.
func TestRemove(t *testing.T) {
	f := newFixture(t)
	c := f.create(t, IO{}, nil, "sleep", "1000")
	start(t, c)
	if err := f.Remove(c.ID()); err != nil {
		t.Fatal(err)
	}
	if e := c.Init().Exit(); e.Status != 137 {
		t.Errorf("exit %d", e.Status)
	}
	if err := f.Remove(c.ID()); err != nil {
		t.Errorf("second time: %v", err)
	}
}
