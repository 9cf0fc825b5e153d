// Package server builds the daemon out of its parts, opens its sockets and serves. Parts are built in order; one that
// fails is reported and left out, with what needs it, unless the configuration requires it.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/coreos/go-systemd/v22/daemon"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"

	"github.com/managerd/managerd/manager/config"
	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/events"
	"github.com/managerd/managerd/manager/gc"
	"github.com/managerd/managerd/manager/introspection"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/sandboxes"
	"github.com/managerd/managerd/manager/tasks"
)

// draining is how long a graceful stop waits for calls under way. Streams and waits, which may last as long as a
// container, are not waited for: their clients come back.
const draining = 5 * time.Second

// flushing is how long, after that, connections have to carry the last answers.
const flushing = time.Second

// speaking is how long clients have to begin, which were let in when the daemon was told to stop.
const speaking = time.Second

// Server is a daemon. Run serves; Close, also after Run, releases what New took.
type Server struct {
	cfg     *config.Config
	log     *slog.Logger
	plugins *introspection.Registry
	health  *health.Server

	grpc      *grpc.Server
	calls     *calls
	ttrpc     *ttrpc.Server
	tasks     *tasks.Service        // nil when they could not be built
	sandboxes *sandboxes.Controller // so, too
	db        *metadata.DB

	content *content.Store // nil when it could not be opened

	exchange  *events.Exchange
	collector *gc.Scheduler // nil: it is left out

	watching  sync.WaitGroup // the watchdog, the recovery of content
	listeners []net.Listener // gRPC, ttrpc
	side      []*sideServer  // metrics, debugging
	closers   []func() error // run backwards by Close
}

// New takes the directories and builds every part. Nothing is served yet. An error says what keeps the daemon from
// starting: a directory or a database that cannot be used, a part that the configuration requires.
func New(ctx context.Context, cfg *config.Config, log *slog.Logger) (_ *Server, err error) {
	s := &Server{cfg: cfg, log: log, plugins: &introspection.Registry{}, health: health.NewServer(), calls: newCalls()}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	for _, dir := range []struct {
		key, path string
		mode      os.FileMode
	}{{"root", cfg.Root, 0o711}, {"state", cfg.State, 0o711}} {
		if !filepath.IsAbs(dir.path) {
			return nil, fmt.Errorf("%s %q must be an absolute path", dir.key, dir.path)
		}
		if err := os.MkdirAll(dir.path, dir.mode); err != nil {
			return nil, fmt.Errorf("cannot make the %s directory: %w", dir.key, err)
		}
	}
	if filepath.Clean(cfg.Root) == filepath.Clean(cfg.State) {
		return nil, fmt.Errorf("root and state are both %s: state must not outlive a reboot, root must", cfg.Root)
	}
	for _, dir := range []string{cfg.Root, cfg.State} {
		held, err := lock(ctx, dir)
		if err != nil {
			return nil, err
		}
		s.closers = append(s.closers, held.Close)
	}
	setOOMScore(cfg.OOMScore, log)
	return s, s.build(ctx)
}

// Address is where gRPC is served: a path.
func (s *Server) Address() string { return unixPath(s.cfg.GRPC.Address) }

// ttrpcAddress is where shims of others send their events.
func (s *Server) ttrpcAddress() string {
	if s.cfg.TTRPC.Address != "" {
		return unixPath(s.cfg.TTRPC.Address)
	}
	return s.Address() + ".ttrpc"
}

