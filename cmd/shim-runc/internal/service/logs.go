package service

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logsink"
	"github.com/managerd/managerd/cmd/shim-runc/internal/stdio"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// reopening is how long ReopenLogs waits for sinks that do not answer.
const reopening = 5 * time.Second

// Logs streams what a process has written, as far as it is kept here.
func (s *Service) Logs(ctx context.Context, r *shim.LogsRequest, stream shim.Shim_LogsServer) error {
	done, err := s.stream()
	if err != nil {
		return shimapi.ToWire(err)
	}
	defer done()
	return shimapi.ToWire(s.logs(ctx, r, stream.Send))
}

func (s *Service) logs(ctx context.Context, r *shim.LogsRequest, send func(*shim.LogsResponse) error) error {
	p, err := s.find(r.Id, r.ExecId, shimapi.ReqState)
	if err != nil {
		return err
	}
	open := s.streamsOf(p)
	if open == nil {
		return fmt.Errorf("cannot read the output of exec %s: it has not been started: %w", p.label(r.Id), errdefs.ErrFailedPrecondition)
	}
	o := stdio.ReadOptions{Follow: r.Follow, Tail: -1, After: stdio.Positions{}}
	if r.Tail != nil {
		o.Tail = int(min(*r.Tail, 1<<31-1))
	}
	if r.Since != nil {
		o.Since = r.Since.AsTime()
	}
	for _, at := range r.After {
		o.After[at.Sink] = logsink.Position{Dev: at.Dev, Ino: at.Ino, Offset: int64(at.Offset)}
	}
	err = open.ReadLogs(ctx, o, func(entries []logsink.Entry, at stdio.Positions) error {
		resp := &shim.LogsResponse{}
		for _, e := range entries {
			entry := &shim.LogEntry{Stream: e.Stream, Line: e.Line, Partial: e.Partial}
			if !e.Time.IsZero() {
				entry.Time = timestamppb.New(e.Time)
			}
			resp.Entries = append(resp.Entries, entry)
		}
		for uri, p := range at {
			resp.Position = append(resp.Position, &shim.LogPosition{Sink: uri, Dev: p.Dev, Ino: p.Ino, Offset: uint64(p.Offset)})
		}
		return send(resp)
	})
	if err != nil {
		return fmt.Errorf("cannot read the output of %s: %w", p.label(r.Id), err)
	}
	return nil
}

// ReopenLogs begins new files for all logs that are written.
func (s *Service) ReopenLogs(ctx context.Context, _ *shim.ReopenLogsRequest) (*shim.ReopenLogsResponse, error) {
	s.mu.Lock()
	none := s.init == nil || s.deleted
	s.mu.Unlock()
	if none {
		return nil, shimapi.ToWire(fmt.Errorf("cannot reopen logs: this shim keeps no container: %w", errdefs.ErrFailedPrecondition))
	}
	ctx, cancel := context.WithTimeout(ctx, reopening)
	defer cancel()
	resp := &shim.ReopenLogsResponse{}
	var mu sync.Mutex
	var all []error
	var asking sync.WaitGroup
	for _, p := range s.all() {
		open := s.streamsOf(p)
		if open == nil {
			continue
		}
		asking.Go(func() {
			paths, err := open.ReopenLogs(ctx)
			mu.Lock()
			defer mu.Unlock()
			resp.Paths = append(resp.Paths, paths...)
			if err != nil {
				all = append(all, fmt.Errorf("process %s: %w", p.label(s.cfg.ID), err))
			}
		})
	}
	asking.Wait()
	slices.Sort(resp.Paths)
	if err := errors.Join(all...); err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("%v: %w", err, errdefs.ErrUnavailable) // not the deadline of the caller
		}
		return nil, shimapi.ToWire(err)
	}
	return resp, nil
}

// closeStreams ends the streams of processes, all at once: a sink that does not answer takes its time.
func (s *Service) closeStreams(of ...*process) {
	var closing sync.WaitGroup
	for _, p := range of {
		open := s.streamsOf(p)
		if open == nil {
			continue
		}
		closing.Go(func() {
			if err := open.Close(); err != nil {
				s.cfg.Log.Error("not all output was taken", "process", p.label(s.cfg.ID), "error", err)
			}
		})
	}
	closing.Wait()
}

// outputs says where output goes, and what is in its way.
func outputs(open *stdio.Streams) []*shim.Output {
	var all []*shim.Output
	for _, o := range open.Outputs() {
		out := &shim.Output{
			Stream: o.Stream, Sink: o.Sink, Bytes: uint64(o.Bytes), Waiting: o.Waiting,
			LostBytes: uint64(o.Lost.Bytes), LostEntries: uint64(o.Lost.Entries),
			LoggerPid: uint32(o.Logger.PID), LoggerRestarts: uint32(o.Logger.Restarts), LoggerError: o.Logger.LastEnd,
		}
		if o.Waiting != "" {
			out.WaitingSince = timestamppb.New(o.Since)
		}
		all = append(all, out)
	}
	return all
}
