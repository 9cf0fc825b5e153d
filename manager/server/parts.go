package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/managerd/managerd/manager/api"
	"github.com/managerd/managerd/manager/archive/local"
	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/config"
	"github.com/managerd/managerd/manager/containers"
	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/eventlog"
	"github.com/managerd/managerd/manager/events"
	"github.com/managerd/managerd/manager/gc"
	"github.com/managerd/managerd/manager/images"
	"github.com/managerd/managerd/manager/introspection"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/mounts"
	"github.com/managerd/managerd/manager/parking"
	"github.com/managerd/managerd/manager/registry"
	"github.com/managerd/managerd/manager/sandboxes"
	"github.com/managerd/managerd/manager/shims"
	"github.com/managerd/managerd/manager/snapshots"
	"github.com/managerd/managerd/manager/streaming"
	"github.com/managerd/managerd/manager/tasks"
	"github.com/managerd/managerd/manager/transfer"
	"github.com/managerd/managerd/manager/verify"
	wire "github.com/managerd/managerd/shimapi/parking"
	"github.com/managerd/managerd/shimapi/version"
)

// parts is what the services are made of; a field is set when the plugin that builds it works.
type parts struct {
	exchange  *events.Exchange
	eventLog  *eventlog.Log // nil: it does not work
	content   *content.Store
	snapshots *snapshots.Store
	mounts    *mounts.Store // nil: it does not work
	differs   map[string]api.Differ
	shims     *shims.Manager
	collector *gc.Scheduler // nil: it is left out
	streams   *streaming.Manager
	verifier  *verify.Dir // nil: it is left out
	transfer  *transfer.Service
	registry  *registry.Registry
}

// collect is what the API calls when a client waits for a collection.
func (p *parts) collect(ctx context.Context) error {
	if p.collector == nil {
		return fmt.Errorf("the collector does not work: %w", errdefs.ErrUnavailable)
	}
	return p.collector.Collect(ctx)
}

// plugin is one part of the daemon: what it is called, what it needs, and how it is built.
type plugin struct {
	introspection.Plugin
	vital        bool // the daemon does not start without it
	build        func() error
	capabilities func() []string // once it is built; nil: those of Plugin
}

// register is anything with a gRPC service.
type register interface{ Register(*grpc.Server) }

// build builds every plugin that is not disabled, in the order of the list: what is needed stands above who needs it.
func (s *Server) build(ctx context.Context) error {
	s.grpc = newGRPC(s.cfg, s.calls, s.log)
	t, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(recoverTTRPC(s.log)))
	if err != nil {
		return fmt.Errorf("cannot make the ttrpc server: %w", err)
	}
	s.ttrpc = t
	works := map[string]bool{} // by type: one of them is enough
	failed := map[string]error{}
	known := map[string]bool{}
	for _, p := range s.list(ctx) {
		known[p.Name()] = true
		if slices.Contains(s.cfg.DisabledPlugins, p.Name()) {
			if p.vital {
				return fmt.Errorf("plugin %s cannot be disabled: nothing works without it", p.Name())
			}
			failed[p.Name()] = errors.New("it is disabled")
			continue
		}
		for _, need := range p.Requires {
			if !works[need] {
				p.Err = errors.Join(p.Err, fmt.Errorf("requires %s, of which none works: %w", need, errdefs.ErrUnavailable))
			}
		}
		if p.Err == nil {
			p.Err = guarded(p.build)
		}
		switch {
		case p.Err == nil:
			works[p.Type] = true
			if p.capabilities != nil {
				p.Capabilities = p.capabilities()
			}
			s.log.Debug("plugin works", "plugin", p.Name())
		case p.vital:
			return p.Err
		case p.Skipped():
			s.log.Info("plugin is left out: this machine cannot", "plugin", p.Name(), "reason", p.Err)
		default:
			s.log.Error("plugin is left out", "plugin", p.Name(), "error", p.Err)
		}
		if p.Err != nil {
			failed[p.Name()] = p.Err
		}
		s.plugins.Add(p.Plugin)
	}
	for _, name := range s.cfg.DisabledPlugins {
		if !known[name] {
			s.log.Warn("disabled_plugins names a plugin that there is not", "plugin", name)
		}
	}
	for _, name := range s.cfg.RequiredPlugins {
		if err := failed[name]; err != nil {
			return fmt.Errorf("required plugin %s does not work: %w", name, err)
		}
		if !known[name] {
			return fmt.Errorf("required plugin %s does not exist", name)
		}
	}
	s.health.SetServingStatus("", healthapi.HealthCheckResponse_SERVING)
	return nil
}

// guarded makes an error of a panic, such as damaged pages of the database cause: the other parts are built all the same.
func guarded(build func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("it panicked: %v: %w\n%s", p, errdefs.ErrInternal, debug.Stack())
		}
	}()
	return build()
}

