package shims

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

const (
	// upgrading is how long the upgrade of one shim may take.
	upgrading = 30 * time.Second
	// upgradeTries is how often a shim is asked that is busy, and upgradePause how long it is left alone between.
	upgradeTries, upgradePause = 20, 250 * time.Millisecond
)

// Version is what our shim on disk says of itself.
func (m *Manager) Version(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, m.cfg.Binary, "-version").Output()
	if err != nil {
		return "", fmt.Errorf("cannot ask %s for its version: %w", m.cfg.Binary, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// Outdated says whether a shim of ours runs other code than what version (see Version) says, and how many execs it has.
func (m *Manager) Outdated(ctx context.Context, s *Shim, version string) (outdated bool, execs int, err error) {
	d, err := s.Shim().Describe(ctx, &shim.DescribeRequest{})
	if err != nil {
		return false, 0, shimapi.FromWire(err)
	}
	for _, p := range d.Processes {
		if p.ExecId != "" && p.State != string(shimapi.Stopped) {
			execs++
		}
	}
	return version != fmt.Sprintf("shim-runc %s\n  revision: %s", d.Version, d.Revision), execs, nil
}

// Upgrade replaces the code of a running shim by that on disk, in place. Unavailable: it is busy, try again.
// FailedPrecondition: the new code was refused or could not take over; the old one goes on.
func (m *Manager) Upgrade(ctx context.Context, s *Shim) (*shim.UpgradeResponse, error) {
	r, err := s.Shim().Upgrade(ctx, &shim.UpgradeRequest{Binary: m.cfg.Binary})
	return r, shimapi.FromWire(err)
}

// Renew replaces the code of a shim of ours if it is not that of version (see Version); with idle, only if it has no execs. A
// shim whose upgrade fails goes on as it is, and that is logged.
func (m *Manager) Renew(parent context.Context, s *Shim, version string, idle bool) {
	log := m.cfg.Log.With("namespace", s.Bundle.Namespace, "id", s.Bundle.ID)
	ctx, cancel := context.WithTimeout(parent, upgrading)
	defer cancel()
	outdated, execs, err := m.Outdated(ctx, s, version)
	switch {
	case err != nil:
		log.Warn("shim is not upgraded: it does not say what it runs", "error", err)
		return
	case !outdated:
		return
	case idle && execs > 0:
		log.Info("shim is outdated, and not upgraded because it has execs", "execs", execs)
		return
	}
	for try := 1; ; try++ {
		r, err := m.Upgrade(ctx, s)
		switch {
		case err == nil:
			log.Info("shim upgraded", "from", r.FromVersion, "to", r.Version, "pause", time.Duration(r.PauseNano))
			return
		case parent.Err() != nil: // nobody waits for the answer any more; the shim is one thing or the other
			return
		case !errdefs.IsUnavailable(err) || try == upgradeTries:
			log.Warn("shim is not upgraded, it goes on with the code that it has", "error", err)
			return
		}
		select {
		case <-s.Gone():
			return
		case <-ctx.Done():
			return
		case <-time.After(upgradePause):
		}
	}
}
