package shims

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	sandbox "github.com/containerd/containerd/api/runtime/sandbox/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/bundle"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi"
)

// Shim is a connection to a living shim. Close it when the task is gone, or to let go of the shim.
type Shim struct {
	*shimapi.Client
	Bundle  *bundle.Bundle
	Address string // "unix:///path"; shims of others may keep several tasks behind one
	// Own says that it is our shim, spawned by us: its events come from its ledger. Others forward theirs.
	Own bool
	// Joined says that it is an endpoint: somebody else's, who ends it.
	Joined bool

	log  *shimLog     // nil when it has none
	proc *shimProcess // nil when it was not spawned by this daemon
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

// End asks the shim to shut down, which it does if it keeps nothing any more; a sandbox ends with its shim. One that is gone is no error.
// An endpoint is not asked.
func (s *Shim) End(ctx context.Context) error {
	if s.Joined {
		return nil
	}
	if s.Bundle.Sandbox {
		_, err := s.Sandbox().ShutdownSandbox(ctx, &sandbox.ShutdownSandboxRequest{SandboxID: s.Bundle.ID})
		return err
	}
	_, err := s.Shutdown(ctx, &task.ShutdownRequest{ID: s.Bundle.ID, Now: false})
	if err != nil && !errdefs.IsUnavailable(err) {
		return fmt.Errorf("cannot shut down shim of task %s: %w", s.Bundle.ID, err)
	}
	return nil
}

// KillProcess kills a shim of ours that keeps nothing any more but does not end. Shims of others are left alone: they may keep
// other tasks.
func (s *Shim) KillProcess() error {
	if !s.Own {
		return nil
	}
	if s.proc != nil {
		return s.proc.kill()
	}
	records, err := s.Bundle.Ledger()
	var last *ledgerpb.Header
	for _, r := range records {
		if r.Header != nil {
			last = r.Header
		}
	}
	if last == nil {
		return fmt.Errorf("cannot kill shim of task %s: its process is not known: %w", s.Bundle.ID, errors.Join(err, errdefs.ErrNotFound))
	}
	return s.Bundle.KillShim(last.ShimPid)
}

// Epitaph says, of a shim that this daemon spawned and that has broken the connection, how it ended and what it said
// last; empty when it is not known.
func (s *Shim) Epitaph() string {
	if s.proc == nil {
		return ""
	}
	select {
	case <-s.proc.ended:
	case <-time.After(time.Second): // the connection is gone but the process is not
		return ""
	}
	said := "shim ended: " + s.proc.cmd.ProcessState.String()
	if s.log != nil {
		if line := s.log.lastLine(); line != "" {
			said += ": " + line
		}
	}
	return said
}

// Close lets go of the shim, which goes on living.
func (s *Shim) Close() {
	_ = s.Client.Close()
	if s.log != nil {
		s.log.close()
	}
}

// Forget removes the socket of a shim of ours that has ended.
func (s *Shim) Forget() {
	if s.Own {
		_ = os.Remove(strings.TrimPrefix(s.Address, "unix://"))
	}
}
