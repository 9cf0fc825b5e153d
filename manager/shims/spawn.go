package shims

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/failpoint"
	wire "github.com/managerd/managerd/shimapi/parking"
)

const (
	// startTimeout is how long another's shim may take for the verb start.
	startTimeout = 30 * time.Second
	// deleteTimeout is how long a shim may take for the verb delete.
	deleteTimeout = 30 * time.Second
)

// UnknownExit is the status of a process of which nobody saw the exit, as containerd's clients know it.
const UnknownExit = 255

// shimProcess is a shim that this daemon spawned: its child, as long as both live.
type shimProcess struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed once it has been waited for
}

// dying is how long a shim that was killed may take to end: one that waits in the kernel does when that lets it go.
const dying = 5 * time.Second

// kill kills the process and waits for its end. Unavailable when that does not come.
func (p *shimProcess) kill() error {
	_ = p.cmd.Process.Kill() // an error says that it has ended
	late := time.NewTimer(dying)
	defer late.Stop()
	select {
	case <-p.ended:
		return nil
	case <-late.C:
		return fmt.Errorf("shim process %d was killed and does not end within %v: %w", p.cmd.Process.Pid, dying, errdefs.ErrUnavailable)
	}
}

// Spawn starts a shim for a bundle and connects to it. On an error no process and no socket is left.
func (m *Manager) Spawn(ctx context.Context, b *bundle.Bundle, runtime string, options *anypb.Any) (*Shim, error) {
	binary, own, err := m.Resolve(runtime)
	if err != nil {
		return nil, err
	}
	// Before the shim is there: another's shim may wait for a reader of its log.
	log, err := copyLog(b, m.cfg.Log)
	if err != nil {
		return nil, err
	}
	var s *Shim
	if own {
		s, err = m.spawnOwn(ctx, b, binary, log, shimapi.VerbServe)
	} else {
		s, err = m.spawnOther(ctx, b, binary, options, log)
	}
	if err != nil {
		log.close()
	}
	return s, err
}

// spawnOwn hands our shim a socket that is bound already: it can be connected to at once.
func (m *Manager) spawnOwn(ctx context.Context, b *bundle.Bundle, binary string, log *shimLog, verb string, files ...*os.File) (_ *Shim, err error) {
	p := m.ownSocket(b)
	path := strings.TrimPrefix(p.Address, "unix://")
	if err := b.SetShim(binary, p); err != nil {
		return nil, err
	}
	failpoint.Hit("shims.spawn.written")
	l, err := shimapi.Listen(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(path)
		}
	}()
	failpoint.Hit("shims.spawn.listening")
	socket, err := l.File()
	_ = l.Close()
	if err != nil {
		return nil, err
	}
	// Our copy must go, or connecting to a dead shim would hang instead of being refused.
	defer func() { _ = socket.Close() }()
	// Until the shim has opened its log itself, what it says (a missing library, a panic) goes there too.
	stderr, err := os.OpenFile(b.LogFIFO(), os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = stderr.Close() }()
	argv := []string{"-namespace", b.Namespace, "-id", b.ID, "-bundle", b.Path}
	if m.cfg.Debug {
		argv = append(argv, "-debug")
	}
	if b.Sandbox {
		argv = append(argv, "-sandbox")
	}
	cmd := exec.Command(binary, append(argv, verb)...)
	cmd.Dir = b.Path
	cmd.Env = environment("GOMAXPROCS=4") // a shim waits; a thread per core of a large machine would only cost
	cmd.Stderr = stderr
	if m.cfg.Lot != nil && !b.Sandbox { // all that there is of a sandbox is in its bundle
		cmd.Env = append(cmd.Env, wire.EnvSocket+"="+m.parkingSocket())
	}
	cmd.ExtraFiles = append([]*os.File{socket}, files...) // from descriptor 3 on
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot spawn shim %s: %w", binary, err)
	}
	failpoint.Hit("shims.spawn.forked")
	proc := &shimProcess{cmd: cmd, ended: make(chan struct{})}
	go func() {
		defer close(proc.ended)
		_ = cmd.Wait() // while we live the shim is our child; what it did, it tells by its ledger
	}()
	s, err := m.connect(ctx, b, true, p, log)
	if err != nil {
		return nil, errors.Join(err, proc.kill())
	}
	s.proc = proc
	return s, nil
}

