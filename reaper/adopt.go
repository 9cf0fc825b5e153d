package reaper

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// UnknownStatus is the status of a process whose exit nobody saw.
const UnknownStatus = 255

// Adopt registers a process that another incarnation of this program forked: a child, if the program was replaced in
// place, or else somebody else's by now. ticks is when it began (field 22 of /proc/PID/stat). pidfd, which is the
// reaper's from here on, is one that was opened while the process was known to be there; without it (nil) the process
// is looked up by its number. A process that has ended has an exact exit as well, as long as the kernel tells: while it
// is a zombie, or, with a pidfd, on Linux 6.15 and later; one that ends from now on, on every kernel that has the process
// connector. Otherwise Exit.Unknown says why not.
func (r *Reaper) Adopt(pid int, ticks uint64, pidfd *os.File) (*Process, error) {
	r.guard.RLock() // a child is not swept away before it is registered
	defer r.release()
	p := &Process{pid: pid, ticks: ticks, done: make(chan struct{})}
	if !r.told {
		// Before it is looked at: from then on its end is not missed. Without the connector, unknown says so.
		if p.deaf = r.connector.watch(pid); p.deaf != nil {
			r.connector.forget(pid)
		}
	}
	adopted := false
	defer func() {
		if !adopted {
			r.connector.forget(pid)
		}
	}()
	if pidfd != nil {
		var err error
		if p.pidfd, err = pollable(pidfd); err != nil {
			return nil, fmt.Errorf("cannot adopt process %d: %w", pid, err)
		}
	} else {
		fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
		switch st := readStat(pid); {
		case errors.Is(err, unix.ESRCH), err == nil && (!st.there || st.ticks != ticks):
			if err == nil {
				_ = unix.Close(fd)
			}
			p.exit = unknown("it ended while nothing of ours held a pidfd of it")
			close(p.done)
			return p, nil
		case err != nil:
			return nil, fmt.Errorf("cannot open pidfd of process %d: %w", pid, err)
		}
		p.pidfd = os.NewFile(uintptr(fd), "pidfd")
	}
	if r.child(p) {
		p.child = true
		r.mu.Lock()
		r.procs[pid] = p
		r.mu.Unlock()
		go r.await(p, func() bool { return r.reap(p) })
		return p, nil
	}
	adopted = true
	go r.await(p, func() bool { return r.ended(p) })
	return p, nil
}

// pollable is f for Go's poller, whatever f was before. It closes f.
func pollable(f *os.File) (*os.File, error) {
	defer func() { _ = f.Close() }()
	c, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, derr := -1, error(nil)
	if err := c.Control(func(n uintptr) { fd, derr = unix.FcntlInt(n, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || derr != nil {
		return nil, errors.Join(err, derr)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// child says whether p is a child of ours, ended or not.
func (r *Reaper) child(p *Process) (is bool) {
	p.control(func(fd int) {
		err := error(unix.EINTR)
		for errors.Is(err, unix.EINTR) {
			err = unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		}
		is = err == nil
	})
	return is
}

// control runs fn with p's pidfd, if that is open.
func (p *Process) control(fn func(fd int)) {
	if c, err := p.pidfd.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { fn(int(fd)) })
	}
}

// ended says whether a process that is not our child has ended; its exit is set then.
func (r *Reaper) ended(p *Process) (over bool) {
	p.control(func(fd int) {
		// Not by the state in /proc: a leader whose other threads live is a zombie too.
		if over = readable(fd); !over {
			return
		}
		ws, known := r.exitInfo(fd)
		if !known {
			// The number may pass to another process at any moment, but not with the same start.
			if st := readStat(p.pid); st.ticks == p.ticks && st.zombie && st.code >= 0 {
				ws, known = unix.WaitStatus(st.code), true
			} else if ws, known = r.exitInfo(fd); !known { // it was reaped between the two questions
				ws, known = r.connector.exit(p.pid)
			}
		}
		r.connector.forget(p.pid)
		p.exit = p.unseen()
		if known {
			p.exit = exitOf(ws)
		}
	})
	return over
}

func (p *Process) unseen() Exit {
	why := "another process reaped it, and this kernel keeps no exit status in a pidfd (Linux 6.15 does)"
	if p.deaf != nil {
		why += "; " + p.deaf.Error()
	}
	return unknown(why)
}

// tells says whether this kernel tells through a pidfd how a process ended that somebody else has reaped.
func tells() bool {
	var u unix.Utsname
	var major, minor int
	if err := unix.Uname(&u); err != nil {
		return false
	}
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); err != nil {
		return false
	}
	return major > 6 || major == 6 && minor >= 15
}

// exitInfo asks the kernel for the wait status of a process that has been reaped.
func (r *Reaper) exitInfo(fd int) (ws unix.WaitStatus, reaped bool) {
	if !r.told {
		return 0, false
	}
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	if err := unix.IoctlPidfdInfo(fd, &info); err != nil || info.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return 0, false
	}
	return unix.WaitStatus(info.Exit_code), true
}

func readable(fd int) bool {
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return err == nil && n > 0
		}
	}
}

func unknown(why string) Exit { return Exit{Status: UnknownStatus, At: time.Now(), Unknown: why} }

// stat is what we use of /proc/PID/stat.
type stat struct {
	there, zombie bool
	ticks         uint64
	code          int // wait status, once it has ended; -1 when it may not be seen
}

func readStat(pid int) stat {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}
	}
	f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(f) < 50 { // field 3 is the first after the name
		return stat{}
	}
	s := stat{there: true, zombie: f[0] == "Z" || f[0] == "X", code: -1}
	s.ticks, _ = strconv.ParseUint(f[19], 10, 64)
	if n, err := strconv.Atoi(f[49]); err == nil {
		s.code = n
	}
	return s
}

// StartTicks is field 22 of /proc/PID/stat: with the pid it names a process for as long as the machine runs. 0: there is none.
func StartTicks(pid int) uint64 { return readStat(pid).ticks }
