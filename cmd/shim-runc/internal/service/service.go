// Package service is the task API of one container: containerd.task.v3.Task (and v2), and managerd.shim.v1.Shim beside it.
// Whether a request is legal is judged by shimapi's lifecycle table and nowhere else; what it does is the engine's, and
// where output goes is stdio's. Every exit and event is in the ledger before anyone is told.
package service

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/cgroups"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/blackbox"
	"github.com/managerd/managerd/shimapi/ledger"
	"github.com/managerd/managerd/shimapi/version"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
)

// Config says whose shim this is.
type Config struct {
	Namespace string
	ID        string // of the container
	Bundle    string // absolute path
	Log       *slog.Logger
	Reaper    *reaper.Reaper
	Parking   string // path of the daemon's parking socket; empty for none
	Forwards  bool   // events go to a foreign daemon's socket: those of a sandbox's members are to, too
	// Incarnation and Started are set when this program goes on in the place of another, in the same process.
	Incarnation string
	Started     time.Time
	Outcome     Outcome          // of that replacement
	Timings     map[string]int64 // of phases, in nanoseconds, as the program before has them
	Upgrades    uint64           // how often a program took the place of another in this process
	// Replace replaces this program by another, and returns only when that has failed; nil where it cannot be.
	Replace func(ctx context.Context, binary string) error
	// NewEngine makes what runs the container, given the runtime option BinaryName; nil is the function of that name.
	NewEngine func(cfg engine.Config, binary string) (Engine, error)
}

// Service keeps one container.
type Service struct {
	cfg         Config
	ledger      *ledger.Ledger
	incarnation string
	started     time.Time
	boot        string // boot id

	phases  phases
	box     *blackbox.Ring // nil: there was no room for one
	parker  parker
	trimmer trimmer

	taken      atomic.Uint64 // see Taken
	compacting sync.Mutex
	compactAt  int64 // the size at which the ledger is looked at again; guarded by compacting

	unparking sync.WaitGroup
	handlers  gate // of requests that change something, or are short
	exits     gate // those who tell of an exit that was taken from the kernel

	// transition is held through every request that changes the container's own state, so that two never overlap.
	transition sync.Mutex

	mu        sync.Mutex // guards all below; never held while waiting for anything
	init      *process   // nil: nothing was created
	execs     map[string]*process
	container Container
	cgroup    *cgroups.Cgroup
	stopOOM   context.CancelFunc
	dying     bool          // init has ended: no exec starts any more
	deleted   bool          // the container is gone: Shutdown may end the process
	streams   int           // event streams being served
	closed    bool          // no more of them
	quiet     chan struct{} // closed when there is no stream and there will be none
	ended     bool          // ending is closed
	ending    chan struct{} // closed by Shutdown

	oomMu   sync.Mutex
	oomTold uint64 // OOM kills that were told of
	oomAt   time.Time
	limits  *cgroups.Limits
	oomLast struct{ level, cgroup string } // which limit was hit last

	keepsSandbox  bool        // instead of a container: see Sandbox
	sandboxUntold func() bool // the sandbox's own init has ended, and that is not in the ledger yet
}

// New opens the bundle's ledger. Close releases it.
func New(cfg Config) (*Service, error) {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	s := &Service{
		cfg: cfg, incarnation: hex.EncodeToString(b[:]), started: time.Now(),
		compactAt: compactStep, execs: map[string]*process{}, stopOOM: func() {}, ending: make(chan struct{}), quiet: make(chan struct{}),
	}
	s.trimmer.compact = s.compactQuiet
	if cfg.Incarnation != "" {
		s.incarnation, s.started = cfg.Incarnation, cfg.Started
		s.phases.last = cfg.Timings
	}
	if s.cfg.NewEngine == nil {
		s.cfg.NewEngine = NewEngine
	}
	s.parker.socket = cfg.Parking
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	s.boot = strings.TrimSpace(string(boot))
	var err error
	s.ledger, err = ledger.Open(filepath.Join(cfg.Bundle, shimapi.LedgerFile), ledgerpb.Header{
		Namespace: cfg.Namespace, ContainerId: cfg.ID, Incarnation: s.incarnation,
		BootId: s.boot, ShimPid: uint32(os.Getpid()),
	})
	if err != nil {
		return nil, err
	}
	// Behind the ledger, whose lock keeps the bundle ours.
	if s.box, err = blackbox.Open(filepath.Join(cfg.Bundle, shimapi.BlackBoxFile)); err != nil {
		s.cfg.Log.Warn("there is no record of what this shim does", "error", err)
	}
	s.box.Add(blackbox.Note, 0, "shim begins, version "+version.Version)
	s.phases.box, s.cfg.Log = s.box, slog.New(boxed{s.cfg.Log.Handler(), s.box})
	return s, nil
}

// Ending is closed when a Shutdown has been accepted.
func (s *Service) Ending() <-chan struct{} { return s.ending }

// Finish waits, after Ending, until every event stream has sent its last event, or ctx has ended; from then on new ones
// are refused.
func (s *Service) Finish(ctx context.Context) {
	s.mu.Lock()
	s.closed = true
	if s.streams == 0 {
		close(s.quiet)
	}
	s.mu.Unlock()
	select {
	case <-s.quiet:
	case <-ctx.Done():
		s.cfg.Log.Warn("an event stream is not read to its end")
	}
}

