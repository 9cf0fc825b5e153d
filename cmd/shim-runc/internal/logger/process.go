package logger

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/reaper"
)

// schema is the version of the records that this code writes, and the newest that it reads.
const schema = 1

// start starts the program and records it. ready is our end of its ready pipe, for the caller to close.
func (l *Logger) start() (ready *os.File, err error) {
	fail := func(err error) (*os.File, error) {
		return nil, fmt.Errorf("cannot start logger %s: %w", l.cfg.Path, err)
	}
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			_ = f.Close()
		}
	}()
	for _, f := range []*os.File{l.cfg.Stdout, l.cfg.Stderr} {
		end, err := readingEnd(f)
		if err != nil {
			return fail(err)
		}
		theirs = append(theirs, end)
	}
	ready, w, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	theirs = append(theirs, w)
	errs, err := l.said.writingEnd()
	if err != nil {
		_ = ready.Close()
		return fail(err)
	}
	defer func() { _ = errs.Close() }()
	cmd := exec.Command(l.cfg.Path, l.cfg.Args...)
	cmd.Env = []string{"CONTAINER_ID=" + l.cfg.ID, "CONTAINER_NAMESPACE=" + l.host.Namespace}
	cmd.Stderr, cmd.ExtraFiles = errs, theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var started error
	p, err := l.host.Reaper.Fork(func() (int, error) {
		if started = cmd.Start(); started != nil {
			return 0, started
		}
		_ = unix.SetNonblock(int(errs.Fd()), true) // to start it has changed that
		return cmd.Process.Pid, l.record(cmd.Process.Pid)
	})
	if err != nil {
		_ = ready.Close()
		if started == nil { // it runs, and nobody would know of it
			_ = cmd.Process.Kill()
		} else if !errors.Is(started, unix.EAGAIN) && !errors.Is(started, unix.ENOMEM) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		return fail(err)
	}
	_ = cmd.Process.Release() // the reaper waits for it
	l.mu.Lock()
	defer l.mu.Unlock()
	l.proc, l.state.PID = p, p.Pid()
	return ready, nil
}

// readingEnd opens the FIFO of f anew, as a program expects it: its reads block. nil gives an empty stream.
func readingEnd(f *os.File) (*os.File, error) {
	path := os.DevNull
	if f != nil {
		path = fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// record writes down which process it is, for a successor of this shim.
func (l *Logger) record(pid int) error {
	data, err := (&shimstate.Logger{Schema: schema, Pid: uint32(pid), StartTicks: reaper.StartTicks(pid)}).Marshal()
	if err != nil {
		return err
	}
	half := l.cfg.Base + ".new"
	if err := os.WriteFile(half, data, 0o600); err != nil {
		return err
	}
	return os.Rename(half, l.cfg.Base)
}

// find looks for a program that another incarnation has started, and that runs: 0 for none.
func (l *Logger) find() (pid int, ticks uint64) {
	var r shimstate.Logger
	data, err := os.ReadFile(l.cfg.Base)
	if err == nil && r.Unmarshal(data) == nil && r.Schema <= schema && r.Pid != 0 {
		if t := reaper.StartTicks(int(r.Pid)); t != 0 && t == r.StartTicks {
			return int(r.Pid), t
		}
	}
	// It may have been started a moment before the shim died: who else has the FIFO where a logger has it?
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || !l.looksLike(pid) {
			continue
		}
		if t := reaper.StartTicks(pid); t != 0 {
			return pid, t
		}
	}
	return 0, 0
}

// looksLike says whether a process is this logger's, by its descriptors and its environment.
func (l *Logger) looksLike(pid int) bool {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	for i, f := range []*os.File{l.cfg.Stdout, l.cfg.Stderr} {
		if f == nil {
			continue
		}
		ours, err := f.Stat()
		theirs, terr := os.Stat(filepath.Join(proc, "fd", strconv.Itoa(3+i)))
		if err != nil || terr != nil || !os.SameFile(ours, theirs) {
			return false
		}
	}
	env, err := os.ReadFile(filepath.Join(proc, "environ"))
	vars := bytes.Split(env, []byte{0})
	has := func(name, value string) bool {
		for _, v := range vars {
			if string(v) == name+"="+value {
				return true
			}
		}
		return false
	}
	return err == nil && has("CONTAINER_ID", l.cfg.ID) && has("CONTAINER_NAMESPACE", l.host.Namespace)
}

// dying says whether a process has ended or is about to: whose descriptors were closed by its end, and not by itself.
func dying(pid int) bool {
	const exiting = 0x4 // PF_EXITING in field 9 of /proc/PID/stat
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
	}
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(f) < 7 || f[0] == "Z" || f[0] == "X" {
		return true
	}
	flags, err := strconv.ParseUint(f[6], 10, 64)
	return err != nil || flags&exiting != 0
}

// describe says how a program has ended.
func describe(e reaper.Exit) string {
	switch {
	case e.Unknown != "":
		return "how is not known: " + e.Unknown
	case e.Signaled:
		return "by signal " + unix.SignalName(syscall.Signal(e.Status-128))
	}
	return fmt.Sprintf("exit status %d", e.Status)
}

// Unread is how many bytes wait in a FIFO; 0 for nil.
func Unread(f *os.File) int {
	n := 0
	control(f, func(fd int) { n, _ = unix.IoctlGetInt(fd, unix.TIOCINQ) })
	return n
}

// atEnd says that a FIFO is empty and nobody can write to it: true for nil.
func atEnd(f *os.File) bool {
	end := true
	control(f, func(fd int) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, 0)
		end = err == nil && fds[0].Revents&unix.POLLHUP != 0 && fds[0].Revents&unix.POLLIN == 0
	})
	return end
}

func control(f *os.File, fn func(fd int)) {
	if f == nil {
		return
	}
	if c, err := f.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { fn(int(fd)) })
	}
}
