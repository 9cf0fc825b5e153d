package sandbox

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/mount"
)

// flags are the kernel's names of the namespaces' types.
func flag(kind specs.LinuxNamespaceType) uintptr {
	for _, k := range kinds {
		if k.kind == kind {
			return k.flag
		}
	}
	return 0
}

// Maker is a sandbox that has been made, but whose child is held back still: Release it once it is written down, so that a
// maker that dies before leaves no process.
type Maker struct {
	Init *reaper.Process // of the pid namespace; nil when there is none

	hold *os.File // the child's input
	proc *reaper.Process
}

// Make makes and pins all that p has, in bundle. On an error nothing is left.
func Make(ctx context.Context, p *Plan, bundle string, r *reaper.Reaper) (_ *Maker, err error) {
	m := &Maker{}
	defer func() {
		if err != nil {
			m.abandon()
			err = errors.Join(err, Unpin(bundle))
		}
	}()
	if err := os.Mkdir(filepath.Join(bundle, shimapi.NamespaceDir), 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	for _, k := range kinds {
		if path := p.joined[k.kind]; path != "" {
			if err := pin(bundle, k.kind, path); err != nil {
				return nil, err
			}
		}
	}
	if len(p.made) > 0 {
		if err := m.launch(ctx, p, bundle, r); err != nil {
			return nil, err
		}
		for _, k := range kinds {
			if p.made[k.kind] {
				name := shimapi.NamespaceName(string(k.kind))
				if err := pin(bundle, k.kind, fmt.Sprintf("/proc/%d/ns/%s", m.proc.Pid(), name)); err != nil {
					return nil, err
				}
			}
		}
	}
	joined := func(kind specs.LinuxNamespaceType) bool { return p.joined[kind] != "" }
	if rest := of(p.sysctl, joined); len(rest) > 0 {
		if err := SetSysctls(bundle, rest); err != nil {
			return nil, err
		}
	}
	if p.shm {
		if err := p.mountShm(bundle); err != nil {
			return nil, err
		}
	}
	if p.SharesPID() {
		m.Init = m.proc
	}
	return m, nil
}

// Release lets the child go: an init goes on, any other ends, and is waited for.
func (m *Maker) Release() error {
	if m.hold == nil {
		return nil
	}
	_, err := m.hold.WriteString(release + "\n")
	err = errors.Join(err, m.hold.Close())
	m.hold = nil
	if m.Init == nil {
		m.proc.Exit()
	}
	return err
}

// abandon ends the child, whatever it is.
func (m *Maker) abandon() {
	if m.hold != nil {
		_ = m.hold.Close()
	}
	if m.proc != nil {
		_ = m.proc.Signal(unix.SIGKILL)
		m.proc.Exit()
	}
}

// Abandon takes back a sandbox that was made and not released.
func (m *Maker) Abandon(bundle string) error {
	m.abandon()
	return Unpin(bundle)
}

// launch starts the child in the new namespaces, and returns when it has set them up.
func (m *Maker) launch(ctx context.Context, p *Plan, bundle string, r *reaper.Reaper) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	attr := &os.ProcAttr{Dir: "/", Env: []string{"GOMAXPROCS=1"}, Sys: &syscall.SysProcAttr{Setsid: true}}
	for kind := range p.made {
		attr.Sys.Cloneflags |= flag(kind)
	}
	if p.made[specs.UserNamespace] {
		attr.Sys.UidMappings, attr.Sys.GidMappings = mappings(p.uids), mappings(p.gids)
		attr.Sys.GidMappingsEnableSetgroups = true
		attr.Sys.Credential = &syscall.Credential{NoSetGroups: true} // root of the new namespace
	}
	in, hold, err := os.Pipe()
	if err != nil {
		return err
	}
	m.hold = hold
	answer, out, err := os.Pipe()
	if err != nil {
		_ = in.Close()
		return err
	}
	defer func() { _ = answer.Close() }()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err == nil {
		attr.Files = []*os.File{in, out, null}
		m.proc, err = r.Fork(func() (int, error) {
			proc, err := os.StartProcess(self, []string{self, ChildVerb, bundle}, attr)
			if err != nil {
				return 0, err
			}
			pid := proc.Pid
			return pid, proc.Release()
		})
		_ = null.Close()
	}
	_, _ = in.Close(), out.Close()
	if err != nil {
		return fmt.Errorf("cannot make the namespaces: %w", err)
	}
	made := func(kind specs.LinuxNamespaceType) bool { return p.made[kind] }
	order, err := json.Marshal(childOrder{
		Hostname: p.hostname, Domainname: p.domainname, Loopback: p.made[specs.NetworkNamespace], Init: p.SharesPID(), Sysctl: of(p.sysctl, made),
	})
	if err != nil {
		return err
	}
	if _, err := hold.Write(append(order, '\n')); err != nil {
		return fmt.Errorf("cannot make the namespaces: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = m.proc.Signal(unix.SIGKILL) })
	defer stop()
	said, err := bufio.NewReader(answer).ReadString('\n')
	if said = strings.TrimSpace(said); said == ready {
		return nil
	}
	if err != nil && said == "" {
		return fmt.Errorf("cannot make the namespaces: the process that was to set them up has ended: %w", errors.Join(err, ctx.Err()))
	}
	return invalid("cannot set up the namespaces: %s", said)
}

func mappings(from []specs.LinuxIDMapping) (out []syscall.SysProcIDMap) {
	for _, m := range from {
		out = append(out, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
	}
	return out
}

// pin keeps the namespace at path for as long as the mount is there.
func pin(bundle string, kind specs.LinuxNamespaceType, path string) error {
	from, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return invalid("cannot open the %s namespace: %w", kind, &os.PathError{Op: "open", Path: path, Err: err})
	}
	defer func() { _ = unix.Close(from) }()
	if is, err := unix.IoctlRetInt(from, unix.NS_GET_NSTYPE); err != nil || uintptr(is) != flag(kind) {
		return invalid("%s is no %s namespace", path, kind)
	}
	to := Path(bundle, string(kind))
	f, err := os.OpenFile(to, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	_ = f.Close()
	if err := unix.Mount("/proc/self/fd/"+strconv.Itoa(from), to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("cannot pin the %s namespace: %w", kind, &os.PathError{Op: "mount", Path: to, Err: err})
	}
	return nil
}

// mountShm mounts the members' /dev/shm, owned by the root of their user namespace.
func (p *Plan) mountShm(bundle string) error {
	dir := filepath.Join(bundle, shimapi.ShmDir)
	if err := os.Mkdir(dir, 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	options := []string{"nosuid", "nodev", "noexec", "mode=1777", "size=" + strconv.FormatUint(p.shmSize, 10)}
	if len(p.uids) > 0 {
		options = append(options, fmt.Sprintf("uid=%d", p.uids[0].HostID), fmt.Sprintf("gid=%d", p.gids[0].HostID))
	}
	return mount.Mount([]*types.Mount{{Type: "tmpfs", Source: "shm", Options: options}}, dir)
}

// SetSysctls sets sysctls in the pinned namespaces that they belong to.
func SetSysctls(bundle string, sysctl map[string]string) error {
	for _, k := range kinds {
		mine := of(sysctl, func(kind specs.LinuxNamespaceType) bool { return kind == k.kind })
		if len(mine) == 0 {
			continue
		}
		if err := within(bundle, []specs.LinuxNamespaceType{k.kind}, func() error { return writeSysctls(mine) }); err != nil {
			return err
		}
	}
	return nil
}

// SetHostname changes the name in the pinned uts namespace.
func SetHostname(bundle, name string) error {
	return within(bundle, []specs.LinuxNamespaceType{specs.UTSNamespace}, func() error {
		return os.NewSyscallError("sethostname", unix.Sethostname([]byte(name)))
	})
}

// Missing names the first of kinds that is not pinned any more; empty when all are.
func Missing(bundle string, kinds []string) string {
	for _, kind := range kinds {
		var st unix.Statfs_t
		if err := unix.Statfs(Path(bundle, kind), &st); err != nil || st.Type != unix.NSFS_MAGIC {
			return kind
		}
	}
	return ""
}

// Unpin lets go of the namespaces, and of /dev/shm: they are there for as long as a process is in them. Nothing there is no
// error.
func Unpin(bundle string) error {
	var errs []error
	dir := filepath.Join(bundle, shimapi.NamespaceDir)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if err := mount.Unmount(path); err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, os.Remove(path))
	}
	shm := filepath.Join(bundle, shimapi.ShmDir)
	if err := mount.Unmount(shm); err != nil {
		errs = append(errs, err)
	} else if err := os.Remove(shm); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
