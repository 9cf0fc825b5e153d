package service

import (
	"context"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine/external"
	"github.com/managerd/managerd/reaper"
)

// Engine is what the service needs of something that runs containers. Its container is in the state that the caller has
// asked the lifecycle table about: an engine judges nothing.
type Engine interface {
	// Create makes a container with its init parked; nothing is left of it after an error.
	Create(ctx context.Context, id, bundle string, spec *specs.Spec, io engine.IO) (Container, error)
	// Load takes over a container that another incarnation made of bundle; launcher is argv[0] of the one that forked init.
	Load(id, bundle string, init *reaper.Process, launcher string) (Container, engine.Found, error)
	// Remove ends and removes what is left of a container that nobody keeps any more; nothing there is not an error.
	Remove(id string) error
}

// Container is one container of an Engine; its methods may be called at once by many goroutines.
type Container interface {
	Init() *reaper.Process
	SharedPID() bool // processes can outlive init
	Start(ctx context.Context) error
	Exec(ctx context.Context, execID string, p *specs.Process, io engine.IO) (*reaper.Process, error)
	Pids() ([]int, error)
	Pause() error
	Resume() error
	Update(r *specs.LinuxResources) error
	Signal(sig unix.Signal, all bool) error
	Settle(p *reaper.Process) // waits until a started process is its program, and signals reach that
	Destroy() error
}

// builtinName is the name that clients send for "the usual runtime"; a path, and any other name, is a program to run.
const builtinName = "runc"

// Describe says what the runtime is that runtime options ask for: this program's own, with an empty path, or that which
// BinaryName names.
func Describe(ctx context.Context, options *anypb.Any) (external.About, error) {
	opts, err := decodeOptions(options)
	if err != nil {
		return external.About{}, err
	}
	if opts.BinaryName == "" || opts.BinaryName == builtinName {
		return external.About{Features: engine.Features()}, nil
	}
	return external.Describe(ctx, opts.BinaryName)
}

// NewEngine gives libcontainer in this process, or with the name or path of another runtime (the runtime option
// BinaryName) that program.
func NewEngine(cfg engine.Config, binary string) (Engine, error) {
	if binary == "" || binary == builtinName {
		return adapted[*engine.Container]{engine.New(cfg)}, nil
	}
	e, err := external.New(cfg, binary)
	if err != nil {
		return nil, err
	}
	return adapted[*external.Container]{e}, nil
}

// adapted is an engine whose own type of container becomes the service's.
type adapted[C Container] struct {
	e interface {
		Create(ctx context.Context, id, bundle string, spec *specs.Spec, io engine.IO) (C, error)
		Load(id, bundle string, init *reaper.Process, launcher string) (C, engine.Found, error)
		Remove(id string) error
	}
}

// Create is the engine's.
func (a adapted[C]) Create(ctx context.Context, id, bundle string, spec *specs.Spec, io engine.IO) (Container, error) {
	c, err := a.e.Create(ctx, id, bundle, spec, io)
	if err != nil {
		return nil, err // not c: a nil pointer is not a nil Container
	}
	return c, nil
}

// Load is the engine's.
func (a adapted[C]) Load(id, bundle string, init *reaper.Process, launcher string) (Container, engine.Found, error) {
	c, found, err := a.e.Load(id, bundle, init, launcher)
	if err != nil {
		return nil, found, err
	}
	return c, found, nil
}

// Remove is the engine's.
func (a adapted[C]) Remove(id string) error { return a.e.Remove(id) }
