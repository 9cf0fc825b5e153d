package engine

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/opencontainers/runc/libcontainer/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// notification is struct seccomp_notif, and answer struct seccomp_notif_resp, of seccomp_unotify(2).
type notification struct {
	ID         uint64
	Pid, Flags uint32
	Nr         int32
	Arch       uint32
	IP         uint64
	Args       [6]uint64
}

type answer struct {
	ID    uint64
	Val   int64
	Error int32
	Flags uint32
}

// listener is the other side of a profile's listenerPath.
type listener struct {
	*net.UnixListener
	path string
}

func newListener(t *testing.T) *listener {
	t.Helper()
	dir, err := os.MkdirTemp("", "l") // short: a socket's name has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close(); _ = os.RemoveAll(dir) })
	return &listener{l, path}
}

// receive gives the state that was sent for one process, and the descriptor that tells of its calls.
func (l *listener) receive(t *testing.T) (specs.ContainerProcessState, int) {
	t.Helper()
	var state specs.ContainerProcessState
	_ = l.SetDeadline(time.Now().Add(30 * time.Second))
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	buf, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*4))
	n, m, _, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(buf[:n], &state); err != nil {
		t.Fatal(err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:m])
	if err != nil || len(msgs) != 1 {
		t.Fatalf("%d control messages, %v", len(msgs), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != len(state.Fds) {
		t.Fatalf("%d descriptors, %v; the state tells of %v", len(fds), err, state.Fds)
	}
	return state, fds[0]
}

// refuse waits for one call and lets it fail with errno; it gives what was called, and by whom.
func refuse(t *testing.T, fd int, errno unix.Errno) notification {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 30_000)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n != 1 {
			t.Fatalf("no notification: %d, %v", n, err)
		}
		break
	}
	var call notification
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&call))); e != 0 {
		t.Fatal(e)
	}
	a := answer{ID: call.ID, Error: -int32(errno)}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&a))); e != 0 {
		t.Fatal(e)
	}
	return call
}

