package service

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"

	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi"
)

// compactStep is by how many bytes the ledger may grow before it is looked at again whether something can be dropped.
const compactStep = 256 << 10

// Taken says that a daemon which gets its events forwarded has all of them up to seq.
func (s *Service) Taken(seq uint64) {
	for {
		was := s.taken.Load()
		if seq <= was || s.taken.CompareAndSwap(was, seq) {
			return
		}
	}
}

// confirmed is the sequence number from which on the daemon, whichever it is, would go on: what is up to it, it has.
func (s *Service) confirmed() uint64 {
	seq := s.taken.Load()
	if data, err := os.ReadFile(filepath.Join(s.cfg.Bundle, shimapi.CursorFile)); err == nil && len(data) >= 8 {
		seq = max(seq, binary.LittleEndian.Uint64(data))
	}
	return seq
}

// compact drops what nobody needs any more from a ledger that has grown: of what the daemon has, all but the container's
// own life and that of the execs which are there. It is not to be called with a lock held.
func (s *Service) compact() {
	s.compacting.Lock()
	defer s.compacting.Unlock()
	if s.ledger.Size() < s.compactAt {
		return
	}
	confirmed := s.confirmed() // before we look which execs there are: none of theirs is dropped
	if confirmed > s.ledger.Trimmed() {
		s.oomMu.Lock()
		told := s.oomTold
		s.oomMu.Unlock()
		s.mu.Lock()
		live := map[string]bool{"": true}
		for id := range s.execs {
			live[id] = true
		}
		paused := s.init != nil && s.init.state == shimapi.Paused
		s.mu.Unlock()
		if err := s.ledger.Compact(confirmed, func(r *ledgerpb.Record) bool { return needed(r, live, told, paused) }); err != nil {
			s.cfg.Log.Warn("the ledger grows", "error", err)
		}
	}
	s.compactAt = max(s.ledger.Size()+compactStep, 2*s.ledger.Size())
}

// compactQuiet compacts a ledger that is larger than it would be if the daemon had kept up. It says whether there will be more
// to drop when the daemon has taken the rest.
func (s *Service) compactQuiet() (more bool) {
	select {
	case <-s.ending:
		return false
	default:
	}
	s.handlers.enter()
	defer s.handlers.leave()
	if s.ledger.Size() <= compactStep {
		return false
	}
	s.compacting.Lock()
	s.compactAt = 0
	s.compacting.Unlock()
	s.compact()
	return s.ledger.Size() > compactStep && s.confirmed() < s.ledger.Last()
}

// needed says whether a successor of this shim, or a daemon that has lost its memory, could want a record: live are the
// processes that there are, told is how many OOM kills were told of, paused is how the container is.
func needed(r *ledgerpb.Record, live map[string]bool, told uint64, paused bool) bool {
	switch e := r.Event; {
	case r.Process != nil:
		return live[r.Process.ExecId]
	case r.Exit != nil:
		return live[r.Exit.ExecId]
	case e == nil:
		return false
	default:
		switch e.Topic {
		case "/tasks/create", "/tasks/start", "/tasks/delete":
			return true
		case "/tasks/paused":
			return paused
		case "/tasks/oom":
			return e.OomKills == told // it holds the count
		case "/tasks/exec-started":
			var d events.TaskExecStarted
			return typeurl.UnmarshalToByTypeURL(e.TypeUrl, e.Value, &d) != nil || live[d.ExecID]
		}
		return false
	}
}

// checkSince refuses to go on behind a record when others that followed it are not there any more.
func (s *Service) checkSince(since uint64) error {
	if trimmed := s.ledger.Trimmed(); since > 0 && since < trimmed {
		return fmt.Errorf("the ledger of container %s has been compacted up to number %d, behind %d not everything is there: "+
			"ask for what is above 0 to get what there is: %w", s.cfg.ID, trimmed, since, errdefs.ErrOutOfRange)
	}
	return nil
}
