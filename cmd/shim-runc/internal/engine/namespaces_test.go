package engine

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// kinds are the namespaces, and their names below /proc/PID/ns.
var kinds = map[specs.LinuxNamespaceType]string{
	specs.PIDNamespace: "pid", specs.NetworkNamespace: "net", specs.MountNamespace: "mnt", specs.IPCNamespace: "ipc",
	specs.UTSNamespace: "uts", specs.UserNamespace: "user", specs.CgroupNamespace: "cgroup", specs.TimeNamespace: "time",
}

// namespace gives a namespace of a process.
func namespace(t *testing.T, pid any, typ specs.LinuxNamespaceType) string {
	t.Helper()
	ns, err := os.Readlink(fmt.Sprintf("/proc/%v/ns/%s", pid, kinds[typ]))
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// setNamespace makes typ the only one of its kind in a spec; with no path it is a new one.
func setNamespace(s *specs.Spec, typ specs.LinuxNamespaceType, path string) {
	dropNamespace(s, typ)
	addNamespace(s, typ, path)
	if typ == specs.UserNamespace && path == "" {
		s.Linux.UIDMappings, s.Linux.GIDMappings = identity, identity
	}
}

func dropNamespace(s *specs.Spec, typ specs.LinuxNamespaceType) {
	var kept []specs.LinuxNamespace
	for _, ns := range s.Linux.Namespaces {
		if ns.Type != typ {
			kept = append(kept, ns)
		}
	}
	s.Linux.Namespaces = kept
}

// TestNamespaces: of each kind, one of its own, one by path, and without one the shim's.
func TestNamespaces(t *testing.T) {
	f := newFixture(t)
	for typ := range kinds {
		t.Run(string(typ), func(t *testing.T) {
			if !exists("/proc/self/ns/" + kinds[typ]) {
				t.Skipf("this kernel has no %s namespaces", typ)
			}
			sleep := func(mod func(*specs.Spec)) int {
				c := f.create(t, IO{}, mod, "sleep", "1000")
				start(t, c)
				return c.Init().Pid()
			}
			own := sleep(func(s *specs.Spec) { setNamespace(s, typ, "") })
			ours := namespace(t, "self", typ)
			if got := namespace(t, own, typ); got == ours {
				t.Errorf("its own is %s, which is ours", got)
			}
			path := fmt.Sprintf("/proc/%d/ns/%s", own, kinds[typ])
			if typ == specs.MountNamespace { // the other container's does not have the bundle
				path = mountNamespace(t)
			}
			var want unix.Stat_t
			if err := unix.Stat(path, &want); err != nil {
				t.Fatal(err)
			}
			joined := sleep(func(s *specs.Spec) { setNamespace(s, typ, path) })
			if got := namespace(t, joined, typ); got != fmt.Sprintf("%s:[%d]", kinds[typ], want.Ino) {
				t.Errorf("by path it is %s, not %d", got, want.Ino)
			}
			if typ == specs.MountNamespace {
				return // a container without any could take no root of its own
			}
			if got := namespace(t, sleep(func(s *specs.Spec) { dropNamespace(s, typ) }), typ); got != ours {
				t.Errorf("without any it is %s, not %s", got, ours)
			}
		})
	}
}

// mountNamespace gives the path of one that is a copy of ours, for as long as the test runs.
func mountNamespace(t *testing.T) string {
	t.Helper()
	made, end := make(chan int), make(chan struct{})
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
			if err != nil {
				t.Error(err)
			}
		} else {
			t.Error(err)
		}
		made <- unix.Gettid()
		<-end
	}()
	t.Cleanup(func() { close(end) })
	return fmt.Sprintf("/proc/%d/task/%d/ns/mnt", os.Getpid(), <-made)
}

// TestNamespaceTwice: which of two is meant, nobody knows.
func TestNamespaceTwice(t *testing.T) {
	newFixture(t).refused(t, func(s *specs.Spec) { addNamespace(s, specs.UTSNamespace, "") }, "duplicated ns")
}