// list is the daemon, part by part.
func (s *Server) list(ctx context.Context) []plugin {
	var (
		p        parts
		platform = []string{runtime.GOOS + "/" + runtime.GOARCH}
	)
	service := func(id string, requires []string, make func() register) plugin {
		return plugin{Plugin: introspection.Plugin{Type: introspection.TypeGRPC, ID: id, Requires: requires}, build: func() error {
			make().Register(s.grpc)
			return nil
		}}
	}
	meta := []string{introspection.TypeMetadata}
	return slices.Concat([]plugin{
		{Plugin: introspection.Plugin{Type: introspection.TypeEvent, ID: "exchange"}, vital: true, build: func() error {
			p.exchange = events.NewExchange()
			s.exchange = p.exchange
			return nil
		}},
		{Plugin: introspection.Plugin{Type: introspection.TypeEvent, ID: "log", Requires: []string{introspection.TypeEvent}}, build: func() (err error) {
			if p.eventLog, err = eventlog.Open(filepath.Join(s.cfg.Root, eventlog.Dir), eventlog.Default, s.log); err == nil {
				p.exchange.Keep(p.eventLog)
				s.closers = append(s.closers, p.eventLog.Close)
			}
			return err
		}},
		{Plugin: introspection.Plugin{Type: introspection.TypeMetadata, ID: "bolt", Warn: s.recoveryWarning}, vital: true, build: s.openDatabase},
		{Plugin: introspection.Plugin{Type: introspection.TypeContent, ID: localContent, Requires: meta,
			Exports: map[string]string{"root": filepath.Join(s.cfg.Root, content.Dir)}}, build: func() (err error) {
			p.content, err = content.New(s.cfg.Root, s.cfg.ContentSharing, s.db, s.db)
			s.content = p.content
			return err
		}},
	}, s.snapshotters(ctx, &p, platform), []plugin{
		{Plugin: introspection.Plugin{Type: introspection.TypeDiff, ID: "walking", Platforms: platform,
			Requires: []string{introspection.TypeContent}}, build: func() error {
			p.differ("walking", api.NewWalking(local.NewContent(p.content), s.applyOptions()))
			return nil
		}},
		{Plugin: introspection.Plugin{Type: introspection.TypeLease, ID: "manager", Requires: meta}, build: func() error { return nil }},
		{Plugin: introspection.Plugin{Type: introspection.TypeGRPC, ID: "mounts", Platforms: platform, Requires: meta}, build: func() error {
			store, err := mounts.New(s.cfg.State, s.db, s.log)
			if err == nil {
				p.mounts = store // the collector's, too
				api.NewMounts(store).Register(s.grpc)
			}
			return err
		}},
		{Plugin: introspection.Plugin{Type: introspection.TypeGC, ID: "scheduler", Requires: meta}, build: func() error {
			p.collector = gc.NewScheduler(&gc.Collector{DB: s.db, Content: p.content, Snapshots: p.snapshots, Mounts: p.mounts, Events: s.db, Log: s.log}, gc.Settings{
				PauseThreshold: s.cfg.GC.PauseThreshold, DeletionThreshold: s.cfg.GC.DeletionThreshold, MutationThreshold: s.cfg.GC.MutationThreshold,
				ScheduleDelay: config.Delay(s.cfg.GC.ScheduleDelay), StartupDelay: config.Delay(s.cfg.GC.StartupDelay),
			})
			s.collector = p.collector
			return nil
		}},
		{Plugin: introspection.Plugin{Type: introspection.TypeRuntime, ID: "task", Platforms: platform, Requires: meta},
			build: func() error { return s.buildTasks(&p) }},

		service("version", nil, func() register { return api.NewVersion(version.Version, version.Revision) }),
		service("namespaces", meta, func() register { return api.NewNamespaces(metadata.NewNamespaces(s.db), s.db) }),
		service("events", []string{introspection.TypeEvent}, func() register {
			e := api.NewEvents(p.exchange)
			e.RegisterTTRPC(s.ttrpc)
			return e
		}),
		{Plugin: introspection.Plugin{Type: introspection.TypeGRPC, ID: "replay", Requires: []string{introspection.TypeEvent}}, build: func() error {
			if p.eventLog == nil {
				return fmt.Errorf("the log of events does not work: %w", errdefs.ErrUnavailable)
			}
			api.NewReplay(p.eventLog).Register(s.grpc)
			return nil
		}},
		service("containers", meta, func() register { return api.NewContainers(containers.NewStore(s.db), s.db) }),
		service("images", meta, func() register { return api.NewImages(images.NewStore(s.db), s.db, p.collect) }),
		service("leases", []string{introspection.TypeLease}, func() register { return api.NewLeases(leases.NewStore(s.db), p.collect) }),
		service("content", []string{introspection.TypeContent}, func() register { return api.NewContent(p.content) }),
		service("snapshots", []string{introspection.TypeSnapshotter}, func() register { return api.NewSnapshots(p.snapshots) }),
		{Plugin: introspection.Plugin{Type: introspection.TypeGRPC, ID: "diff", Requires: []string{introspection.TypeDiff}}, build: func() error { return s.buildDiff(&p) }},
		{Plugin: introspection.Plugin{Type: introspection.TypeStreaming, ID: "manager"}, build: func() error {
			p.streams = streaming.NewManager()
			return nil
		}},
		{Plugin: introspection.Plugin{Type: introspection.TypeVerifier, ID: "bindir"}, build: func() error {
			c := s.cfg.Verifier
			p.verifier = verify.New(verify.Config{Dir: c.BinDir, Max: c.MaxVerifiers, Timeout: config.Delay(c.PerVerifierTimeout), Log: s.log})
			return nil
		}},
		{Plugin: introspection.Plugin{Type: introspection.TypeTransfer, ID: "local", Platforms: platform,
			Requires: []string{introspection.TypeContent, introspection.TypeLease}}, build: func() error { return s.buildTransfer(&p) }},
		service("streaming", []string{introspection.TypeStreaming}, func() register { return api.NewStreaming(p.streams) }),
		service("transfer", []string{introspection.TypeTransfer, introspection.TypeStreaming}, func() register {
			return api.NewTransfer(p.transfer, p.registry, p.streams, s.snapshotterOf)
		}),
		service("fsck", meta, func() register { return api.NewFsck(s.checker(&p)) }),
		service("tasks", []string{introspection.TypeRuntime}, func() register {
			return api.NewTasks(s.tasks, containers.NewStore(s.db), local.NewContent(p.content), s.checkpointScratch())
		}),
		{Plugin: introspection.Plugin{Type: introspection.TypeSandbox, ID: sandboxes.Sandboxer, Platforms: platform,
			Requires: []string{introspection.TypeRuntime}}, build: func() error { return s.buildSandboxes(&p) }},
		service("sandboxes", meta, func() register { return api.NewSandboxStore(sandboxes.NewStore(s.db)) }),
		service("sandbox-controllers", []string{introspection.TypeSandbox}, func() register { return api.NewSandboxController(s.sandboxes) }),
		{Plugin: introspection.Plugin{Type: introspection.TypeGRPC, ID: "introspection"}, build: func() error {
			uuid, err := introspection.Identity(s.cfg.Root)
			if err != nil {
				return err
			}
			m := p.shims
			if m == nil { // it answers questions about runtimes even where tasks do not work
				m = shims.New(shims.Config{State: s.cfg.State, Log: s.log})
			}
			api.NewIntrospection(s.plugins, uuid, m.Describe).Register(s.grpc)
			return nil
		}},
		{Plugin: introspection.Plugin{Type: introspection.TypeGRPC, ID: "healthcheck"}, build: func() error {
			healthapi.RegisterHealthServer(s.grpc, s.health)
			return nil
		}},
	})
}

