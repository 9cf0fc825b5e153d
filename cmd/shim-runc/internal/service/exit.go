package service

import (
	"time"

	"github.com/containerd/containerd/api/events"
	"google.golang.org/protobuf/types/known/timestamppb"

	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/parking"
)

// patience is how long an exit waits for a client that does not take the process's last output. The output is kept, and
// goes on being copied, after that.
const patience = 2 * time.Second

// stubborn is how long the exit of init waits for processes that do not end (uninterruptible sleep).
const stubborn = 10 * time.Second

// awaitExit waits for a process to end and tells of it: first what it wrote, then the ledger, then everyone.
func (s *Service) awaitExit(p *process) {
	exit := p.proc.Exit()
	s.exits.enter()
	defer s.exits.leave()
	failpoint.Hit("shim.exit.taken")
	if p.kind == shimapi.Init {
		s.endOthers()
	}
	p.io.open.Drain(patience)
	failpoint.Hit("shim.exit.drained")
	kills := s.countOOM(p.kind == shimapi.Init)
	if p.kind == shimapi.Exec {
		s.container.ForgetExec(p.execID)
	}
	timedOut := s.endDeadline(p, exit.Status)

	p.starting.Lock() // a Start under way tells first
	defer p.starting.Unlock()
	id := p.execID
	if id == "" {
		id = s.cfg.ID
	}
	if exit.Unknown != "" {
		s.cfg.Log.Warn("it is not known how a process ended", "process", p.label(s.cfg.ID), "reason", exit.Unknown)
	}
	insist(func() error {
		return s.record(&ledgerpb.Record{Exit: &ledgerpb.Exit{
			ContainerId: s.cfg.ID, ExecId: p.execID, Pid: uint32(p.pid), Status: uint32(exit.Status), ExitedUnixNano: exit.At.UnixNano(),
			Unknown: exit.Unknown, OomKills: kills, OomKilled: p.oomKilledBy(exit.Status, kills), TimedOut: timedOut,
		}}, "/tasks/exit", &events.TaskExit{
			ContainerID: s.cfg.ID, ID: id, Pid: uint32(p.pid), ExitStatus: uint32(exit.Status), ExitedAt: timestamppb.New(exit.At),
		})
	})
	failpoint.Hit("shim.exit.recorded")
	p.proc.Forget()
	s.unpark(p, parking.Pidfd) // before anyone can delete it, and end us
	s.mu.Lock()
	p.state = shimapi.MustNext(p.kind, p.state, shimapi.Exited)
	p.status, p.exitedAt, p.unknown = exit.Status, exit.At, exit.Unknown
	p.oomKilled = p.oomKilledBy(exit.Status, kills)
	s.mu.Unlock()
	s.keepOrLog(p)
	failpoint.Hit("shim.exit.kept")
	close(p.exited)
}

// insisting is how long an exit waits until it can be written down (the disk is full); who waits for it is answered then.
const insisting = 30 * time.Second

// insist tries until that succeeds, or has failed for long.
func insist(write func() error) {
	begin := time.Now()
	for wait := 10 * time.Millisecond; write() != nil && time.Since(begin) < insisting; wait = min(2*wait, time.Second) {
		time.Sleep(wait) // nothing tells that there is room
	}
}

// endOthers keeps new execs from starting, ends what can outlive init, and waits until the exits of the execs have been
// told: a container's own exit comes last.
func (s *Service) endOthers() {
	s.mu.Lock()
	s.dying = true
	execs := s.execsLocked()
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, e := range execs {
			e.awaitStart()
		}
		if s.container.SharedPID() {
			if err := s.container.Signal(9, true); err != nil {
				s.cfg.Log.Error("cannot end what outlives init", "error", err)
			}
		}
		for _, e := range execs {
			s.mu.Lock()
			started := e.proc != nil
			s.mu.Unlock()
			if started {
				<-e.exited
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(stubborn):
		s.cfg.Log.Error("init has ended, other processes of the container do not", "waited", stubborn)
	}
}

// awaitStart returns when no start is under way: the process is there then, or has failed to.
func (p *process) awaitStart() {
	p.starting.Lock()
	defer p.starting.Unlock()
}

func (s *Service) execsLocked() []*process {
	out := make([]*process, 0, len(s.execs))
	for _, e := range s.execs {
		out = append(out, e)
	}
	return out
}
