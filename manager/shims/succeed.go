package shims

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	sandbox "github.com/containerd/containerd/api/runtime/sandbox/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"

	"github.com/managerd/managerd/manager/bundle"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/failpoint"
	wire "github.com/managerd/managerd/shimapi/parking"
)

// parkingTimeout is how long a shim that was connected to may take to park what must outlive it.
const parkingTimeout = 30 * time.Second

// Succeed starts the successor of a shim of ours that has died, hands it what that had parked, and returns when it has
// taken over. On an error no process is left of it, and the bundle is as it was.
func (m *Manager) Succeed(ctx context.Context, b *bundle.Bundle) (*Shim, error) {
	fail := func(err error) (*Shim, error) {
		return nil, fmt.Errorf("cannot replace the dead shim of %s: %w", b.Label(), err)
	}
	log, err := copyLog(b, m.cfg.Log)
	if err != nil {
		return fail(err)
	}
	ours, theirs, err := wire.Pair()
	if err != nil {
		log.close()
		return fail(err)
	}
	s, err := m.spawnOwn(ctx, b, m.cfg.Binary, log, shimapi.VerbAdopt, theirs) // descriptor wire.HandoverFD
	_ = theirs.Close()
	if err != nil {
		_ = ours.Close()
		log.close()
		return fail(err)
	}
	failpoint.Hit("shims.succeed.forked")
	if m.cfg.Lot != nil && !b.Sandbox {
		err = m.cfg.Lot.HandOver(ours, b.Namespace, b.ID)
	}
	failpoint.Hit("shims.succeed.handed")
	_ = ours.Close() // the end of it
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		err = s.keeps(ctx)
	}
	if err != nil {
		err = errors.Join(err, s.proc.kill())
		if said := s.Epitaph(); said != "" {
			err = fmt.Errorf("%s: %w", said, err)
		}
		s.Close()
		s.Forget()
		return fail(err)
	}
	return s, nil
}

// keeps says whether the shim keeps what its bundle is for. NotFound when it does not.
func (s *Shim) keeps(ctx context.Context) error {
	if s.Bundle.Sandbox {
		_, err := s.Sandbox().SandboxStatus(ctx, &sandbox.SandboxStatusRequest{SandboxID: s.Bundle.ID})
		return err
	}
	_, err := s.State(ctx, &task.StateRequest{ID: s.Bundle.ID})
	return err
}

// askToPark asks a shim that ran before this daemon to park what must outlive it. A shim that does not, because it is
// older or wedged, is kept all the same.
func (m *Manager) askToPark(s *Shim) {
	if m.cfg.Lot == nil || s.Bundle.Sandbox {
		return
	}
	go func() { // it ends with the connection at the latest
		ctx, cancel := context.WithTimeout(context.Background(), parkingTimeout)
		defer cancel()
		if _, err := s.Shim().Park(ctx, &shim.ParkRequest{Socket: m.parkingSocket()}); err != nil {
			m.cfg.Log.Debug("a shim does not park", "namespace", s.Bundle.Namespace, "id", s.Bundle.ID, "error", shimapi.FromWire(err))
		}
	}()
}

func (m *Manager) parkingSocket() string { return filepath.Join(m.cfg.State, wire.SocketName) }

// Unpark closes what is parked of a task that is gone.
func (m *Manager) Unpark(ns, id string) {
	if m.cfg.Lot != nil {
		m.cfg.Lot.Drop(ns, id)
	}
}

// UnparkOthers closes what is parked, from the time of an earlier daemon, of tasks that are not known.
func (m *Manager) UnparkOthers(known func(ns, id string) bool) {
	if m.cfg.Lot != nil {
		m.cfg.Lot.Only(known)
	}
}
