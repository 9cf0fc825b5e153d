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

// What /proc/PID shows of a process, its directory and its namespaces, is its first thread's. Nothing else runs on that of a
// shim, for two reasons. libcontainer moves a thread, whichever it gets, into the mount namespace of each container that it
// makes; the first one would stay there, as Go cannot end it: nobody would find the shim by its bundle any more, and the
// mounts of its container would live as long as it does. And clients look at /proc/PID/ns of the pid that a sandbox has:
// without an init that is the shim itself, and its first thread is in the sandbox's namespaces.
var onMain chan func()

func init() {
	serves := func(arg string) bool { return arg == shimapi.VerbServe || arg == shimapi.VerbAdopt }
	if n := len(os.Args); n > 1 && serves(os.Args[n-1]) || slices.Contains(os.Args, Flag) { // the first thread is had only here
		runtime.LockOSThread()
		onMain = make(chan func())
	}
}

// Main runs fn, what a shim serves with, on other threads than the first, which is left to Enter.
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
