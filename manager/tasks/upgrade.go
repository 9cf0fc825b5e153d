package tasks

import (
	"context"
	"time"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/shims"
)

const (
	// upgrading is how long the upgrade of one shim may take.
	upgrading = 30 * time.Second
	// upgradeTries is how often a shim is asked that is busy, and upgradePause how long it is left alone between.
	upgradeTries, upgradePause = 20, 250 * time.Millisecond
)

// UpgradeShims replaces, in the background and one after the other, the code of those shims that run another version than
// that on disk, once all that are there are known. With idle, those that have execs are left alone. A shim whose upgrade
// fails goes on as it is, and that is logged.
func (s *Service) UpgradeShims(idle bool, recovered <-chan struct{}) error {
	return s.background(func() {
		select {
		case <-recovered:
		case <-s.ctx.Done():
			return
		}
		version, err := s.shims.Version(s.ctx)
		if err != nil {
			s.log.Error("shims are not upgraded", "error", err)
			return
		}
		s.mu.Lock()
		all := make([]*Task, 0, len(s.tasks))
		for _, t := range s.tasks {
			all = append(all, t)
		}
		s.mu.Unlock()
		for _, t := range all {
			if shim, _, _ := t.now(); shim != nil && shim.Own && s.ctx.Err() == nil {
				s.upgrade(t, shim, version, idle)
			}
		}
	})
}

func (s *Service) upgrade(t *Task, shim *shims.Shim, version string, idle bool) {
	log := s.log.With("namespace", t.key.ns, "id", t.key.id)
	ctx, cancel := context.WithTimeout(s.in(t.key.ns), upgrading)
	defer cancel()
	outdated, execs, err := s.shims.Outdated(ctx, shim, version)
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
		r, err := s.shims.Upgrade(ctx, shim)
		switch {
		case err == nil:
			log.Info("shim upgraded", "from", r.FromVersion, "to", r.Version, "pause", time.Duration(r.PauseNano))
			return
		case s.ctx.Err() != nil: // nobody waits for the answer any more; the shim is one thing or the other
			return
		case !errdefs.IsUnavailable(err) || try == upgradeTries:
			log.Warn("shim is not upgraded, it goes on with the code that it has", "error", err)
			return
		}
		select {
		case <-shim.Gone():
			return
		case <-ctx.Done():
			return
		case <-time.After(upgradePause):
		}
	}
}
