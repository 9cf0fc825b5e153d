package service

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// tableSchema is the version of the records that this code writes. It reads those of one more, too, which a version wrote that
// was taken back.
const tableSchema = 1

// keep writes a process's record, so that a successor knows it. It is called after each step that a client is told of,
// and before the client is.
func (s *Service) keep(p *process) error {
	p.keeping.Lock() // the newest record is written last
	defer p.keeping.Unlock()
	s.mu.Lock()
	record, err := s.recordLocked(p)
	gone := p.state == shimapi.Deleted
	s.mu.Unlock()
	if gone {
		return nil
	}
	var data []byte
	if err == nil {
		data, err = record.Marshal()
	}
	dir := filepath.Join(s.cfg.Bundle, shimapi.TableDir)
	path := filepath.Join(dir, shimapi.TableName(p.execID))
	half := filepath.Join(dir, "."+shimapi.TableName(p.execID)+".new")
	if err == nil {
		err = os.WriteFile(half, data, 0o600)
	}
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.Mkdir(dir, 0o711); err == nil || errors.Is(err, fs.ErrExist) {
			err = os.WriteFile(half, data, 0o600)
		}
	}
	failpoint.Hit("shim.table.half")
	if err == nil {
		err = os.Rename(half, path)
	}
	if err != nil {
		return fmt.Errorf("cannot keep the record of process %s: %w", p.label(s.cfg.ID), err)
	}
	return nil
}

// keepOrLog is keep where nothing can be taken back any more.
func (s *Service) keepOrLog(p *process) {
	if err := s.keep(p); err != nil {
		s.cfg.Log.Error("a successor of this shim would not know the newest state", "error", err)
	}
}

// drop removes the record of a process that is deleted.
func (s *Service) drop(p *process) {
	p.keeping.Lock()
	defer p.keeping.Unlock()
	if err := os.Remove(filepath.Join(s.cfg.Bundle, shimapi.TableDir, shimapi.TableName(p.execID))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.cfg.Log.Error("cannot remove the record of a process", "process", p.label(s.cfg.ID), "error", err)
	}
}

func (s *Service) recordLocked(p *process) (*shimstate.Process, error) {
	r := &shimstate.Process{
		Schema: tableSchema, BootId: s.boot, ContainerId: s.cfg.ID, ExecId: p.execID, State: string(settled(p.state)),
		Pid: uint32(p.pid), StartTicks: p.ticks, Terminal: p.io.terminal, Stdin: p.io.stdin, Stdout: p.io.stdout, Stderr: p.io.stderr,
		InputEnded: p.inputEnd, Launcher: p.launcher, Starting: p.launching, ExitStatus: uint32(p.status), ExitUnknown: p.unknown,
		TimeoutNano: int64(p.timeout), TimedOut: p.timedOut,
	}
	if !p.deadline.IsZero() {
		r.DeadlineUnixNano = p.deadline.UnixNano()
	}
	if !p.exitedAt.IsZero() {
		r.ExitedUnixNano = p.exitedAt.UnixNano()
	}
	if p.kind == shimapi.Exec && p.pid == 0 {
		var err error
		if r.Spec, err = json.Marshal(p.spec); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// settled is a state without the requests that pass through it: another incarnation does not go on with those.
func settled(st shimapi.State) shimapi.State {
	switch st {
	case shimapi.Pausing, shimapi.Paused, shimapi.Checkpointing:
		return shimapi.Running // whether it is paused the cgroup knows
	}
	return st
}

// Export gives the process table, for a program that goes on in this one's place.
func (s *Service) Export() (*shimstate.Table, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := &shimstate.Table{Schema: tableSchema}
	if s.init == nil {
		return t, nil
	}
	for _, p := range append([]*process{s.init}, s.execsLocked()...) {
		r, err := s.recordLocked(p)
		if err != nil {
			return nil, fmt.Errorf("cannot record process %s: %w", p.label(s.cfg.ID), err)
		}
		t.Processes = append(t.Processes, r)
	}
	return t, nil
}

// LoadTable reads the process table that a shim has left in its bundle. A record that cannot be read is left out, and
// named by the error, which is no reason not to use the rest.
func LoadTable(bundle string) (*shimstate.Table, error) {
	t := &shimstate.Table{Schema: tableSchema}
	dir := filepath.Join(bundle, shimapi.TableDir)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return t, fmt.Errorf("cannot read the process table: %w", err)
	}
	var bad []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") && e.Name() != shimapi.TableName("") {
			continue // half written: the one before it counts
		}
		r := &shimstate.Process{}
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err == nil {
			err = r.Unmarshal(data)
		}
		switch {
		case err == nil && r.Schema > tableSchema+1:
			err = fmt.Errorf("it has schema %d, the newest known is %d", r.Schema, tableSchema+1)
		case err == nil && shimapi.TableName(r.ExecId) != e.Name():
			err = fmt.Errorf("it is of process %q", r.ExecId)
		}
		if err != nil {
			bad = append(bad, fmt.Errorf("cannot read the record %s: %w", filepath.Join(dir, e.Name()), err))
			continue
		}
		t.Processes = append(t.Processes, r)
	}
	return t, errors.Join(bad...)
}

// fromRecord makes a process as its record has it, without streams and without somebody who waits for it.
func fromRecord(r *shimstate.Process) (*process, error) {
	p := &process{
		kind: shimapi.Init, execID: r.ExecId, state: shimapi.State(r.State), pid: int(r.Pid), ticks: r.StartTicks,
		io:       streams{stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr, terminal: r.Terminal},
		inputEnd: r.InputEnded, launcher: r.Launcher, launching: r.Starting, exited: make(chan struct{}),
		timeout: time.Duration(r.TimeoutNano), timedOut: r.TimedOut,
	}
	if r.DeadlineUnixNano != 0 {
		p.deadline = time.Unix(0, r.DeadlineUnixNano)
	}
	if r.ExecId != "" {
		p.kind = shimapi.Exec
		p.spec = &specs.Process{}
		if len(r.Spec) > 0 {
			if err := json.Unmarshal(r.Spec, p.spec); err != nil {
				return nil, fmt.Errorf("cannot read the spec of exec %s: %w", r.ExecId, err)
			}
		}
	}
	switch p.state {
	case shimapi.Stopped:
		p.status, p.unknown, p.exitedAt = int(r.ExitStatus), r.ExitUnknown, time.Unix(0, r.ExitedUnixNano)
		return p, nil
	case shimapi.Created, shimapi.Running:
		return p, nil
	}
	return nil, fmt.Errorf("process %s is in state %q", shimapi.TableName(r.ExecId), r.State)
}

// setProcess notes what was forked for p.
func (s *Service) setProcess(p *process, proc *reaper.Process) {
	ticks := reaper.StartTicks(proc.Pid())
	s.mu.Lock()
	defer s.mu.Unlock()
	p.proc, p.pid, p.ticks, p.launcher, p.launching = proc, proc.Pid(), ticks, os.Args[0], false
}
