package boot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cgroups/early"
	"github.com/managerd/managerd/cmd/shim-runc/internal/handover"
	"github.com/managerd/managerd/cmd/shim-runc/internal/service"
	"github.com/managerd/managerd/cmd/shim-runc/internal/wire"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/parking"
)

// maxProcs is how many threads run Go code at once: a shim mostly waits, and each costs memory.
const maxProcs = 4

// lastEvents is how long the end waits for a client to read the last events.
const lastEvents = 5 * time.Second

// server is the serving shim.
type server struct {
	args     *args
	log      *slog.Logger
	reaper   *reaper.Reaper
	svc      *service.Service
	sandbox  *service.Sandbox // nil: it keeps a container
	listener *wire.Listener
	forward  *forwarder

	replacing sync.Mutex // held while the program is being replaced
}

// serve is the long life of a shim: it answers on the socket that it was handed as descriptor 3, or goes on in the place
// of another program, until it keeps nothing any more and is told to shut down. No signal but SIGKILL ends it.
func serve(a *args) error {
	runtime.GOMAXPROCS(min(maxProcs, runtime.NumCPU()))
	outlive()
	if err := os.Chdir(a.bundle); err != nil {
		return err
	}
	s := &server{args: a, log: openLog(a)}
	go s.tellStacks()
	received, err := handover.Receive()
	switch {
	case err != nil: // and nobody to give the process back to
	case received != nil:
		err = s.resume(received)
	default:
		if !a.sandbox {
			early.Attach() // Create follows
		}
		err = s.begin()
	}
	if err != nil {
		s.log.Error("cannot serve", "error", err)
		return err
	}
	return s.run()
}

// wireOptions say which requests can be under way while the program is replaced.
var wireOptions = wire.Options{Parks: service.Parks, Resume: service.Again}

// begin makes a shim of a bundle.
func (s *server) begin() (err error) {
	socket := os.NewFile(shimapi.ListenFD, fmt.Sprintf("descriptor %d", shimapi.ListenFD))
	if s.listener, err = wire.Listen(socket, wireOptions, nil); err != nil {
		return err
	}
	if s.reaper, err = reaper.New(); err != nil {
		return err
	}
	s.forward = newForwarder(0)
	cfg := s.config()
	cfg.Parking = os.Getenv(parking.EnvSocket)
	if err := s.make(cfg); err != nil || s.args.verb != shimapi.VerbAdopt {
		return err
	}
	if s.sandbox != nil {
		return adoptSandbox(s.sandbox, s.log)
	}
	return adopt(s.svc, s.log)
}

// make makes the service that is asked for.
func (s *server) make(cfg service.Config) (err error) {
	if !s.args.sandbox {
		s.svc, err = service.New(cfg)
		return err
	}
	if s.sandbox, err = service.NewSandbox(cfg); err == nil {
		s.svc = s.sandbox.Service
	}
	return err
}

// register adds what is served.
func (s *server) register(to *ttrpc.Server) {
	if s.sandbox == nil {
		shimapi.RegisterTask(to, s.svc)
		shim.RegisterShimService(to, s.svc)
		return
	}
	shimapi.RegisterSandbox(to, s.sandbox)
	shimapi.RegisterTask(to, s.sandbox)
	shim.RegisterShimService(to, s.sandbox)
}

func (s *server) config() service.Config {
	return service.Config{
		Namespace: s.args.namespace, ID: s.args.id, Bundle: s.args.bundle, Log: s.log, Reaper: s.reaper, Replace: s.replace,
		Forwards: s.args.forward,
	}
}

func (s *server) run() error {
	a, svc, log := s.args, s.svc, s.log
	server, err := ttrpc.NewServer(ttrpc.WithChainUnaryServerInterceptor(svc.Observe, svc.Count))
	if err != nil {
		return err
	}
	s.register(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), s.listener) }()
	forwarded := make(chan struct{})
	go func() {
		defer close(forwarded)
		if a.forward {
			s.forward.run(a, svc, log)
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
		_ = os.Remove(s.listener.Addr().String())
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
