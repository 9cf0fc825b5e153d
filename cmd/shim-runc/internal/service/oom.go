package service

import (
	"context"
	"time"

	"github.com/containerd/containerd/api/events"

	"github.com/managerd/managerd/cgroups"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi"
)

const (
	// killed is the status of a process that SIGKILL has ended.
	killed = 128 + 9
	// oomBurst is how many OOM events one reading of the kernel's counter makes at most; of more kills than that, the
	// ledger's numbers tell. Ten thousand processes that the kernel kills as one group are not ten thousand fsyncs.
	oomBurst = 100
	// sameReason is how soon after a kill another one is taken to have the same reason, when no limit was hit once more.
	sameReason = time.Second
)

// watchCgroup begins to count OOM kills. A container whose cgroup cannot be watched runs all the same.
func (s *Service) watchCgroup(cg *cgroups.Cgroup, err error) {
	if err != nil {
		s.cfg.Log.Warn("no cgroup metrics", "error", err)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.mu.Lock()
	s.cgroup, s.stopOOM = cg, cancel
	s.mu.Unlock()
	s.oomMu.Lock()
	s.limits = cg.Limits()
	s.oomMu.Unlock()
	if err := cg.WatchOOM(ctx, s.tellOOM); err != nil {
		s.cfg.Log.Warn("no OOM events", "error", err)
	}
}

// tellOOM emits one event for each process that the kernel has killed beyond those that were told of. containerd's event
// has the container's id only; which kill it is, the ledger has.
func (s *Service) tellOOM(kills uint64) {
	defer s.compact()
	s.oomMu.Lock()
	defer s.oomMu.Unlock()
	if kills > s.oomTold+oomBurst {
		s.oomTold = kills - oomBurst
	}
	if s.oomTold < kills {
		// Of many that are killed for one reason, the kernel counts one after another.
		if level, path := s.limits.Hit(); level != cgroups.LevelMachine || time.Since(s.oomAt) > sameReason {
			s.oomLast.level, s.oomLast.cgroup = string(level), path
		}
		s.oomAt = time.Now()
	}
	for s.oomTold < kills {
		s.oomTold++
		_ = s.record(&ledgerpb.Record{Event: &ledgerpb.Event{
			OomKills: s.oomTold, OomLevel: s.oomLast.level, OomCgroup: s.oomLast.cgroup,
		}}, "/tasks/oom", &events.TaskOOM{ContainerID: s.cfg.ID})
	}
}

// countOOM reads the counter when a process has ended, because the watch may not have had its turn yet, tells of what is
// new, and returns the count. The last reading, at the exit of init, tries again to find a cgroup that was not found.
func (s *Service) countOOM(last bool) uint64 {
	s.mu.Lock()
	cg, stop := s.cgroup, s.stopOOM
	s.mu.Unlock()
	if last {
		stop()
		if cg == nil {
			cg = s.findCgroup()
		}
	}
	if cg != nil {
		if kills, err := cg.OOMKills(); err == nil {
			s.tellOOM(kills)
		}
	}
	s.oomMu.Lock()
	defer s.oomMu.Unlock()
	return s.oomTold
}

// findCgroup looks for the cgroup of a container whose init has ended; nil when it has gone. The engine knows where it is.
func (s *Service) findCgroup() *cgroups.Cgroup {
	_, found, err := s.lookUp(s.init.proc)
	if err != nil {
		s.cfg.Log.Warn("cannot find the cgroup of a container that has ended", "error", err)
		return nil
	}
	cg, err := cgroups.At(found.Cgroup)
	if err != nil {
		s.cfg.Log.Warn("OOM kills were not counted", "error", err)
		return nil
	}
	s.mu.Lock()
	s.cgroup = cg
	s.mu.Unlock()
	return cg
}

// oomSoFar is how many kills were told of before p began; none before init did.
func (s *Service) oomSoFar(p *process) uint64 {
	if p.kind == shimapi.Init {
		return 0
	}
	s.oomMu.Lock()
	defer s.oomMu.Unlock()
	return s.oomTold
}

// oomKilledBy says whether a process that has ended with status bears the OOM mark; kills is the count at its exit.
func (p *process) oomKilledBy(status int, kills uint64) bool {
	return status == killed && kills > p.oomBefore
}
