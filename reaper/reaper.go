// Package reaper collects the exit of every child exactly once, in a process where a library also forks and waits on
// its own. It knows processes, not containers.
//
// A process-wide wait4(-1) would steal the children that libcontainer (or os/exec) waits for. So each process of
// interest is registered under the fork guard, before anyone could have reaped it, and waited for by its own pidfd,
// parked in Go's poller: no thread per process. Orphans that the kernel reparents to us (we are a child subreaper, see
// prctl(2)) are swept with wait4(-1), but only at moments when no fork is under way.
package reaper

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Reaper is the one waiter of a process. Make one per process, with New.
type Reaper struct {
	guard   sync.RWMutex // the fork guard: read-held around everything that forks, write-held around the sweep
	pending atomic.Bool  // an orphan may be waiting for a sweep that found the guard taken

	mu    sync.Mutex // a wait4 that reaps a registered process and the change of procs are one step
	procs map[int]*Process

	told      bool // the kernel tells the exit of any process through its pidfd
	connector connector

	begun   chan struct{} // closed by Begin: nothing is reaped before
	sigchld chan os.Signal
	done    chan struct{}
	swept   sync.WaitGroup
}

// Exit is how a process ended.
type Exit struct {
	Status   int       // the exit code, or 128 + the signal's number
	Signaled bool      // ended by a signal
	At       time.Time // when we learnt of it
	Unknown  string    // why Status is UnknownStatus: nobody saw the exit; empty when it is exact
}

// Process is a registered child, or an adopted process.
type Process struct {
	pid   int
	child bool                             // ours: only then its exit is taken away by reaping it
	wait  func() (*os.ProcessState, error) // not nil: reaps it, see ForkWaited
	ticks uint64                           // of an adopted one
	deaf  error                            // why nobody listens for its end, where the kernel needs that
	pidfd *os.File
	done  chan struct{}
	exit  Exit
}

// New makes this process a child subreaper and starts collecting orphans. Close ends that.
func New() (*Reaper, error) {
	r, err := NewHeld()
	if err == nil {
		r.Begin()
	}
	return r, err
}

// Begin lets a reaper of NewHeld reap. It is to be called once.
func (r *Reaper) Begin() { close(r.begun) }

// NewHeld is New, but nothing is reaped until Begin: whoever takes processes over, and may have to leave them to somebody
// else after all, must not have taken their exits away.
func NewHeld() (*Reaper, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("cannot become a child subreaper: %w", err)
	}
	r := &Reaper{procs: map[int]*Process{}, told: tells(), begun: make(chan struct{}), sigchld: make(chan os.Signal, 1), done: make(chan struct{})}
	signal.Notify(r.sigchld, unix.SIGCHLD)
	r.swept.Add(1)
	go func() {
		defer r.swept.Done()
		select {
		case <-r.begun:
		case <-r.done:
			return
		}
		for {
			r.sweep()
			select {
			case <-r.sigchld:
			case <-r.done:
				return
			}
		}
	}()
	return r, nil
}

// Close stops the collection of orphans and waits for it. Registered processes are still waited for.
func (r *Reaper) Close() {
	signal.Stop(r.sigchld)
	close(r.done)
	r.swept.Wait()
}

// Fork runs fn, which starts a child and returns its pid, and registers that child before anything else can reap it.
// fn may start and wait for other children meanwhile. An error of fn is returned as it is.
func (r *Reaper) Fork(fn func() (pid int, err error)) (*Process, error) { return r.ForkWaited(fn, nil) }

// ForkWaited is Fork for a child of which somebody else keeps an os.Process, with a pidfd of its own in it: that is closed
// by the Wait that reaps the child, or else by the garbage collector, some time. wait is that Wait. It is called once, when
// the child has ended, so that it does not block.
func (r *Reaper) ForkWaited(fn func() (pid int, err error), wait func() (*os.ProcessState, error)) (*Process, error) {
	r.guard.RLock()
	defer r.release()
	pid, err := fn()
	if err != nil {
		return nil, err
	}
	return r.register(pid, wait)
}

// Guard runs fn, which starts children and waits for them itself, safe from the sweep.
func (r *Reaper) Guard(fn func() error) error {
	r.guard.RLock()
	defer r.release()
	return fn()
}

// Freeze waits for every fork under way and keeps new ones from beginning, and every exit where it is, until Thaw.
func (r *Reaper) Freeze() {
	r.guard.Lock()
	r.mu.Lock()
}

// Thaw ends a Freeze.
func (r *Reaper) Thaw() {
	r.mu.Unlock()
	r.guard.Unlock()
	r.sweep()
}

// Taken says, between Freeze and Thaw, whether the exit of p is with us only: the kernel does not have it any more.
func (r *Reaper) Taken(p *Process) bool {
	select {
	case <-p.done:
		return true
	default:
		return p.child && r.procs[p.pid] != p
	}
}

func (r *Reaper) release() {
	r.guard.RUnlock()
	if r.pending.Load() {
		r.sweep()
	}
}

// register opens the pidfd and starts waiting. The caller holds the guard, so nobody else has reaped pid.
func (r *Reaper) register(pid int, wait func() (*os.ProcessState, error)) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("cannot open pidfd of process %d: %w", pid, err)
	}
	p := &Process{pid: pid, child: true, wait: wait, pidfd: os.NewFile(uintptr(fd), "pidfd"), done: make(chan struct{})}
	r.mu.Lock()
	r.procs[pid] = p
	r.mu.Unlock()
	go r.await(p, func() bool { return r.reap(p) })
	return p, nil
}

