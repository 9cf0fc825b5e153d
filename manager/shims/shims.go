// Package shims spawns shims, finds those that live, and follows what they tell. It knows processes and sockets, not
// what a task is.
package shims

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/parking"
	"github.com/managerd/managerd/shimapi"
)

// DefaultRuntime is the runtime name that clients send when they do not care: our own shim.
const DefaultRuntime = "io.containerd.runc.v2"

// BinaryName is the file name of our own shim.
const BinaryName = "shim-runc"

// Config says how shims are spawned.
type Config struct {
	State        string // the daemon's state directory, an absolute path
	Binary       string // our own shim, an absolute path: see Find
	Address      string // the daemon's gRPC socket, for shims of others
	TTRPCAddress string // its event socket, for shims of others
	Debug        bool
	Lot          *parking.Lot // where our shims park what must outlive them; nil: nowhere
	Log          *slog.Logger // nil: the default one
}

// Manager spawns and finds shims.
type Manager struct {
	cfg Config
}

// New gives a manager; it starts nothing.
func New(cfg Config) *Manager {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Manager{cfg: cfg}
}

// Find finds our own shim: the configured path or name, else beside this program, else on PATH. NotFound says where it
// looked.
func Find(configured string) (string, error) {
	if configured != "" {
		path, err := exec.LookPath(configured)
		if err != nil {
			return "", fmt.Errorf("configured shim %q: %w: %w", configured, err, errdefs.ErrNotFound)
		}
		return filepath.Abs(path)
	}
	beside := ""
	if self, err := os.Executable(); err == nil {
		beside = filepath.Join(filepath.Dir(self), BinaryName)
		if path, err := exec.LookPath(beside); err == nil {
			return path, nil
		}
	}
	path, err := exec.LookPath(BinaryName)
	if err != nil {
		return "", fmt.Errorf("%s is neither at %s nor on PATH: %w", BinaryName, beside, errdefs.ErrNotFound)
	}
	return filepath.Abs(path)
}

var runtimeName = regexp.MustCompile(`^io\.containerd\.([A-Za-z0-9-]+)\.(v[0-9]+)$`)

// Resolve finds the binary of a runtime. own says that it is ours. InvalidArgument for what names no runtime, NotFound
// when it is not installed.
func (m *Manager) Resolve(runtime string) (binary string, own bool, err error) {
	switch {
	case runtime == "" || runtime == DefaultRuntime:
		binary = m.cfg.Binary
	case filepath.IsAbs(runtime):
		binary = runtime
	default:
		parts := runtimeName.FindStringSubmatch(runtime)
		if parts == nil {
			return "", false, fmt.Errorf("runtime %q is neither io.containerd.NAME.vN nor an absolute path: %w", runtime, errdefs.ErrInvalidArgument)
		}
		name := "containerd-shim-" + parts[1] + "-" + parts[2]
		if binary, err = exec.LookPath(name); err != nil {
			return "", false, fmt.Errorf("runtime %q: %s is not installed: %w: %w", runtime, name, err, errdefs.ErrNotFound)
		}
	}
	fi, err := os.Stat(binary)
	if err != nil {
		return "", false, fmt.Errorf("runtime %q: %w: %w", runtime, err, errdefs.ErrNotFound)
	}
	if fi.IsDir() || fi.Mode()&0o111 == 0 {
		return "", false, fmt.Errorf("runtime %q: %s is not an executable file: %w", runtime, binary, errdefs.ErrInvalidArgument)
	}
	ours, err := os.Stat(m.cfg.Binary)
	return binary, err == nil && os.SameFile(fi, ours), nil
}

// Adopt connects to the shim that keeps a bundle. The error wraps NotFound when there is none: it was never spawned, or
// has died.
func (m *Manager) Adopt(ctx context.Context, b *bundle.Bundle) (*Shim, error) {
	p, own, err := m.where(b)
	if err != nil {
		return nil, err
	}
	s, err := m.connect(ctx, b, own, p, nil)
	if err != nil {
		return nil, err
	}
	s.Joined = !own && b.Joined()
	if own {
		m.askToPark(s)
	}
	return s, nil
}

// Join connects a bundle to an endpoint, which keeps the task from here on. Unavailable when nobody serves it.
func (m *Manager) Join(ctx context.Context, b *bundle.Bundle, p shimapi.BootstrapParams) (*Shim, error) {
	if err := b.SetShim("", p); err != nil {
		return nil, err
	}
	s, err := m.connect(ctx, b, false, p, nil)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("nobody serves a task API at %s: %w", p.Address, errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, err
	}
	s.Joined = true
	return s, nil
}

// where says where the shim of a bundle listens. The socket of ours has a name that follows from the task's: a daemon
// that was killed before it had written it down, or a damaged file, lose nothing.
func (m *Manager) where(b *bundle.Bundle) (p shimapi.BootstrapParams, own bool, err error) {
	ours := m.ownSocket(b)
	_, p, err = b.Shim()
	if err != nil {
		if _, serr := os.Lstat(strings.TrimPrefix(ours.Address, "unix://")); serr == nil {
			return ours, true, nil
		}
		return p, false, err
	}
	return p, p.Address == ours.Address, nil
}

func (m *Manager) ownSocket(b *bundle.Bundle) shimapi.BootstrapParams {
	path := shimapi.SocketPath(m.cfg.State, b.Namespace, b.ID)
	if b.Sandbox {
		path = shimapi.SandboxSocketPath(m.cfg.State, b.Namespace, b.ID)
	}
	return shimapi.BootstrapParams{Version: 3, Address: "unix://" + path, Protocol: "ttrpc"}
}

// Own says whether the shim of a bundle is, or was, one of ours.
func (m *Manager) Own(b *bundle.Bundle) bool {
	own, _ := m.Keeper(b)
	return own
}

// Keeper says whose the shim of a bundle is, or was: one of ours, whose ledger is complete and brings its events, or an endpoint;
// neither: another's.
func (m *Manager) Keeper(b *bundle.Bundle) (own, joined bool) {
	binary, p, err := b.Shim()
	if err != nil {
		return true, false
	}
	return p.Address == m.ownSocket(b).Address, binary == ""
}

func (m *Manager) connect(ctx context.Context, b *bundle.Bundle, own bool, p shimapi.BootstrapParams, log *shimLog) (*Shim, error) {
	c, err := shimapi.Dial(ctx, p)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("shim of %s is dead: %w: %w", b.Label(), err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	if log == nil {
		if log, err = copyLog(b, m.cfg.Log); err != nil {
			m.cfg.Log.Warn("the log of a shim is not copied", "namespace", b.Namespace, "id", b.ID, "error", err)
		}
	}
	return &Shim{Client: c, Bundle: b, Own: own, Address: p.Address, log: log}, nil
}