// TestSeccompListener: whoever listens is given the state of the init and of each exec, and a descriptor by which it
// decides on their calls.
func TestSeccompListener(t *testing.T) {
	f := newFixture(t)
	l := newListener(t)
	profile := &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, ListenerPath: l.path, ListenerMetadata: "row=1",
		Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActNotify}},
	}
	if seccomp.FlagSupported(specs.LinuxSeccompFlagWaitKillableRecv) == nil {
		profile.Flags = []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}
	}
	const script = "mkdir /tmp/listened 2>&1 | grep -q cross-device && exit 7; exit 1"
	c := f.create(t, IO{}, func(s *specs.Spec) {
		s.Annotations = map[string]string{"who": "listens"}
		s.Linux.Seccomp = profile
	}, "sh", "-c", "("+script+"); s=$?; while [ ! -e /tmp/end ]; do sleep 0.1; done; exit $s")
	state, fd := l.receive(t)
	defer func() { _ = unix.Close(fd) }()
	if state.Metadata != "row=1" || state.Pid != c.Init().Pid() || len(state.Fds) != 1 || state.Fds[0] != specs.SeccompFdName {
		t.Errorf("state of init: %+v, its pid is %d", state, c.Init().Pid())
	}
	if s := state.State; s.ID != c.ID() || s.Status != specs.StateCreating || s.Bundle != f.bundle || s.Annotations["who"] != "listens" {
		t.Errorf("state of the container: %+v", s)
	}
	start(t, c)
	if call := refuse(t, fd, unix.EXDEV); call.Nr != unix.SYS_MKDIR && call.Nr != unix.SYS_MKDIRAT {
		t.Errorf("call %d", call.Nr)
	}
	p, err := c.Exec(context.Background(), "e", &specs.Process{Args: []string{"sh", "-c", script}, Env: []string{"PATH=/bin"}, Cwd: "/"}, IO{})
	if err != nil {
		t.Fatal(err)
	}
	exec, execFD := l.receive(t)
	defer func() { _ = unix.Close(execFD) }()
	if exec.Pid != p.Pid() || exec.State.Status != specs.StateRunning || exec.State.Pid != c.Init().Pid() {
		t.Errorf("state of the exec: %+v, its pid is %d", exec, p.Pid())
	}
	refuse(t, execFD, unix.EXDEV)
	if e := p.Exit(); e.Status != 7 {
		t.Errorf("the exec exited with %d", e.Status)
	}
	if err := os.WriteFile(filepath.Join(f.bundle, "rootfs/tmp/end"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if e := c.Init().Exit(); e.Status != 7 {
		t.Errorf("init exited with %d", e.Status)
	}
}

// mkdir32 is a program of 64 bits that makes a call of 32: mkdir, whose error is its exit status.
var mkdir32 = append([]byte{
	0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, // 64 bits, little-endian
	2, 0, 0x3e, 0, 1, 0, 0, 0, 0x78, 0, 0x40, 0, 0, 0, 0, 0, // executable, x86-64, entry 0x400078
	0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // program headers at 0x40
	0, 0, 0, 0, 0x40, 0, 0x38, 0, 1, 0, 0x40, 0, 0, 0, 0, 0, // of 0x38 bytes, one
	1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // to be loaded, to be read and executed, from 0
	0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, // to 0x400000
	0xa0, 0, 0, 0, 0, 0, 0, 0, 0xa0, 0, 0, 0, 0, 0, 0, 0, // 0xa0 bytes
	0, 0x10, 0, 0, 0, 0, 0, 0,
	0xb8, 39, 0, 0, 0, // mov eax, mkdir
	0xbb, 0x98, 0, 0x40, 0, // mov ebx, 0x400098: the path
	0x31, 0xc9, // xor ecx, ecx
	0xcd, 0x80, // int 0x80
	0xf7, 0xd8, // neg eax
	0x89, 0xc3, // mov ebx, eax
	0xb8, 1, 0, 0, 0, // mov eax, exit
	0xcd, 0x80, // int 0x80
	0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90,
}, "/tmp/m\x00\x00"...)

// TestSeccompArchitectures: a rule holds for calls of the other architectures that the profile names, and kills who makes
// one of an architecture that it does not.
func TestSeccompArchitectures(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("the program is for amd64")
	}
	f := newFixture(t)
	if err := os.WriteFile(filepath.Join(f.bundle, "rootfs/bin/mkdir32"), mkdir32, 0o755); err != nil {
		t.Fatal(err)
	}
	errno := uint(77)
	for _, row := range []struct {
		name  string
		archs []specs.Arch
		want  int
	}{
		{"both", []specs.Arch{specs.ArchX86_64, specs.ArchX86}, 77},
		{"one", []specs.Arch{specs.ArchX86_64}, 128 + int(unix.SIGSYS)},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := f.create(t, IO{}, func(s *specs.Spec) {
				s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: row.archs, Syscalls: []specs.LinuxSyscall{
					{Names: []string{"mkdir"}, Action: specs.ActErrno, ErrnoRet: &errno},
				}}
			}, "mkdir32")
			start(t, c)
			if e := c.Init().Exit(); e.Status != row.want {
				t.Errorf("it exited with %d, want %d", e.Status, row.want)
			}
		})
	}
}

// TestSeccompFlags: every flag that this program says it supports is taken.
func TestSeccompFlags(t *testing.T) {
	f := newFixture(t)
	l := newListener(t)
	for _, flag := range seccomp.SupportedFlags() {
		t.Run(flag, func(t *testing.T) {
			action := specs.ActErrno
			if strings.Contains(flag, "WAIT_KILL") { // is for who is listened to
				action = specs.ActNotify
			}
			c := f.create(t, IO{}, func(s *specs.Spec) {
				s.Linux.Seccomp = &specs.LinuxSeccomp{
					DefaultAction: specs.ActAllow, ListenerPath: l.path, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlag(flag)},
					Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: action}},
				}
			}, "grep", "-q", "^Seccomp:.2", "/proc/self/status")
			start(t, c)
			if e := c.Init().Exit(); e.Status != 0 {
				t.Errorf("it exited with %d", e.Status)
			}
		})
	}
}