// await parks in the poller until p has ended, and reaps it unless the sweep was first.
func (r *Reaper) await(p *Process, ended func() bool) {
	<-r.begun
	conn, err := p.pidfd.SyscallConn()
	if err == nil {
		err = conn.Read(func(uintptr) bool { return ended() })
	}
	if err != nil {
		// The poller refuses only a closed file, and Forget is for after this.
		panic(fmt.Sprintf("reaper: cannot wait for process %d: %v", p.pid, err))
	}
	close(p.done)
}

// reap says whether p has ended; its exit is set then.
func (r *Reaper) reap(p *Process) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.procs[p.pid] != p {
		return true // the sweep reaped it, and stored the exit
	}
	pid, err := ended(unix.P_PID, p.pid)
	if pid == 0 && err == nil {
		return false
	}
	r.takeLocked(p)
	return true
}

// takeLocked reaps a registered process that has ended, and sets its exit.
func (r *Reaper) takeLocked(p *Process) {
	delete(r.procs, p.pid)
	var ws unix.WaitStatus
	if wait := p.wait; wait != nil {
		p.wait = nil                          // what it keeps alive is much
		if state, _ := wait(); state != nil { // the error is that the status is not 0
			p.exit = exitOf(unix.WaitStatus(state.Sys().(syscall.WaitStatus)))
			return
		}
	}
	if _, err := wait4(p.pid, &ws); err != nil {
		// ECHILD: somebody waited for it behind our back. Say so in the status rather than invent a success.
		p.exit = unknown("somebody else waited for it")
		return
	}
	p.exit = exitOf(ws)
}

// sweep reaps orphans, if no fork is under way; else the last one under way sweeps when it ends.
func (r *Reaper) sweep() {
	// The flag is up before the try: whoever holds the guard looks at it after letting go.
	r.pending.Store(true)
	select {
	case <-r.begun:
	default:
		return // Begin sweeps
	}
	if !r.guard.TryLock() {
		return
	}
	defer r.guard.Unlock()
	r.pending.Store(false)
	for {
		if !r.sweepOne() {
			return
		}
	}
}

func (r *Reaper) sweepOne() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := ended(unix.P_ALL, 0)
	if err != nil || pid == 0 {
		return false
	}
	if p := r.procs[pid]; p != nil {
		r.takeLocked(p) // its pidfd is readable now: await finds it gone from procs
		return true
	}
	var ws unix.WaitStatus
	_, err = wait4(pid, &ws)
	return err == nil
}

// ended gives a child that has ended and is not reaped, of those that waitid(2) is asked for; 0 for none.
func ended(idType, id int) (pid int, err error) {
	for {
		var info unix.Siginfo
		err := unix.Waitid(idType, id, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		// si_pid is the first word of the union, which is aligned like a pointer.
		const union = (3*4 + unsafe.Sizeof(uintptr(0)) - 1) / unsafe.Sizeof(uintptr(0)) * unsafe.Sizeof(uintptr(0))
		return int(*(*int32)(unsafe.Add(unsafe.Pointer(&info), union))), err
	}
}

func wait4(pid int, ws *unix.WaitStatus) (int, error) {
	for {
		got, err := unix.Wait4(pid, ws, unix.WNOHANG, nil)
		if !errors.Is(err, unix.EINTR) {
			return got, err
		}
	}
}

func exitOf(ws unix.WaitStatus) Exit {
	e := Exit{Status: ws.ExitStatus(), At: time.Now()}
	if ws.Signaled() {
		e.Signaled = true
		e.Status = 128 + int(ws.Signal())
	}
	return e
}

// Pid is the process id in our pid namespace. Use it to show, and Signal to act.
func (p *Process) Pid() int { return p.pid }

// Done is closed when the process has ended and Exit is set.
func (p *Process) Done() <-chan struct{} { return p.done }

// Over says whether the process has ended, as Done will say in a moment.
func (p *Process) Over() bool {
	select {
	case <-p.done:
		return true
	default:
	}
	over := false
	p.control(func(fd int) { over = readable(fd) })
	return over
}

// Exit waits for the end and says how it was.
func (p *Process) Exit() Exit {
	<-p.done
	return p.exit
}

// Pidfd gives another descriptor of the process, which the caller closes: whoever holds it learns how the process ended,
// also when we do not live any more, and on Linux 6.15 and later even when it has ended before. os.ErrProcessDone after
// Forget.
func (p *Process) Pidfd() (*os.File, error) {
	fd, err := -1, error(os.ErrProcessDone)
	p.control(func(own int) { fd, err = unix.FcntlInt(uintptr(own), unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// Forget closes the pidfd of a process that has ended, once its exit is written down where another program finds it. Without
// it the descriptor goes with the process's memory.
func (p *Process) Forget() {
	<-p.done
	if p.pidfd != nil {
		_ = p.pidfd.Close()
	}
}

// Signal sends sig to this very process, never to another that got its pid: os.ErrProcessDone when it has ended.
func (p *Process) Signal(sig unix.Signal) error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return os.ErrProcessDone
	}
	var serr error
	err = conn.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	switch {
	case err != nil, errors.Is(serr, unix.ESRCH): // it was forgotten, or has ended
		return os.ErrProcessDone
	case serr != nil:
		return fmt.Errorf("cannot send signal %d to process %d: %w", sig, p.pid, serr)
	}
	return nil
}
