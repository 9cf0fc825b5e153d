package service

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/cmd/shim-runc/internal/stdio"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/blackbox"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/parking"
)

// Held are descriptors that somebody has kept, by exec id (empty for the init) and kind (package parking).
type Held map[string]map[string]*os.File

// Close closes those that nobody has taken.
func (h Held) Close() {
	for _, files := range h {
		for _, f := range files {
			_ = f.Close()
		}
	}
}

// takePidfd takes a process's pidfd out; nil for none.
func (h Held) takePidfd(execID string) *os.File {
	f := h[execID][parking.Pidfd]
	delete(h[execID], parking.Pidfd)
	return f
}

// Restore goes on with the container that another incarnation kept: its processes as table has them, corrected by what
// the ledger and the kernel know better. held is taken over. It is to be called before anything is served. NotFound when
// there is nothing to be kept.
//
// What a client was told of stays as it was told. What was under way is brought to its end or taken back: a start whose
// event was not written yet is told, an exec that was just being started has ended, in a way that nobody knows.
func (s *Service) Restore(table *shimstate.Table, held Held) error {
	if err := s.restore(table, held); err != nil {
		return err
	}
	s.parkEverything()
	s.awaitEnded()
	s.box.Add(blackbox.Note, 0, fmt.Sprintf("took over from a shim that died; processes: %d", 1+len(s.execs)))
	return nil
}

// takingExits is how long Restore waits for the exits of processes that had ended before.
const takingExits = time.Second

// awaitEnded waits until what ended while no shim lived is known to have: clients may have been told that already.
func (s *Service) awaitEnded() {
	s.mu.Lock()
	all := append(s.execsLocked(), s.init)
	s.mu.Unlock()
	late := time.After(takingExits)
	for _, p := range all {
		if p.proc == nil || !p.proc.Over() {
			continue
		}
		select {
		case <-p.exited:
		case <-late:
			return
		}
	}
}

// Succeed is Restore for the program that replaces another in the same process. Nobody waits for the daemon meanwhile.
func (s *Service) Succeed(h *shimstate.Handover, held Held) error {
	if err := s.restore(h.Table, held); err != nil {
		return err
	}
	s.box.Add(blackbox.Note, 0, fmt.Sprintf("goes on in the place of version %s; processes: %d", h.Version, 1+len(s.execs)))
	go s.parkEverything()
	return nil
}

func (s *Service) restore(table *shimstate.Table, held Held) error {
	defer held.Close()
	past, err := s.readPast()
	if err != nil {
		return err
	}
	fail := func(err error) error { return fmt.Errorf("cannot take over container %s: %w", s.cfg.ID, err) }
	var all []*process
	for _, r := range table.Processes {
		if r.ContainerId != s.cfg.ID {
			return fail(fmt.Errorf("the record of process %q is of container %s: %w", r.ExecId, r.ContainerId, errdefs.ErrDataLoss))
		}
		if r.BootId != s.boot {
			return fail(fmt.Errorf("the machine was started anew since: %w", errdefs.ErrNotFound))
		}
		p, err := fromRecord(r)
		if err != nil {
			return fail(err)
		}
		if p.kind == shimapi.Init {
			s.init = p
			continue
		}
		all = append(all, p)
	}
	if s.init == nil || past.deleted {
		s.init = nil
		return fail(fmt.Errorf("it was never made, or is deleted: %w", errdefs.ErrNotFound))
	}
	if spec, err := readSpec(s.cfg.Bundle); err == nil {
		s.init.spec = spec.Process
	}
	all = append([]*process{s.init}, all...) // the init's pid names the cgroup
	s.oomTold = past.oomKills
	for _, p := range all {
		if err := s.revive(p, past, held.takePidfd(p.execID)); err != nil {
			return fail(err)
		}
	}
	failpoint.Hit("shim.adopt.revived")
	found, err := s.loadContainer()
	if err != nil {
		return fail(err)
	}
	for _, p := range all {
		if p.kind == shimapi.Exec {
			s.execs[p.execID] = p
		}
		s.settle(p, past, found)
		s.reopen(p, held[p.execID])
		if p.launching {
			s.abandon(p)
		}
		s.keepOrLog(p)
	}
	failpoint.Hit("shim.adopt.settled")
	if !found.Removed && s.init.pid != 0 {
		cg, err := cgroups.Load(s.init.pid)
		if err != nil || s.init.state == shimapi.Stopped {
			cg, err = cgroups.At(found.Cgroup) // nobody is in it any more
		}
		s.watchCgroup(cg, err)
		if cg != nil {
			if kills, err := cg.OOMKills(); err == nil {
				s.tellOOM(kills) // those since the last that was told of
			}
		}
	}
	for _, p := range all {
		if p.proc != nil && p.state != shimapi.Stopped {
			s.watchDeadline(p)
			go s.awaitExit(p)
		}
	}
	return nil
}