// Run serves until ctx ends, or until a listener breaks. The tasks that live are entered first, which takes no longer
// than to list their directories; their shims are looked for while clients are served. Then calls under way have a
// moment to end, and shims are let go of: they live on.
func (s *Server) Run(ctx context.Context) error {
	if s.tasks != nil {
		if err := s.tasks.Recover(); err != nil {
			// What could be listed is there; the rest is said, and takes no other task away.
			s.log.Error("not every task could be looked for", "error", err)
		}
	}
	if s.sandboxes != nil {
		if err := s.sandboxes.Recover(); err != nil {
			s.log.Error("not every sandbox could be looked for", "error", err)
		}
		if s.cfg.Task.UpgradeShims != "never" {
			if err := s.sandboxes.UpgradeShims(); err != nil {
				return err
			}
		}
	}
	failed := make(chan error, 4)
	serve := func(what, address string, l net.Listener, fn func(net.Listener) error) {
		go func() {
			if err := fn(l); err != nil && ctx.Err() == nil {
				failed <- fmt.Errorf("cannot serve %s on %s: %w", what, address, err)
			}
		}()
		s.log.Info("serving", "protocol", what, "address", address)
	}
	reports, err := s.listen(s.ttrpcAddress(), s.cfg.TTRPC.UID, s.cfg.TTRPC.GID)
	if err != nil {
		return err
	}
	// Calls under way outlive ctx: stop lets them end.
	drained := newDrain(reports)
	hatch := newGate(drained, greetingTTRPC)
	serve("ttrpc", s.ttrpcAddress(), hatch, func(l net.Listener) error { return s.ttrpc.Serve(context.WithoutCancel(ctx), l) })
	api, err := s.listen(s.Address(), s.cfg.GRPC.UID, s.cfg.GRPC.GID)
	if err != nil {
		return err
	}
	door := newGate(api, greetingHTTP2)
	serve("grpc", s.Address(), door, s.grpc.Serve)
	s.exchange.Open()
	if err := s.serveSide(); err != nil {
		return err
	}
	s.Ready()
	if err := s.adopt(ctx); err != nil {
		return err
	}
	s.watch(ctx)
	s.restoreContent(ctx)
	collecting, endCollecting := context.WithCancel(ctx)
	defer endCollecting()
	collected := make(chan struct{})
	go func() {
		defer close(collected)
		if s.collector != nil {
			s.collector.Run(collecting)
		}
	}()
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	notify(s.log, daemon.SdNotifyStopping)
	s.watching.Wait()
	s.stop(door, hatch, drained)
	endCollecting()
	<-collected
	return err
}

// adopt looks for the shims of the tasks that live, while clients are served.
func (s *Server) adopt(ctx context.Context) error {
	if s.tasks == nil {
		return nil
	}
	began := time.Now()
	adopted, err := s.tasks.Adopt(s.calls.yield(ctx))
	if err != nil {
		return err
	}
	if policy := s.cfg.Task.UpgradeShims; policy != "never" {
		if err := s.tasks.UpgradeShims(policy == "idle", adopted); err != nil {
			return err
		}
	}
	go func() {
		select {
		case <-adopted:
			s.log.Info("tasks recovered", "took", time.Since(began).Round(time.Millisecond))
		case <-ctx.Done():
		}
	}()
	return nil
}

// listen opens a socket that Close closes.
func (s *Server) listen(address string, uid, gid int) (net.Listener, error) {
	l, err := listen(address, uid, gid)
	if err == nil {
		s.listeners = append(s.listeners, l)
	}
	return l, err
}

// stop takes no new calls, of gRPC by door and of ttrpc by hatch, and lets those under way end, for a moment.
func (s *Server) stop(door, hatch *gate, events *drain) {
	var shut sync.WaitGroup
	shut.Go(func() { hatch.shut(speaking) })
	door.shut(speaking)
	shut.Wait()
	done := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		close(done)
	}()
	over := time.After(draining)
	select {
	case <-done:
	case <-s.calls.ended():
	case <-over:
	}
	s.health.Shutdown()
	// The answers that were given last are still on their way, and calls that were: the connections close when they, and all
	// streams, have ended.
	s.calls.endLasts()
flush:
	for {
		select {
		case <-done:
			break flush
		case <-over:
			break flush
		case <-time.After(flushing):
			if s.calls.none() { // a stream whose handler waits for its client
				break flush
			}
		}
	}
	if s.sandboxes != nil {
		s.sandboxes.Close()
	}
	if s.tasks != nil {
		s.tasks.Close()
	}
	s.grpc.Stop()
	<-done
	events.end(flushing)
	_ = s.ttrpc.Close()
}

// Close releases everything; the sockets' files stay, see listen. Shims and containers live on.
func (s *Server) Close() error {
	var errs []error
	if s.grpc != nil {
		s.grpc.Stop()
	}
	for _, side := range s.side {
		errs = append(errs, side.Close())
	}
	for _, l := range s.listeners {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if s.sandboxes != nil {
		s.sandboxes.Close()
	}
	if s.tasks != nil {
		s.tasks.Close()
	}
	for i := len(s.closers) - 1; i >= 0; i-- {
		errs = append(errs, s.closers[i]())
	}
	s.closers = nil
	return errors.Join(errs...)
}

// setOOMScore sets how readily the kernel kills this daemon (proc_pid_oom_score_adj(5)). Without CAP_SYS_RESOURCE it
// cannot be lowered, which keeps nothing from working.
func setOOMScore(score int, log *slog.Logger) {
	if score == 0 {
		return
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(score)), 0); err != nil {
		log.Warn("cannot set oom_score", "oom_score", score, "error", err)
	}
}
