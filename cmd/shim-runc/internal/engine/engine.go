// Package engine runs OCI containers with libcontainer, in this process. It is the sole importer of libcontainer, and
// knows neither the task API nor where output goes: it takes files for a process's streams, and gives processes back.
//
// What libcontainer needs of its host is written down in docs/architecture.md. The two rules that shape this package:
// everything that forks runs under the reaper's fork guard, and nobody but the reaper waits.
package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	_ "github.com/opencontainers/cgroups/devices" // device rules: without it every create fails
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/configs/validate"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // the C half of a container's init
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine/filter"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// InitHook must be the first thing that a program with this package does, in an init function of package main: when
// the process is a re-exec by libcontainer, as a container's init or exec, or by this package, it goes on there and never
// returns.
func InitHook() {
	if len(os.Args) < 2 {
		return
	}
	switch os.Args[1] {
	case "init":
		filter.Take()
		libcontainer.Init()
	case filter.Verb:
		filter.Main()
	}
}

// Config says how the engine works. Root and Reaper are required.
type Config struct {
	Root          string // libcontainer's state directory: Root/ID/state.json
	SystemdCgroup bool   // cgroups through systemd rather than cgroupfs
	NoPivotRoot   bool   // MS_MOVE instead of pivot_root(2), for a rootfs on a ramdisk
	NoNewKeyring  bool   // stay in the session keyring of the shim
	FilterDir     string // where compiled seccomp filters are kept, for all shims; "" for nowhere
	Log           *slog.Logger
	Reaper        *reaper.Reaper
	// OnPhase, if set, is told how long each phase of a create, start or exec took.
	OnPhase func(name string, took time.Duration)
}

// IO is what a process gets as its streams: either three files, nil meaning /dev/null, which the engine does not
// close; or, with Console set, a new pseudo-terminal.
type IO struct {
	Stdin, Stdout, Stderr *os.File
	// Console is given the terminal's master side once, before the process can run; it owns the file from then on.
	Console func(master *os.File) error
	// Tree says of an exec that KillExec must find all that it will have begotten.
	Tree bool
}

// Engine makes containers.
type Engine struct {
	cfg     Config
	clamp   Clamp
	filters *filter.Cache // nil for none
}

// New gives an engine; it touches nothing yet.
func New(cfg Config) *Engine {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.OnPhase == nil {
		cfg.OnPhase = func(string, time.Duration) {}
	}
	hear(cfg.Log)
	e := &Engine{cfg: cfg, clamp: NewClamp(cfg.Log)}
	if cfg.FilterDir != "" {
		e.filters = &filter.Cache{Dir: cfg.FilterDir, Reaper: cfg.Reaper}
	}
	return e
}

// Create makes a container whose init is parked just before it would execute the user's program. The rootfs must be in
// place. On an error nothing is left of it. Errors: InvalidArgument for a spec that cannot be run, AlreadyExists for
// an id that is in use below Root.
func (e *Engine) Create(ctx context.Context, id, bundle string, spec *specs.Spec, io IO) (*Container, error) {
	begin := time.Now()
	config, err := e.config(id, bundle, spec)
	if err != nil {
		return nil, fmt.Errorf("cannot create container %s: %w", id, err)
	}
	poststart := config.Hooks[configs.Poststart]
	delete(config.Hooks, configs.Poststart)
	c, err := libcontainer.Create(e.cfg.Root, id, config)
	switch {
	case errors.Is(err, libcontainer.ErrExist):
		return nil, fmt.Errorf("cannot create container %s: it is there already: %w", id, errdefs.ErrAlreadyExists)
	case errors.Is(err, libcontainer.ErrInvalidID):
		return nil, fmt.Errorf("cannot create container %q: %w: %w", id, err, errdefs.ErrInvalidArgument)
	case err != nil:
		return nil, fmt.Errorf("cannot create container %s: %w", id, err)
	}
	failpoint.Hit("engine.create.made")
	e.cfg.OnPhase("create.config", time.Since(begin))

	begin = time.Now()
	proc, err := e.launch(ctx, c, spec.Process, true, io, nil)
	if err != nil {
		gerr := e.cfg.Reaper.Guard(c.Destroy)
		if gerr != nil {
			e.cfg.Log.Warn("cannot clean up after a failed create", "id", id, "error", gerr)
			_ = os.RemoveAll(filepath.Join(e.cfg.Root, id))
		}
		return nil, fmt.Errorf("cannot create container %s: %w", id, err)
	}
	e.cfg.OnPhase("create.init", time.Since(begin))
	return &Container{
		id: id, engine: e, c: c, init: proc, sharedPID: SharesPID(spec), launcher: os.Args[0], poststart: poststart,
	}, nil
}

// config is libcontainer's for a spec, if all of that can be honoured.
func (e *Engine) config(id, bundle string, spec *specs.Spec) (*configs.Config, error) {
	if err := Check(bundle, spec); err != nil {
		return nil, err
	}
	if err := honoured(spec); err != nil {
		return nil, err
	}
	e.clamp.Process(spec.Process)
	config, err := e.convert(id, bundle, spec)
	if err != nil {
		return nil, err
	}
	if err := validate.Validate(config); err != nil { // Create does, and does not say whose fault it is
		return nil, fmt.Errorf("invalid spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return config, nil
}

// convert is config for a spec that was asked before.
func (e *Engine) convert(id, bundle string, spec *specs.Spec) (*configs.Config, error) {
	for i := range spec.Mounts {
		// libcontainer hands it to the file system, which most refuse.
		m := &spec.Mounts[i]
		m.Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "defaults" })
	}
	var config *configs.Config
	// To read the mappings of a user namespace that is joined, libcontainer forks a process and waits for it.
	err := e.cfg.Reaper.Guard(func() (err error) {
		config, err = specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
			CgroupName:       id,
			UseSystemdCgroup: e.cfg.SystemdCgroup,
			NoPivotRoot:      e.cfg.NoPivotRoot,
			NoNewKeyring:     e.cfg.NoNewKeyring,
			Spec:             spec,
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("invalid spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	for i, l := range config.Labels {
		if strings.HasPrefix(l, "bundle=") { // libcontainer takes the working directory for it
			config.Labels[i] = "bundle=" + bundle
		}
	}
	return config, nil
}

// SharesPID says that a container of spec has no pid namespace of its own, so that its processes can outlive its init.
func SharesPID(spec *specs.Spec) bool {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace {
			return ns.Path != ""
		}
	}
	return true
}
