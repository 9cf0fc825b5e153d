// Package shims spawns shims, finds those that live, and follows what they tell. It knows processes and sockets, not
// what a task is.
package shims

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/shimapi"
)

// DefaultRuntime is the runtime name that clients send when they do not care: our own shim.
const DefaultRuntime = "io.containerd.runc.v2"

// Config says how shims are spawned.
type Config struct {
	State        string // the daemon's state directory
	Binary       string // our own shim, an absolute path
	Address      string // the daemon's gRPC socket, for shims of others
	TTRPCAddress string // its event socket, for shims of others
	Debug        bool
	Log          *slog.Logger
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

// Shim is a connection to a living shim. Close it when the task is gone, or to let go of the shim.
type Shim struct {
	*shimapi.Client
	Bundle *bundle.Bundle
	// Own says that it is our shim, spawned by us: its events come from its ledger. Others forward theirs.
	Own bool

	socket string
	log    *os.File
}

var runtimeName = regexp.MustCompile(`^io\.containerd\.([A-Za-z0-9-]+)\.(v[0-9]+)$`)

// Resolve finds the binary of a runtime. own says that it is ours.
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
	ours, err := os.Stat(m.cfg.Binary)
	return binary, err == nil && os.SameFile(fi, ours), nil
}

// Spawn starts a shim for a bundle and connects to it. On an error no process is left.
func (m *Manager) Spawn(ctx context.Context, b *bundle.Bundle, runtime string, options *anypb.Any) (*Shim, error) {
	binary, own, err := m.Resolve(runtime)
	if err != nil {
		return nil, err
	}
	if own {
		return m.spawnOwn(ctx, b, binary)
	}
	return m.spawnOther(ctx, b, binary, options)
}

// spawnOwn hands our shim a socket that is bound already: it can be connected to at once.
func (m *Manager) spawnOwn(ctx context.Context, b *bundle.Bundle, binary string) (_ *Shim, err error) {
	path := shimapi.SocketPath(m.cfg.State, b.Namespace, b.ID)
	l, err := shimapi.Listen(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(path)
		}
	}()
	socket, err := l.File()
	_ = l.Close()
	if err != nil {
		return nil, err
	}
	// Our copy must go, or connecting to a dead shim would hang instead of being refused.
	defer func() { _ = socket.Close() }()
	p := shimapi.BootstrapParams{Version: 3, Address: "unix://" + path, Protocol: "ttrpc"}
	if err := b.SetShim(binary, p); err != nil {
		return nil, err
	}
	argv := []string{"-namespace", b.Namespace, "-id", b.ID, "-bundle", b.Path}
	if m.cfg.Debug {
		argv = append(argv, "-debug")
	}
	cmd := exec.Command(binary, append(argv, shimapi.VerbServe)...)
	cmd.Dir = b.Path
	cmd.Env = append(os.Environ(), "GOMAXPROCS=4") // a shim waits; a thread per core of a large machine would only cost
	cmd.ExtraFiles = []*os.File{socket}            // descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot spawn shim %s: %w", binary, err)
	}
	go func() { _ = cmd.Wait() }() // while we live the shim is our child; what it did, it tells by its ledger
	s, err := m.connect(ctx, b, true, p)
	if err != nil {
		_ = cmd.Process.Kill()
		return nil, err
	}
	return s, nil
}

// spawnOther starts a shim by containerd's contract: the verb start, which prints where the shim listens.
func (m *Manager) spawnOther(ctx context.Context, b *bundle.Bundle, binary string, options *anypb.Any) (*Shim, error) {
	out, err := m.verb(ctx, b, binary, shimapi.VerbStart, options)
	if err != nil {
		return nil, err
	}
	p, err := shimapi.ParseBootstrap(out)
	if err != nil {
		return nil, fmt.Errorf("shim %s: %w", binary, err)
	}
	if err := b.SetShim(binary, p); err != nil {
		return nil, err
	}
	return m.connect(ctx, b, false, p)
}