// spawnOther starts a shim by containerd's contract: the verb start, which prints where the shim listens.
func (m *Manager) spawnOther(ctx context.Context, b *bundle.Bundle, binary string, options *anypb.Any, log *shimLog) (_ *Shim, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	out, err := m.verb(ctx, b, binary, shimapi.VerbStart, options)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err == nil {
			return
		}
		// It may run: nobody but its own verb knows how to end it.
		dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deleteTimeout)
		defer cancel()
		if _, derr := m.verb(dctx, b, binary, shimapi.VerbDelete, nil); derr != nil {
			err = errors.Join(err, derr)
		}
	}()
	p, err := shimapi.ParseBootstrap(out)
	if err != nil {
		return nil, fmt.Errorf("shim %s: %w", binary, err)
	}
	if err := b.SetShim(binary, p); err != nil {
		return nil, err
	}
	return m.connect(ctx, b, false, p, log)
}

// verb runs a verb of containerd's contract and returns what it printed.
func (m *Manager) verb(ctx context.Context, b *bundle.Bundle, binary, verb string, options *anypb.Any) ([]byte, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	argv := []string{"-namespace", b.Namespace, "-address", m.cfg.Address, "-publish-binary", self, "-id", b.ID}
	if m.cfg.Debug {
		argv = append(argv, "-debug")
	}
	if verb == shimapi.VerbDelete {
		argv = append(argv, "-bundle", b.Path)
	}
	cmd := exec.CommandContext(ctx, binary, append(argv, verb)...)
	cmd.Dir = b.Path
	cmd.Env = environment(shimapi.EnvTTRPCAddress+"="+m.cfg.TTRPCAddress, shimapi.EnvGRPCAddress+"="+m.cfg.Address,
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
	// What the verb starts may inherit its output: the verb's end counts, not that of the pipe.
	cmd.WaitDelay = 100 * time.Millisecond
	if err := cmd.Run(); err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return nil, fmt.Errorf("shim %s failed to %s: %w: %s", binary, verb, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}

// environment is ours without what systemd meant for us alone, and with add.
func environment(add ...string) []string {
	var out []string
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		switch name {
		case "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES":
		default:
			out = append(out, e)
		}
	}
	return append(out, add...)
}

// Cleanup takes away what a dead shim left behind, by the verb delete of its binary, and says how the container ended.
// It ends the container if that still runs. The bundle stays. Of an endpoint nothing is ours to take away, and it is not known
// how the container ended.
func (m *Manager) Cleanup(ctx context.Context, b *bundle.Bundle) (*task.DeleteResponse, error) {
	binary, p, err := b.Shim()
	switch own := m.ownSocket(b); {
	case err == nil && p.Address != own.Address && binary == "":
		return &task.DeleteResponse{ExitStatus: UnknownExit, ExitedAt: timestamppb.Now()}, nil
	case err == nil && p.Address != own.Address:
	case err == nil || errdefs.IsDataLoss(err):
		// The binary that spawned it may be another one by now; ours knows what ours left.
		binary, p = m.cfg.Binary, own
	case errdefs.IsNotFound(err):
		_ = os.Remove(strings.TrimPrefix(own.Address, "unix://")) // nothing was ever spawned
		return &task.DeleteResponse{}, nil
	default:
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	out, err := m.verb(ctx, b, binary, shimapi.VerbDelete, nil)
	if err != nil {
		return nil, err
	}
	resp := &task.DeleteResponse{}
	if err := proto.Unmarshal(out, resp); err != nil {
		return nil, fmt.Errorf("shim %s printed no DeleteResponse: %w", binary, err)
	}
	if p.Address == m.ownSocket(b).Address {
		_ = os.Remove(strings.TrimPrefix(p.Address, "unix://"))
	}
	return resp, nil
}