func (s *Server) buildSandboxes(p *parts) error {
	bundles, err := bundle.NewSandboxStore(s.cfg.State)
	if err != nil {
		return err
	}
	s.sandboxes = sandboxes.NewController(bundles, p.shims, sandboxes.NewStore(s.db), p.exchange, s.log)
	return nil
}

func (s *Server) buildTasks(p *parts) error {
	binary, err := shims.Find(s.cfg.ShimPath())
	if err != nil {
		return err
	}
	bundles, err := bundle.NewStore(s.cfg.State)
	if err != nil {
		return err
	}
	if err := s.restoreContainers(bundles); err != nil {
		s.log.Error("the containers of tasks could not be made again", "error", err) // the tasks run all the same
	}
	// Without it tasks run all the same; a shim that dies takes terminals and inputs with it then.
	lot, err := parking.Open(filepath.Join(s.cfg.State, wire.SocketName), s.vault(), s.log)
	if err != nil {
		s.log.Error("nothing that must outlive a shim can be parked", "error", err)
	} else {
		s.closers = append(s.closers, func() error { lot.Close(); return nil })
	}
	p.shims = shims.New(shims.Config{
		Lot: lot, State: s.cfg.State, Binary: binary, Address: s.Address(), TTRPCAddress: s.ttrpcAddress(),
		Debug: s.cfg.Debug.Level == "debug" || s.cfg.Debug.Level == "trace", Log: s.log,
	})
	s.tasks = tasks.New(bundles, p.shims, containers.NewStore(s.db), p.exchange, s.log)
	if p.mounts != nil {
		s.tasks.UseMounts(p.mounts)
	}
	return nil
}

// checkpointScratch is where checkpoints are made: on disk, because they are as large as a container's memory. What a
// daemon that was killed has left there goes. When it cannot be made, the first checkpoint says why.
func (s *Server) checkpointScratch() string {
	dir := filepath.Join(s.cfg.Root, "checkpoints")
	err := os.RemoveAll(dir)
	if err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil {
		s.log.Error("cannot make the directory of checkpoints", "error", err)
	}
	return dir
}