// verb runs a verb of containerd's contract and returns what it printed.
func (m *Manager) verb(ctx context.Context, b *bundle.Bundle, binary, verb string, options *anypb.Any) ([]byte, error) {
	argv := []string{"-namespace", b.Namespace, "-address", m.cfg.Address, "-publish-binary", "", "-id", b.ID}
	if verb == shimapi.VerbDelete {
		argv = append(argv, "-bundle", b.Path)
	}
	if self, err := os.Executable(); err == nil {
		argv[5] = self
	}
	cmd := exec.CommandContext(ctx, binary, append(argv, verb)...)
	cmd.Dir = b.Path
	cmd.Env = append(os.Environ(),
		shimapi.EnvTTRPCAddress+"="+m.cfg.TTRPCAddress, shimapi.EnvGRPCAddress+"="+m.cfg.Address,
		shimapi.EnvNamespace+"="+b.Namespace, "MAX_SHIM_VERSION=3", "GOMAXPROCS=2")
	if options != nil {
		data, err := proto.Marshal(options)
		if err != nil {
			return nil, err
		}
		cmd.Stdin = bytes.NewReader(data)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("shim %s failed to %s: %w: %s", binary, verb, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}

// Adopt connects to the shim that keeps a bundle. The error wraps NotFound when there is none: it was never spawned, or
// has died.
func (m *Manager) Adopt(ctx context.Context, b *bundle.Bundle) (*Shim, error) {
	binary, p, err := b.Shim()
	if err != nil {
		return nil, err
	}
	s, err := m.connect(ctx, b, m.isOwn(binary, p), p)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("shim of %s is dead: %w: %w", b.ID, err, errdefs.ErrNotFound)
	}
	return s, err
}

// isOwn tells our shims by the socket we made for them: the binary on disk may be another one by now.
func (m *Manager) isOwn(_ string, p shimapi.BootstrapParams) bool {
	return strings.HasPrefix(p.Address, "unix://"+filepath.Join(m.cfg.State, "s")+"/")
}

func (m *Manager) connect(ctx context.Context, b *bundle.Bundle, own bool, p shimapi.BootstrapParams) (*Shim, error) {
	c, err := shimapi.Dial(ctx, p)
	if err != nil {
		return nil, err
	}
	s := &Shim{Client: c, Bundle: b, Own: own, socket: strings.TrimPrefix(p.Address, "unix://")}
	s.copyLog(m.cfg.Log)
	return s, nil
}

// copyLog copies the shim's log to ours, line by line. The FIFO is held O_RDWR: it has no end while we look.
func (s *Shim) copyLog(log *slog.Logger) {
	fd, err := unix.Open(s.Bundle.LogFIFO(), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		log.Warn("no log of shim", "id", s.Bundle.ID, "error", err)
		return
	}
	s.log = os.NewFile(uintptr(fd), s.Bundle.LogFIFO())
	go func() {
		buf := make([]byte, 16<<10)
		for {
			n, err := s.log.Read(buf)
			if err != nil {
				return
			}
			for _, line := range strings.Split(strings.TrimSpace(string(buf[:n])), "\n") {
				log.Info("shim: "+line, "id", s.Bundle.ID)
			}
		}
	}()
}

// Follow calls fn with every event of our own shim above since, until the shim has shut down (nil), ctx ends or the
// connection breaks.
func (s *Shim) Follow(ctx context.Context, since uint64, fn func(*Event)) error {
	stream, err := s.Shim().Events(ctx, eventsSince(since))
	if err != nil {
		return shimapi.FromWire(err)
	}
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return shimapi.FromWire(err)
		}
		fn(e)
	}
}

// End asks the shim, which keeps nothing any more, to shut down, and lets go of it.
func (s *Shim) End(ctx context.Context) error {
	_, err := s.Shutdown(ctx, &task.ShutdownRequest{ID: s.Bundle.ID})
	if err != nil && !errdefs.IsUnavailable(err) {
		return fmt.Errorf("cannot shut down shim of %s: %w", s.Bundle.ID, err)
	}
	return nil
}

// Close lets go of the shim, which goes on living.
func (s *Shim) Close() {
	_ = s.Client.Close()
	if s.log != nil {
		_ = s.log.Close()
	}
}

// Forget removes the socket of a shim that has ended.
func (s *Shim) Forget() {
	if s.Own {
		_ = os.Remove(s.socket)
	}
}

// Cleanup takes away what a dead shim left behind, by the verb delete of its binary, and says how the container ended.
// The bundle stays.
func (m *Manager) Cleanup(ctx context.Context, b *bundle.Bundle) (*task.DeleteResponse, error) {
	binary, p, err := b.Shim()
	if err != nil {
		if errdefs.IsNotFound(err) {
			return &task.DeleteResponse{}, nil // nothing was ever spawned
		}
		return nil, err
	}
	if _, serr := os.Stat(binary); serr != nil || m.isOwn(binary, p) {
		binary = m.cfg.Binary // the one that spawned it may be gone; ours knows what ours left
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	out, err := m.verb(ctx, b, binary, shimapi.VerbDelete, nil)
	if err != nil {
		return nil, err
	}
	resp := &task.DeleteResponse{}
	if err := proto.Unmarshal(out, resp); err != nil {
		return nil, fmt.Errorf("shim %s printed no DeleteResponse: %w", binary, err)
	}
	if m.isOwn(binary, p) {
		_ = os.Remove(strings.TrimPrefix(p.Address, "unix://"))
	}
	return resp, nil
}