func (s *Service) parkEverything() {
	s.parker.mu.Lock()
	defer s.parker.mu.Unlock()
	if s.parker.socket != "" {
		s.parkAgainLocked(s.parkAllLocked())
	}
}

// revive finds out what has become of a process.
func (s *Service) revive(p *process, past *past, pidfd *os.File) error {
	if p.kind == shimapi.Exec {
		p.oomBefore = past.oomBefore[processKey{p.execID, p.pid}]
	}
	drop := func() {
		if pidfd != nil {
			_ = pidfd.Close()
		}
	}
	e := past.exits[processKey{p.execID, p.pid}]
	if p.pid == 0 && p.kind == shimapi.Exec && !(p.launching && !past.added[p.execID]) {
		e = nil // of another that had its name, not of this one, abandoned by a shim that died before it could keep that
	}
	if e != nil {
		p.launching = false
		p.state, p.status, p.exitedAt, p.unknown = shimapi.Stopped, int(e.Status), time.Unix(0, e.ExitedUnixNano), e.Unknown
		p.oomKilled, p.timedOut = e.OomKilled, e.TimedOut
	}
	if p.state == shimapi.Stopped {
		drop()
		close(p.exited)
		return nil
	}
	if p.pid == 0 {
		drop()
		return nil
	}
	proc, err := s.cfg.Reaper.Adopt(p.pid, p.ticks, pidfd)
	if err != nil {
		return err
	}
	p.proc = proc
	return nil
}

// loadContainer loads what the engine has kept. A container whose init has ended is there as well, until it is deleted.
func (s *Service) loadContainer() (engine.Found, error) {
	if s.init.pid == 0 { // it was to be restored from a checkpoint
		s.container = unrestored{id: s.cfg.ID}
		opts := KeptOptions(s.cfg.Bundle)
		e, err := s.cfg.NewEngine(s.engineConfig(opts), opts.BinaryName)
		if err == nil {
			err = e.Remove(s.cfg.ID, s.cfg.Bundle) // a Start may have been under way, of which its client knows that it failed
		}
		return engine.Found{Parked: true}, err
	}
	init := s.init.proc
	if init == nil { // it has ended, and that is recorded: nothing is asked of it any more
		var err error
		if init, err = s.cfg.Reaper.Adopt(s.init.pid, 0, nil); err != nil {
			return engine.Found{}, err
		}
	}
	c, found, err := s.lookUp(init)
	if err != nil {
		return found, err
	}
	s.container = c
	return found, nil
}

// lookUp asks the engine for the container, and changes nothing.
func (s *Service) lookUp(init *reaper.Process) (Container, engine.Found, error) {
	opts := KeptOptions(s.cfg.Bundle)
	e, err := s.cfg.NewEngine(s.engineConfig(opts), opts.BinaryName)
	if err != nil {
		return nil, engine.Found{}, err
	}
	return e.Load(s.cfg.ID, s.cfg.Bundle, init, s.init.launcher)
}

// settle brings what was under way to its end, and tells what was not told.
func (s *Service) settle(p *process, past *past, found engine.Found) {
	if p.state == shimapi.Stopped {
		return
	}
	if p.kind == shimapi.Init {
		if found.Parked {
			p.state = shimapi.Created
			return
		}
		if p.state = shimapi.Running; found.Paused {
			p.state = shimapi.Paused
		}
		if !past.told["/tasks/start"] {
			_ = s.emit("/tasks/start", &events.TaskStart{ContainerID: s.cfg.ID, Pid: uint32(p.pid)})
		}
		return
	}
	if p.state == shimapi.Created && !past.added[p.execID] {
		_ = s.emit("/tasks/exec-added", &events.TaskExecAdded{ContainerID: s.cfg.ID, ExecID: p.execID})
	}
	p.launching = p.launching && p.pid == 0
	if p.state == shimapi.Running && !past.started[processKey{p.execID, p.pid}] {
		_ = s.emit("/tasks/exec-started", &events.TaskExecStarted{ContainerID: s.cfg.ID, ExecID: p.execID, Pid: uint32(p.pid)})
	}
}

// abandon ends an exec that was being forked when the last incarnation died: its client has seen the start fail, but it
// may run.
func (s *Service) abandon(p *process) {
	const why = "its shim died while it was being started"
	s.cfg.Log.Warn("ending an exec that was being started", "exec", p.execID)
	s.endHolders(p)
	if p.io.open != nil {
		p.io.open.Drain(time.Second) // it may have said something
	}
	p.launching = false
	p.state, p.status, p.exitedAt, p.unknown = shimapi.Stopped, reaper.UnknownStatus, time.Now(), why
	_ = s.record(&ledgerpb.Record{Exit: &ledgerpb.Exit{
		ContainerId: s.cfg.ID, ExecId: p.execID, Status: reaper.UnknownStatus, ExitedUnixNano: p.exitedAt.UnixNano(), Unknown: why,
	}}, "/tasks/exit", &events.TaskExit{
		ContainerID: s.cfg.ID, ID: p.execID, ExitStatus: reaper.UnknownStatus, ExitedAt: timestamppb.New(p.exitedAt),
	})
	close(p.exited)
}

