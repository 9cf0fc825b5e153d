package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi"
)

// Flag tells a shim that it keeps a sandbox.
const Flag = "-sandbox"

// The first thread of a shim runs nothing: what is seen in /proc/PID is that thread. A goroutine that changes its thread for
// good (libcontainer enters the container's mount namespace in one) would leave it there, since the Go runtime cannot end a
// first thread: the shim would seem to work in another directory, and hold the namespace.
//
// In a shim that has Flag, Enter moves it: clients look at /proc/PID/ns of the pid that a sandbox has, which without an init is
// the shim itself.
var onMain chan func()

func init() {
	if slices.ContainsFunc(os.Args, func(a string) bool { return a == Flag || a == shimapi.VerbServe || a == shimapi.VerbAdopt }) {
		runtime.LockOSThread() // the first thread is had only here
		onMain = make(chan func())
	}
}

// Main runs fn, what a shim that serves does, beside the first thread, which does nothing meanwhile but what Enter asks.
func Main(fn func() error) error {
	if onMain == nil {
		return fn()
	}
	done := make(chan error, 1)
	go func() { done <- fn() }()
	for {
		select {
		case job := <-onMain:
			job()
		case err := <-done:
			return err
		}
	}
}

// Home are the namespaces that the first thread was in before. Nil: it is there.
type Home struct{ files []*os.File }

// Enter moves the first thread into the pinned namespaces. It is possible for all but a user namespace (NotImplemented by the
// kernel for a process with threads) and means nothing for one of pids: with those among kinds it does nothing, and gives nil.
func Enter(bundle string, kinds []string) (home *Home, err error) {
	if onMain == nil || slices.Contains(kinds, string(specs.UserNamespace)) || slices.Contains(kinds, string(specs.PIDNamespace)) {
		return nil, nil
	}
	done := make(chan struct{})
	onMain <- func() {
		defer close(done)
		home = &Home{}
		for _, kind := range kinds {
			var old, next *os.File
			if old, err = os.Open("/proc/thread-self/ns/" + shimapi.NamespaceName(kind)); err != nil {
				break
			}
			home.files = append(home.files, old)
			if next, err = os.Open(Path(bundle, kind)); err != nil {
				break
			}
			err = os.NewSyscallError("setns", setns(next))
			_ = next.Close()
			if err != nil {
				break
			}
		}
		if err != nil {
			err = errors.Join(fmt.Errorf("cannot enter the sandbox's namespaces: %w", err), home.back())
			home = nil
		}
	}
	<-done
	return home, err
}

// Leave undoes Enter; nil has nothing to undo.
func (h *Home) Leave() error {
	if h == nil {
		return nil
	}
	done := make(chan error, 1)
	onMain <- func() { done <- h.back() }
	return <-done
}

func (h *Home) back() (err error) {
	for _, f := range h.files {
		err = errors.Join(err, os.NewSyscallError("setns", setns(f)), f.Close())
	}
	h.files = nil
	return err
}

func setns(f *os.File) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := c.Control(func(fd uintptr) { err = unix.Setns(int(fd), 0) }); cerr != nil {
		return cerr
	}
	return err
}
