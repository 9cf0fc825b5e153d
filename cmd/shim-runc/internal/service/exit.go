package service

import (
	"time"

	"github.com/containerd/containerd/api/events"
	"google.golang.org/protobuf/types/known/timestamppb"

	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi"
)

// patience is how long an exit waits for a client that does not take the process's last output. The output is kept, and
// goes on being copied, after that.
const patience = 2 * time.Second

// awaitExit waits for a process to end and tells of it: first what it wrote, then the ledger, then everyone.
func (s *Service) awaitExit(p *process) {
	exit := p.proc.Exit()
	if p.kind == shimapi.Init {
		s.endOthers()
	}
	p.io.open.Drain(patience)
	if p.kind == shimapi.Init {
		s.reportOOM()
	}

	p.starting.Lock() // a Start under way tells first
	defer p.starting.Unlock()
	id := p.execID
	if id == "" {
		id = s.cfg.ID
	}
	if _, err := s.ledger.Append(&ledgerpb.Record{Exit: &ledgerpb.Exit{
		ContainerId: s.cfg.ID, ExecId: p.execID, Pid: uint32(p.pid), Status: uint32(exit.Status), ExitedUnixNano: exit.At.UnixNano(),
	}}); err != nil {
		s.cfg.Log.Error("cannot record exit", "process", p.label(s.cfg.ID), "status", exit.Status, "error", err)
	}
	_ = s.emit("/tasks/exit", &events.TaskExit{
		ContainerID: s.cfg.ID, ID: id, Pid: uint32(p.pid), ExitStatus: uint32(exit.Status), ExitedAt: timestamppb.New(exit.At),
	})
	s.mu.Lock()
	p.state = shimapi.MustNext(p.kind, p.state, shimapi.Exited)
	p.status, p.exitedAt = exit.Status, exit.At
	s.mu.Unlock()
	close(p.exited)
}

// endOthers ends what can outlive init, and waits until the exits of the execs have been told: a container's own exit
// comes last.
func (s *Service) endOthers() {
	s.mu.Lock()
	c := s.container
	var running []*process
	for _, e := range s.execs {
		if e.proc != nil {
			running = append(running, e)
		}
	}
	s.mu.Unlock()
	if c.SharedPID() {
		if err := c.Signal(9, true); err != nil {
			s.cfg.Log.Error("cannot end what outlives init", "error", err)
		}
	}
	for _, e := range running {
		<-e.exited
	}
}

// reportOOM reads the counters a last time: the kernel may have killed init before the watch had its turn.
func (s *Service) reportOOM() {
	s.mu.Lock()
	cg, stop := s.cgroup, s.stopOOM
	s.mu.Unlock()
	if cg == nil {
		return
	}
	kills, err := cg.OOMKills()
	stop()
	if err == nil && kills > 0 && !s.oomTold() {
		_ = s.emit("/tasks/oom", &events.TaskOOM{ContainerID: s.cfg.ID})
	}
}

// oomTold says whether the ledger has an OOM event.
func (s *Service) oomTold() bool {
	since := uint64(0)
	for {
		records, _, err := s.ledger.Since(since, 256)
		if err != nil || len(records) == 0 {
			return false
		}
		for _, r := range records {
			since = r.Seq
			if r.Event != nil && r.Event.Topic == "/tasks/oom" {
				return true
			}
		}
	}
}
