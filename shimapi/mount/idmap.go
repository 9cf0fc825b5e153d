package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// idmap says as whose the files of a mount are shown (mount_setattr(2), "ID-mapped mounts"). Of an overlay that is said
// of its lower layers: what is written goes to the upper one with the owners it has.
type idmap struct{ uid, gid []syscall.SysProcIDMap }

// ParseIDs reads CONTAINER:HOST:SIZE[,...], which is how snapshotters and their clients write mappings; option is what the
// error, InvalidArgument, calls it.
func ParseIDs(option, s string) ([]syscall.SysProcIDMap, error) {
	var out []syscall.SysProcIDMap
	for one := range strings.SplitSeq(s, ",") {
		f := strings.Split(one, ":")
		if len(f) != 3 {
			return nil, invalid("%s=%s is not CONTAINER:HOST:SIZE[,...]", option, s)
		}
		var n [3]int
		for i := range f {
			v, err := strconv.ParseUint(f[i], 10, 32)
			if err != nil {
				return nil, invalid("%s=%s has %q where a number is needed", option, s, f[i])
			}
			n[i] = int(v)
		}
		if n[2] == 0 {
			return nil, invalid("%s=%s maps nothing", option, s)
		}
		out = append(out, syscall.SysProcIDMap{ContainerID: n[0], HostID: n[1], Size: n[2]})
	}
	return out, nil
}

// namespace makes a user namespace with these mappings; it lasts as long as the file is open.
func (m *idmap) namespace() (*os.File, error) {
	runtime.LockOSThread() // the tracer is a thread
	defer runtime.UnlockOSThread()
	// It stops at its first instruction.
	p, err := os.StartProcess("/proc/self/exe", []string{"userns"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, UidMappings: m.uid, GidMappings: m.gid, Ptrace: true, Pdeathsig: unix.SIGKILL,
	}})
	if err != nil {
		return nil, fmt.Errorf("cannot make a user namespace to map IDs: %w", err)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", p.Pid))
	_ = p.Kill()
	_, _ = p.Wait() // a subreaper may have been faster
	return f, err
}

// clone gives a mount of dir, attached nowhere, with the IDs mapped.
func (m *idmap) clone(dir string, userns *os.File) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open_tree %s: %w", dir, err)
	}
	if err := m.apply(fd, userns); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("cannot map the IDs of %s: %w", dir, err)
	}
	return fd, nil
}

func (m *idmap) apply(fd int, userns *os.File) error {
	return os.NewSyscallError("mount_setattr", unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{
		Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns.Fd()),
	}))
}

// attached puts mapped clones of dirs where their paths can be given to mount(2), for the time of fn: kernels before
// Linux 6.15 make no overlay of mounts that are attached nowhere.
func (m *idmap) attached(dirs []string, fn func(paths []string) error) (err error) {
	userns, err := m.namespace()
	if err != nil {
		return err
	}
	defer func() { _ = userns.Close() }()
	temp, err := os.MkdirTemp("", "managerd-mount-")
	if err != nil {
		return fmt.Errorf("cannot make mount points: %w", err)
	}
	var paths []string
	defer func() {
		for _, p := range paths {
			err = errors.Join(err, Unmount(p), os.Remove(p))
		}
		err = errors.Join(err, os.Remove(temp))
	}()
	for i, dir := range dirs {
		fd, err := m.clone(dir, userns)
		if err != nil {
			return err
		}
		p := filepath.Join(temp, strconv.Itoa(i))
		if err = os.Mkdir(p, 0o700); err == nil {
			paths = append(paths, p)
			err = os.NewSyscallError("move_mount", unix.MoveMount(fd, "", unix.AT_FDCWD, p, unix.MOVE_MOUNT_F_EMPTY_PATH))
		}
		_ = unix.Close(fd)
		if err != nil {
			return err
		}
	}
	return fn(paths)
}