// endHolders kills the processes of the container that have a FIFO of an exec: nobody else gets one.
func (s *Service) endHolders(p *process) {
	pids, err := s.container.Pids()
	if err != nil {
		return
	}
	prefix := filepath.Join(s.cfg.Bundle, shimapi.StdioDir, p.execID) + "."
	for _, pid := range pids {
		for _, fd := range []string{"0", "1", "2"} {
			if to, err := os.Readlink(filepath.Join("/proc", fmt.Sprint(pid), "fd", fd)); err == nil && strings.HasPrefix(to, prefix) {
				if err := cgroups.Signal([]int{pid}, unix.SIGKILL, s.container.Pids); err != nil {
					s.cfg.Log.Error("cannot end a process of an exec", "exec", p.execID, "pid", pid, "error", err)
				}
				break
			}
		}
	}
}

// reopen goes on with a process's streams, also with those of one that has ended: a client may not have read all of it.
func (s *Service) reopen(p *process, held map[string]*os.File) {
	if p.pid == 0 && !p.launching && (p.kind == shimapi.Init || p.state != shimapi.Stopped) {
		return // never started
	}
	if held == nil {
		held = map[string]*os.File{}
	}
	open, err := stdio.Reopen(s.streamConfig(p, KeptOptions(s.cfg.Bundle)), held, p.state != shimapi.Created)
	if err != nil {
		s.cfg.Log.Warn("not all streams could be taken over", "process", p.label(s.cfg.ID), "error", err)
	}
	p.io.open = open
	if p.inputEnd {
		open.CloseStdin()
	}
}

type processKey struct {
	execID string
	pid    int
}

// past is what the ledger has of earlier incarnations.
type past struct {
	exits    map[processKey]*ledgerpb.Exit
	told     map[string]bool // topics of the container's own events
	started  map[processKey]bool
	added    map[string]bool // execs that were told of, and have not ended
	deleted  bool            // the container is gone, and that was told
	oomKills uint64
	// oomBefore is how many OOM kills were told of before a process began.
	oomBefore map[processKey]uint64
}

func (s *Service) readPast() (*past, error) {
	p := &past{exits: map[processKey]*ledgerpb.Exit{}, told: map[string]bool{}, started: map[processKey]bool{}, added: map[string]bool{}, oomBefore: map[processKey]uint64{}}
	for since := uint64(0); ; {
		records, _, err := s.ledger.Since(since, batch)
		if err != nil {
			return nil, err
		}
		if len(records) == 0 {
			return p, nil
		}
		for _, r := range records {
			since = r.Seq
			if n := r.Process; n != nil {
				// Another process, should the name and the number have been there before.
				delete(p.exits, processKey{n.ExecId, int(n.Pid)})
				delete(p.started, processKey{n.ExecId, int(n.Pid)})
				p.oomBefore[processKey{n.ExecId, int(n.Pid)}] = max(p.oomKills, n.OomKills)
			}
			if e := r.Exit; e != nil {
				p.exits[processKey{e.ExecId, int(e.Pid)}] = e
				delete(p.added, e.ExecId)
			}
			if e := r.Event; e != nil {
				p.told[e.Topic] = true
				p.oomKills = max(p.oomKills, e.OomKills)
				s.readEvent(p, e)
			}
		}
	}
}

func (s *Service) readEvent(p *past, e *ledgerpb.Event) {
	switch e.Topic {
	case "/tasks/delete":
		var d events.TaskDelete
		err := typeurl.UnmarshalToByTypeURL(e.TypeUrl, e.Value, &d)
		p.deleted = p.deleted || err == nil && (d.ID == "" || d.ID == s.cfg.ID)
	case "/tasks/exec-added":
		var d events.TaskExecAdded
		if err := typeurl.UnmarshalToByTypeURL(e.TypeUrl, e.Value, &d); err == nil {
			p.added[d.ExecID] = true
		}
	case "/tasks/exec-started":
		var d events.TaskExecStarted
		if err := typeurl.UnmarshalToByTypeURL(e.TypeUrl, e.Value, &d); err == nil {
			p.started[processKey{d.ExecID, int(d.Pid)}] = true
		}
	}
}

// LoadTable reads the process table in the bundle: see the function of that name.
func (s *Service) LoadTable() (*shimstate.Table, error) { return LoadTable(s.cfg.Bundle) }
