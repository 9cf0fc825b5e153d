package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/handover"
	"github.com/managerd/managerd/cmd/shim-runc/internal/service"
	"github.com/managerd/managerd/cmd/shim-runc/internal/wire"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/version"
)

// stillness is how long it may take until nothing is under way; clients wait meanwhile.
const stillness = 3 * time.Second

// broken, set by a test at link time, makes a program that passes every check and then cannot take over.
var broken string

// replace replaces this program by the one at path, and returns only when that failed: everything goes on then, as it was.
//
// The order matters. First no new request comes; then those under way end, and only then is the fork guard taken, because
// one of them may be waiting for it; descriptors are made to survive last, when nothing forks any more.
func (s *server) replace(ctx context.Context, path string) error {
	if !s.replacing.TryLock() {
		return fmt.Errorf("another upgrade is under way: %w", errdefs.ErrUnavailable)
	}
	defer s.replacing.Unlock()
	if path == "" {
		path = started()
	}
	table, err := s.svc.Export()
	if err != nil {
		return err
	}
	binary, err := handover.Open(path, &shimstate.Handover{Schema: handover.Schema, Table: table, Version: version.Version}, s.reaper.Guard)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	defer func() { _ = binary.Close() }()

	failpoint.Hit("shim.upgrade.checked")
	ctx, cancel := context.WithTimeout(ctx, stillness)
	defer cancel()
	frozen := monotonic()
	if err := s.listener.Freeze(ctx); err != nil {
		return fmt.Errorf("%v: %w", err, errdefs.ErrUnavailable) // the deadline is ours, not the client's
	}
	defer s.listener.Thaw()
	failpoint.Hit("shim.upgrade.frozen")
	if err := s.svc.Quiet(ctx); err != nil {
		return err
	}
	defer s.svc.Unquiet()
	select {
	case s.forward.sending <- struct{}{}:
		defer func() { <-s.forward.sending }()
	case <-ctx.Done():
		return fmt.Errorf("an event is being forwarded: %v: %w", ctx.Err(), errdefs.ErrUnavailable)
	}

	failpoint.Hit("shim.upgrade.quiet")
	var files handover.Bundle
	defer files.Close()
	record, err := s.record(&files)
	if err != nil {
		return err
	}
	record.FrozenNano = frozen
	err = handover.Exec(binary, record, &files)
	outlive() // these signals are ignored now
	go s.tellStacks()
	return err
}

// record is all that a successor needs.
func (s *server) record(files *handover.Bundle) (*shimstate.Handover, error) {
	hand := s.svc.Hand
	if s.sandbox != nil {
		hand = s.sandbox.HandSandbox
	}
	h, held, err := hand()
	if err != nil {
		return nil, err
	}
	for execID, kinds := range held {
		for kind, f := range kinds {
			h.Held = append(h.Held, &shimstate.Descriptor{ExecId: execID, Kind: kind, Fd: files.Add(f)})
		}
	}
	socket, conns, err := s.listener.HandOver()
	if err != nil {
		return nil, err
	}
	h.Socket = files.Add(socket)
	for _, c := range conns {
		h.Connections = append(h.Connections, &shimstate.Connection{Fd: files.Add(c.File), Unread: c.Unread})
	}
	h.Forwarded = s.forward.taken
	return h, nil
}

func (s *server) tellStacks() { tellStacks(filepath.Join(s.args.bundle, shimapi.StacksFile), s.log) }

// started is the path of the program that this process was started from, whatever is there now.
func started() string {
	if filepath.IsAbs(os.Args[0]) {
		return os.Args[0]
	}
	path, _ := os.Readlink("/proc/self/exe")
	return strings.TrimSuffix(path, " (deleted)")
}

// monotonic is the time of a clock that goes on across execve(2).
func monotonic() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

// resume goes on in the place of the program before, or gives the process back to it, and then does not return.
func (s *server) resume(r *handover.Received) error {
	err := s.takeOver(r)
	if err != nil {
		s.log.Error("cannot take over, the program before goes on", "version", version.Version, "error", err)
		return r.Back(err)
	}
	return nil
}

func (s *server) takeOver(r *handover.Received) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	failpoint.Hit("shim.upgrade.executed")
	if s.reaper, err = reaper.NewHeld(); err != nil {
		return err
	}
	s.forward = newForwarder(r.Forwarded)
	cfg := s.config()
	cfg.Parking, cfg.Incarnation, cfg.Started = r.Parking, r.Incarnation, time.Unix(0, r.StartedUnixNano)
	cfg.Timings, cfg.Upgrades = r.Timings, r.Upgrades
	if r.Failed != "" {
		cfg.Outcome.Err = fmt.Errorf("the new program could not take over, the old one goes on: %s: %w", r.Failed, errdefs.ErrFailedPrecondition)
	} else {
		cfg.Upgrades++
		cfg.Outcome.Upgraded = &shim.UpgradeResponse{
			Version: version.Version, Revision: version.Revision, FromVersion: r.Version, FromRevision: r.Revision,
		}
	}
	if err := s.make(cfg); err != nil {
		return err
	}
	held := service.Held{}
	for _, d := range r.Held {
		f, err := r.File(d.Fd, d.Kind)
		if err != nil {
			held.Close()
			return err
		}
		if held[d.ExecId] == nil {
			held[d.ExecId] = map[string]*os.File{}
		}
		held[d.ExecId][d.Kind] = f
	}
	if s.sandbox != nil {
		held.Close()
		err = s.sandbox.SucceedSandbox(r.Handover)
	} else {
		err = s.svc.Succeed(r.Handover, held)
	}
	if err != nil {
		return err
	}
	failpoint.Hit("shim.upgrade.restored")
	if broken != "" && r.Failed == "" {
		return errors.New(broken)
	}
	socket, err := r.File(r.Socket, "socket")
	if err != nil {
		return err
	}
	var conns []wire.Conn
	for _, c := range r.Connections {
		f, err := r.File(c.Fd, "connection")
		if err != nil {
			return err
		}
		conns = append(conns, wire.Conn{File: f, Unread: c.Unread})
	}
	if s.listener, err = wire.Listen(socket, wireOptions, conns); err != nil {
		return err
	}
	// From here on there is no way back.
	failpoint.Hit("shim.upgrade.listening")
	r.Done()
	s.reaper.Begin()
	failpoint.Hit("shim.upgrade.begun")
	pause := monotonic() - r.FrozenNano
	if u := cfg.Outcome.Upgraded; u != nil {
		u.PauseNano = pause
		s.log.Info("upgraded in place", "from", r.Version, "to", version.Version, "pause", time.Duration(pause))
	} else {
		s.log.Error("an upgrade was taken back", "reason", r.Failed, "pause", time.Duration(pause))
	}
	return nil
}