// TestUserNamespaceMappings: one that is joined has mappings already; the same again are allowed, others are not.
func TestUserNamespaceMappings(t *testing.T) {
	f := newFixture(t)
	c := f.create(t, IO{}, func(s *specs.Spec) { setNamespace(s, specs.UserNamespace, "") }, "sleep", "1000")
	start(t, c)
	path := fmt.Sprintf("/proc/%d/ns/user", c.Init().Pid())
	join := func(m []specs.LinuxIDMapping) func(*specs.Spec) {
		return func(s *specs.Spec) {
			setNamespace(s, specs.UserNamespace, path)
			s.Linux.UIDMappings, s.Linux.GIDMappings = m, m
		}
	}
	if got := f.runShell(t, join(identity), "awk '{print $1, $2, $3}' /proc/self/uid_map"); got != "0 0 65536" {
		t.Errorf("mapping is %q", got)
	}
	f.refused(t, join([]specs.LinuxIDMapping{{HostID: 5, Size: 6}}), "non-matching mapping")
}

// TestIDMappedMounts: files of the host's root belong to the container's root, below mounts of the source too where that
// is asked for, and with mappings of their own to whom these say.
func TestIDMappedMounts(t *testing.T) {
	f := newFixture(t)
	// Not below TMPDIR: file systems in memory learnt it later than the others.
	source, err := os.MkdirTemp("/var/tmp", "engine-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(source) })
	other, sub := filepath.Join(source, "other"), filepath.Join(source, "tree", "sub")
	for _, dir := range []string{other, sub} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{filepath.Join(other, "file"), filepath.Join(source, "tree", "file")} {
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount(other, sub, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(sub, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for _, dir := range []string{source, filepath.Dir(f.bundle), f.bundle} {
		if err := os.Chmod(dir, 0o755); err != nil { // for the container's root, who is nobody outside
			t.Fatal(err)
		}
	}
	high := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	for _, row := range []struct {
		name    string
		userns  bool
		mapping []specs.LinuxIDMapping
		options string
		want    string // the owner of the file, and of that on the mount below
	}{
		{"none", true, nil, "rbind", "65534 65534"},
		{"idmap", true, nil, "rbind,idmap", "0 65534"},
		{"ridmap", true, nil, "rbind,ridmap", "0 0"},
		{"mapping", false, []specs.LinuxIDMapping{{ContainerID: 0, HostID: 7, Size: 1}}, "rbind,idmap", "7 0"},
		{"mapping without an option", false, []specs.LinuxIDMapping{{ContainerID: 0, HostID: 7, Size: 1}}, "rbind", "7 0"},
		{"recursive mapping", false, []specs.LinuxIDMapping{{ContainerID: 0, HostID: 7, Size: 1}}, "rbind,ridmap", "7 7"},
	} {
		t.Run(row.name, func(t *testing.T) {
			got := f.runShell(t, func(s *specs.Spec) {
				if row.userns {
					addNamespace(s, specs.UserNamespace, "")
					s.Linux.UIDMappings, s.Linux.GIDMappings = high, high
				}
				s.Mounts = append(s.Mounts, specs.Mount{
					Destination: "/tmp", Source: filepath.Join(source, "tree"), Options: strings.Split(row.options, ","),
					UIDMappings: row.mapping, GIDMappings: row.mapping,
				})
			}, "echo $(stat -c %u /tmp/file /tmp/sub/file)")
			if got != row.want {
				t.Errorf("owners are %q, want %q", got, row.want)
			}
		})
	}
}

// TestRootfsPropagation: the root is mounted as it is said, as far as the source can be shared with.
func TestRootfsPropagation(t *testing.T) {
	f := newFixture(t)
	for propagation, want := range map[string]string{
		"private": "-", "rprivate": "-", "shared": "shared:", "rshared": "shared:", "slave": "", "rslave": "",
		"unbindable": "unbindable", "runbindable": "unbindable",
	} {
		t.Run(propagation, func(t *testing.T) {
			got := f.runShell(t, func(s *specs.Spec) { s.Linux.RootfsPropagation = propagation }, "awk '$5==\"/\"{print $7}' /proc/self/mountinfo")
			if strings.Contains(propagation, "slave") {
				want = "-"
				if on := mountOf(t, f.bundle); strings.Contains(on, "shared:") || strings.Contains(on, "master:") {
					want = "master:"
				}
			}
			if !strings.HasPrefix(got, want) {
				t.Errorf("the root is %q, want %q", got, want)
			}
		})
	}
}

// mountOf is the line of mountinfo of the mount that a directory is on.
func mountOf(t *testing.T, dir string) (line string) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	longest := ""
	for l := range strings.Lines(string(data)) {
		at := strings.Fields(l)[4]
		if strings.HasPrefix(dir+"/", strings.TrimSuffix(at, "/")+"/") && len(at) >= len(longest) {
			line, longest = l, at
		}
	}
	return line
}
