package service

import (
	"context"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/reaper"
)

// Engine is what the service needs of something that runs containers. Its container is in the state that the caller has
// asked the lifecycle table about: an engine judges nothing.
type Engine interface {
	// Create makes a container with its init parked; nothing is left of it after an error.
	Create(ctx context.Context, id, bundle string, spec *specs.Spec, io engine.IO) (Container, error)
	// Load takes over a container that another incarnation made; launcher is argv[0] of the one that forked init.
	Load(id string, init *reaper.Process, launcher string) (Container, engine.Found, error)
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

// builtin is libcontainer in this process.
type builtin struct{ e *engine.Engine }

func newBuiltin(cfg engine.Config) Engine { return builtin{engine.New(cfg)} }

func (b builtin) Create(ctx context.Context, id, bundle string, spec *specs.Spec, io engine.IO) (Container, error) {
	c, err := b.e.Create(ctx, id, bundle, spec, io)
	if err != nil {
		return nil, err // not c: a nil *engine.Container is not a nil Container
	}
	return c, nil
}

func (b builtin) Load(id string, init *reaper.Process, launcher string) (Container, engine.Found, error) {
	c, found, err := b.e.Load(id, init, launcher)
	if err != nil {
		return nil, found, err
	}
	return c, found, nil
}
