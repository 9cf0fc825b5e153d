package boot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cgroups/early"
	"github.com/managerd/managerd/cmd/shim-runc/internal/service"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/parking"
)

// maxProcs is how many threads run Go code at once: a shim mostly waits, and each costs memory.
const maxProcs = 4

// lastEvents is how long the end waits for a client to read the last events.
const lastEvents = 5 * time.Second

// serve is the long life of a shim: it answers on the socket that it was handed as descriptor 3, until it keeps nothing
// any more and is told to shut down. No signal but SIGKILL ends it.
func serve(a *args) error {
	runtime.GOMAXPROCS(min(maxProcs, runtime.NumCPU()))
	outlive()
	early.Attach() // Create follows
	if err := os.Chdir(a.bundle); err != nil {
		return err
	}
	log := openLog(a)
	go tellStacks(filepath.Join(a.bundle, shimapi.StacksFile), log)
	listener, err := inherited()
	if err != nil {
		return err
	}
	r, err := reaper.New()
	if err != nil {
		return err
	}
	svc, err := service.New(service.Config{
		Namespace: a.namespace, ID: a.id, Bundle: a.bundle, Log: log, Reaper: r, Parking: os.Getenv(parking.EnvSocket),
	})
	if err == nil && a.verb == shimapi.VerbAdopt {
		err = adopt(svc, log)
	}
	if err != nil {
		log.Error("cannot serve", "error", err)
		return err
	}
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(svc.Observe))
	if err != nil {
		return err
	}
	shimapi.RegisterTask(server, svc)
	shim.RegisterShimService(server, svc)
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), listener) }()
	forwarded := make(chan struct{})
	go func() {
		defer close(forwarded)
		if a.forward {
			forward(a, svc, log)
		}
	}()

	select {
	case err := <-served:
		log.Error("cannot serve any more", "error", err)
		return err
	case <-svc.Ending():
	}
	<-forwarded
	last, cancelLast := context.WithTimeout(context.Background(), lastEvents)
	defer cancelLast()
	svc.Finish(last)
	if a.forward {
		// Nobody else knows the name: under managerd, the daemon removes what it made.
		_ = os.Remove(listener.Addr().String())
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		log.Warn("shutdown", "error", err)
	}
	return svc.Close()
}

// outlive keeps signals from ending us. They are caught and dropped, not ignored: an ignored signal stays ignored across
// fork and execve(2), in every container too.
func outlive() {
	dropped := make(chan os.Signal, 1)
	signal.Notify(dropped, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGPIPE, unix.SIGQUIT)
	go func() {
		for range dropped { //nolint:revive // on purpose: nothing is done
		}
	}()
}

// inherited is the listening socket at descriptor 3.
func inherited() (*net.UnixListener, error) {
	f := os.NewFile(shimapi.ListenFD, "listener")
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d is not a listening socket: %w", shimapi.ListenFD, err)
	}
	_ = f.Close()
	u, ok := l.(*net.UnixListener)
	if !ok {
		return nil, fmt.Errorf("descriptor %d is a %T, not a unix socket", shimapi.ListenFD, l)
	}
	return u, nil
}

// openLog logs to the bundle's FIFO, which the daemon copies to its own log. It is held O_RDWR and non-blocking: without
// a daemon nothing fails, and when it is full, lines are dropped. A panic's stack goes there too.
func openLog(a *args) *slog.Logger {
	level := slog.LevelInfo
	if a.debug {
		level = slog.LevelDebug
	}
	out := os.Stderr
	fd, err := unix.Open(filepath.Join(a.bundle, shimapi.LogFIFO), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_APPEND, 0)
	if err == nil {
		// Not through Go's poller, which would wait for room instead of dropping.
		_ = unix.Dup3(fd, 2, 0)
		out = os.NewFile(uintptr(fd), shimapi.LogFIFO)
		_ = debug.SetCrashOutput(out, debug.CrashOptions{})
	}
	return slog.New(slog.NewTextHandler(dropper{out}, &slog.HandlerOptions{Level: level})).With("namespace", a.namespace, "id", a.id)
}

// dropper writes without ever waiting.
type dropper struct{ f *os.File }

func (d dropper) Write(p []byte) (int, error) {
	c, err := d.f.SyscallConn()
	if err != nil {
		return 0, err
	}
	err = c.Control(func(fd uintptr) { _, _ = unix.Write(int(fd), p) })
	return len(p), err
}
