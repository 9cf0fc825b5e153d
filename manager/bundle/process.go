package bundle

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi"
)

// ticksPerSecond is the unit of start times in /proc/PID/stat (USER_HZ, 100 on every Linux that Go runs on).
const ticksPerSecond = 100

// InitAlive says whether process pid, which began at ticks (field 22 of /proc/PID/stat), is there and no zombie. One of which nobody
// knows when it began (0) is not: its number may be another's.
func InitAlive(pid uint32, ticks uint64) bool {
	got, ok := started(pid)
	return ok && got == ticks && ticks != 0
}

// started is when a process that is no zombie began, in ticks since the boot.
func started(pid uint32) (ticks uint64, ok bool) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false
	}
	f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(f) < 20 || f[0] == "Z" || f[0] == "X" {
		return 0, false
	}
	ticks, err = strconv.ParseUint(f[19], 10, 64)
	return ticks, err == nil
}

// Init is the container's first process, with its start time, by init.pid: what a shim without a ledger leaves. A process
// that began after the file was written has but inherited the number, and counts as none: 0.
func (b *Bundle) Init() (pid uint32, ticks uint64) {
	data, err := os.ReadFile(b.file(shimapi.InitPidFile))
	if err != nil {
		return 0, 0
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 32)
	if err != nil {
		return 0, 0
	}
	fi, err := os.Stat(b.file(shimapi.InitPidFile))
	if err != nil {
		return 0, 0
	}
	ticks, ok := started(uint32(n))
	if !ok {
		return 0, 0
	}
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return 0, 0
	}
	began := time.Now().Add(-time.Duration(up.Nano()) + time.Duration(ticks)*time.Second/ticksPerSecond)
	if began.After(fi.ModTime().Add(time.Second)) {
		return 0, 0
	}
	return uint32(n), ticks
}

// Created says whether a container was ever made in the bundle.
func (b *Bundle) Created() bool {
	for _, name := range []string{shimapi.InitPidFile, madeFile} {
		if _, err := os.Stat(b.file(name)); err == nil {
			return true
		}
	}
	return false
}

// HasSandbox says whether a shim of ours has made a sandbox in the bundle.
func (b *Bundle) HasSandbox() bool {
	_, err := os.Stat(b.file(shimapi.SandboxFile))
	return err == nil
}

// SignalInit sends a signal to the process that InitAlive speaks of, and to no other. NotFound when it has ended.
func SignalInit(pid uint32, ticks uint64, signal unix.Signal) error {
	return signalIf(int(pid), signal, func() bool { return InitAlive(pid, ticks) })
}

// KillShim kills the shim that keeps the bundle: process pid, if it works in the bundle's directory, as ours do. NotFound
// when it is not there. Only for a shim that keeps nothing any more.
func (b *Bundle) KillShim(pid uint32) error {
	return b.SignalShim(pid, unix.SIGKILL)
}

// SignalShim sends a signal to the shim that keeps the bundle, as KillShim does.
func (b *Bundle) SignalShim(pid uint32, signal unix.Signal) error {
	return signalIf(int(pid), signal, func() bool { return b.Keeps(pid) })
}

// Keeps says whether process pid works in the bundle's directory, as a shim of ours does. The first thread alone does not tell:
// in shims of earlier versions it may be left in the container's mount namespace, where its directory is another.
func (b *Bundle) Keeps(pid uint32) bool {
	if works(fmt.Sprintf("/proc/%d", pid), b.Path) {
		return true
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	return err == nil && slices.ContainsFunc(threads, func(t os.DirEntry) bool {
		return works(fmt.Sprintf("/proc/%d/task/%s", pid, t.Name()), b.Path)
	})
}

// ShimStopped says whether process pid is stopped (SIGSTOP, a debugger) and keeps the bundle.
func (b *Bundle) ShimStopped(pid uint32) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, state, found := strings.Cut(string(data[max(0, strings.LastIndexByte(string(data), ')')):]), " ")
	return found && (strings.HasPrefix(state, "T") || strings.HasPrefix(state, "t")) && b.Keeps(pid)
}

// works says whether the directory in which a thread works is path.
func works(thread, path string) bool {
	cwd, err := os.Readlink(thread + "/cwd")
	return err == nil && cwd == path
}

// signalIf looks at the process after it has got hold of it: the number may not pass to another one in between.
func signalIf(pid int, signal unix.Signal, is func() bool) error {
	gone := fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	if pid <= 1 {
		return gone
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return gone
	}
	if err != nil {
		return fmt.Errorf("cannot signal process %d: %w", pid, err)
	}
	defer func() { _ = unix.Close(fd) }()
	if !is() {
		return gone
	}
	err = unix.PidfdSendSignal(fd, signal, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return gone
	}
	if err != nil {
		return fmt.Errorf("cannot signal process %d: %w", pid, err)
	}
	return nil
}
