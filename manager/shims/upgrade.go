package shims

import (
	"context"
	"fmt"
	"os/exec"
	"strings"

	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
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