// stream counts an event stream in; done counts it out.
func (s *Service) stream() (done func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fmt.Errorf("shim of container %s has ended: %w", s.cfg.ID, errdefs.ErrUnavailable)
	}
	s.streams++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.streams--; s.closed && s.streams == 0 {
			close(s.quiet)
		}
	}, nil
}

// Close closes the ledger, when nothing is served any more.
func (s *Service) Close() error {
	s.stopParking()
	s.box.Add(blackbox.Note, 0, "shim ends")
	return errors.Join(s.box.Close(), s.ledger.Close())
}

// process is the init or an exec, as the API sees it.
type process struct {
	kind   shimapi.Kind
	execID string // empty for the init
	spec   *specs.Process
	io     streams

	// starting is held by Start, by Delete of an exec, and by the one who records the exit: a start is always told before
	// the exit, and nothing is deleted while it starts. It is taken before Service.mu.
	starting sync.Mutex
	keeping  sync.Mutex // held while the record is written; taken before Service.mu

	state     shimapi.State // guarded by Service.mu, like all below
	pid       int
	ticks     uint64 // when pid began
	launcher  string // argv[0] of the shim that forked it
	launching bool   // a Start is about to fork it
	proc      *reaper.Process
	status    int
	unknown   string        // why status is not known
	oomBefore uint64        // OOM kills that were told of before it began; set before anybody waits for it
	oomKilled bool          // SIGKILL ended it, and there were more of them by then
	timeout   time.Duration // of an exec: how long it may run; 0: for ever
	deadline  time.Time     // and until when, once it runs
	timer     *time.Timer   // not nil: ends it then
	timedOut  bool          // it was killed for that
	exitedAt  time.Time
	inputEnd  bool          // CloseIO was accepted
	exited    chan struct{} // closed once the exit is in the ledger and above
}

// label names a process in errors.
func (p *process) label(id string) string {
	if p.kind == shimapi.Init {
		return id
	}
	return p.execID + " of container " + id
}

// find looks a process up and asks the lifecycle table whether req is legal.
func (s *Service) find(id, execID string, req shimapi.Request) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.findLocked(id, execID, req)
}

func (s *Service) findLocked(id, execID string, req shimapi.Request) (*process, error) {
	if id != s.cfg.ID {
		return nil, fmt.Errorf("container %s is not kept by this shim, which keeps %s: %w", id, s.cfg.ID, errdefs.ErrNotFound)
	}
	if s.init == nil {
		return nil, shimapi.Check(shimapi.Init, id, shimapi.Absent, req)
	}
	if s.init.state == shimapi.Deleted { // its execs went with it
		return nil, shimapi.Check(shimapi.Init, id, shimapi.Deleted, req)
	}
	p := s.init
	if execID != "" {
		if p = s.execs[execID]; p == nil {
			return nil, shimapi.Check(shimapi.Exec, execID+" of container "+id, shimapi.Absent, req)
		}
	}
	if err := shimapi.Check(p.kind, p.label(id), p.state, req); err != nil {
		return nil, err
	}
	return p, nil
}

// through runs fn with p in the state that req passes through, and leaves it in the one that follows, or, when fn
// fails, where it was. An exit meanwhile wins.
func (s *Service) through(p *process, req shimapi.Request, fn func() error) error {
	s.mu.Lock()
	t, ok := shimapi.Next(p.kind, p.state, req)
	if !ok {
		err := shimapi.Check(p.kind, p.label(s.cfg.ID), p.state, req)
		s.mu.Unlock()
		return err
	}
	held := t.From
	if t.Via != "" {
		held = t.Via
		p.state = held
	}
	s.mu.Unlock()
	err := fn()
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.state != held {
		return err // it has ended
	}
	if p.state = t.To; err != nil {
		p.state = t.From
	}
	return err
}

// emit writes an event to the ledger: from there it is streamed or forwarded.
func (s *Service) emit(topic string, event proto.Message) error {
	return s.record(&ledgerpb.Record{}, topic, event)
}

// record writes a record with an event, both or neither.
func (s *Service) record(r *ledgerpb.Record, topic string, event proto.Message) error {
	body, err := typeurl.MarshalAnyToProto(event)
	if err != nil {
		return fmt.Errorf("cannot encode event %s: %w", topic, err)
	}
	if r.Event == nil {
		r.Event = &ledgerpb.Event{}
	}
	r.Event.Topic, r.Event.TypeUrl, r.Event.Value = topic, body.TypeUrl, body.Value
	if _, err = s.ledger.Append(r); err != nil {
		s.cfg.Log.Error("cannot record event", "topic", topic, "error", err)
		return err
	}
	s.box.Add(blackbox.Event, 0, summary(r))
	return nil
}

// phases keeps how long the parts of the last create, start and exec took.
type phases struct {
	box *blackbox.Ring

	mu   sync.Mutex
	last map[string]int64
}

func (p *phases) note(name string, took time.Duration) {
	p.box.Add(blackbox.Phase, took, name)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last == nil {
		p.last = map[string]int64{}
	}
	p.last[name] = int64(took)
}

func (p *phases) copy() map[string]int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make(map[string]int64, len(p.last))
	for k, v := range p.last {
		out[k] = v
	}
	return out
}

// signal is the number that a client sent, if there is such a signal.
func signal(n uint32) (unix.Signal, error) {
	if n == 0 || n > 64 {
		return 0, fmt.Errorf("signal %d does not exist: %w", n, errdefs.ErrInvalidArgument)
	}
	return unix.Signal(n), nil
}
