package service

import (
	"context"
	"os"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/stdio"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/version"
)

var _ shim.ShimService = (*Service)(nil)

// batch is how many ledger records are read at a time.
const batch = 128

// Describe says what this shim is.
func (s *Service) Describe(context.Context, *shim.DescribeRequest) (*shim.DescribeResponse, error) {
	fds, _ := os.ReadDir("/proc/self/fd")
	resp := &shim.DescribeResponse{
		Version: version.Version, Revision: version.Revision, Pid: uint32(os.Getpid()),
		Namespace: s.cfg.Namespace, Id: s.cfg.ID, Bundle: s.cfg.Bundle, Incarnation: s.incarnation,
		LastSeq: s.ledger.Last(), StartedAt: timestamppb.New(s.started),
		Goroutines: uint32(runtime.NumGoroutine()), Fds: uint32(len(fds)), Timings: s.phases.copy(), TrimmedSeq: s.ledger.Trimmed(),
		Upgrades: s.cfg.Upgrades,
	}
	s.oomMu.Lock()
	resp.OomKills, resp.OomLevel, resp.OomCgroup = s.oomTold, s.oomLast.level, s.oomLast.cgroup
	s.oomMu.Unlock()
	var open []*stdio.Streams
	describe := func(p *process) {
		resp.Processes, open = append(resp.Processes, s.describeLocked(p)), append(open, p.io.open)
	}
	s.mu.Lock()
	if s.init != nil {
		describe(s.init)
	}
	for _, e := range s.execs {
		describe(e)
	}
	s.mu.Unlock()
	for i, o := range open {
		if o != nil {
			resp.Processes[i].Outputs = outputs(o)
		}
	}
	return resp, nil
}

func (s *Service) describeLocked(p *process) *shim.Process {
	d := &shim.Process{
		ContainerId: s.cfg.ID, ExecId: p.execID, Pid: uint32(p.pid), State: string(p.state), ExitStatus: uint32(p.status), ExitUnknown: p.unknown,
		Terminal: p.io.terminal, Stdin: p.io.stdin, Stdout: p.io.stdout, Stderr: p.io.stderr, OomKilled: p.oomKilled,
		TimeoutNano: int64(p.timeout), TimedOut: p.timedOut,
	}
	if !p.exitedAt.IsZero() {
		d.ExitedAt = timestamppb.New(p.exitedAt)
	}
	return d
}

// Events streams the ledger's events, those to come too, until the client goes or the shim ends.
func (s *Service) Events(ctx context.Context, r *shim.EventsRequest, stream shim.Shim_EventsServer) error {
	done, err := s.stream()
	if err != nil {
		return shimapi.ToWire(err)
	}
	defer done()
	if err := s.checkSince(r.Since); err != nil {
		return shimapi.ToWire(err)
	}
	err = s.Follow(ctx, r.Since, func(rec *ledgerpb.Record) error {
		return stream.Send(&shim.EventRecord{
			Seq: rec.Seq, Timestamp: timestamppb.New(time.Unix(0, rec.UnixNano)), Topic: rec.Event.Topic,
			Event:    &anypb.Any{TypeUrl: rec.Event.TypeUrl, Value: rec.Event.Value},
			OomKills: rec.Event.OomKills, OomLevel: rec.Event.OomLevel, OomCgroup: rec.Event.OomCgroup,
		})
	})
	if errdefs.IsOutOfRange(err) {
		return shimapi.ToWire(err)
	}
	return err
}

// Follow calls fn with every event above since, oldest first, until ctx ends, fn fails, or the shim ends: then, after
// the last one, it returns nil. OutOfRange when fn is so slow that the daemon has taken events before it has, and they have
// been dropped.
func (s *Service) Follow(ctx context.Context, since uint64, fn func(*ledgerpb.Record) error) error {
	trimmed := s.ledger.Trimmed()
	for {
		ended := false
		select {
		case <-s.ending:
			ended = true // what was written before is read below
		default:
		}
		records, more, err := s.ledger.Since(since, batch)
		if err != nil {
			return err
		}
		if now := s.ledger.Trimmed(); now != trimmed {
			if err := s.checkSince(since); err != nil {
				return err
			}
			trimmed = now
		}
		for _, rec := range records {
			if rec.Event != nil {
				if err := fn(rec); err != nil {
					return err
				}
			}
			since = rec.Seq
		}
		if len(records) > 0 {
			continue
		}
		if ended {
			return nil
		}
		select {
		case <-more:
		case <-s.ending:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Exits lists the recorded exits.
func (s *Service) Exits(_ context.Context, r *shim.ExitsRequest) (*shim.ExitsResponse, error) {
	if err := s.checkSince(r.Since); err != nil {
		return nil, shimapi.ToWire(err)
	}
	resp := &shim.ExitsResponse{}
	for since := r.Since; ; {
		records, _, err := s.ledger.Since(since, batch)
		if err != nil {
			return nil, shimapi.ToWire(err)
		}
		if len(records) == 0 {
			return resp, nil
		}
		for _, rec := range records {
			since = rec.Seq
			if e := rec.Exit; e != nil {
				resp.Exits = append(resp.Exits, &shim.Exit{
					Seq: rec.Seq, ContainerId: e.ContainerId, ExecId: e.ExecId, Pid: e.Pid, ExitStatus: e.Status,
					ExitedAt: timestamppb.New(time.Unix(0, e.ExitedUnixNano)), ExitUnknown: e.Unknown,
					OomKilled: e.OomKilled, TimedOut: e.TimedOut,
				})
			}
		}
	}
}
