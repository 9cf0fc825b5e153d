// Package shimfake is a shim without a container: it serves the task API and managerd.shim.v1 on a socket, keeps a ledger
// and obeys the lifecycle table as a real one does, but its processes exist in its memory only, and every method can be
// made to fail, hang, answer late or crash. It runs inside a test, or as a program of its own (Main).
//
// What a process does is said by its args: "exit N" ends it as soon as it is started, anything else runs until a signal.
package shimfake

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	ledgerpb "github.com/managerd/managerd/protos/ledger"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/ledger"
)

// Config says whose shim this is.
type Config struct {
	Namespace, ID string
	Bundle        string // an existing directory: config.json is read from it, the ledger written to it
	FaultDir      string // where WriteFaults writes; empty: SetFaults is used
}

// Shim is one fake.
type Shim struct {
	cfg     Config
	ledger  *ledger.Ledger
	server  *ttrpc.Server
	stopped chan struct{} // closed by Stop and Crash
	ended   chan struct{} // closed by Shutdown

	making sync.Mutex // held through a Create with its fault, as a real one does: a Shutdown waits for it

	mu     sync.Mutex
	crash  func() // what Crash does besides
	once   sync.Once
	faults Faults
	used   map[string]int
	calls  map[string]int
	conns  map[net.Conn]struct{}
	init   *process
	execs  map[string]*process
	down   bool // ended is closed
}

type process struct {
	kind   shimapi.Kind
	execID string
	args   []string
	state  shimapi.State
	status uint32
	at     time.Time
	exited chan struct{}

	stdin, stdout, stderr string
	terminal              bool
	images                string // of the checkpoint that it is to be restored from; there is no process then
}

// New makes a fake that serves l until Stop, Crash or a Shutdown. The listener becomes its own.
func New(cfg Config, l net.Listener) (*Shim, error) { return newShim(cfg, l, nil, func() {}) }

func newShim(cfg Config, l net.Listener, init *process, crash func()) (*Shim, error) {
	s := &Shim{
		cfg: cfg, init: init, stopped: make(chan struct{}), ended: make(chan struct{}), crash: crash, used: map[string]int{}, calls: map[string]int{},
		conns: map[net.Conn]struct{}{}, execs: map[string]*process{},
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	s.ledger, err = ledger.Open(filepath.Join(cfg.Bundle, shimapi.LedgerFile), ledgerpb.Header{
		Namespace: cfg.Namespace, ContainerId: cfg.ID, Incarnation: strconv.FormatInt(time.Now().UnixNano(), 16),
		BootId: strings.TrimSpace(string(boot)), ShimPid: uint32(os.Getpid()),
	})
	if err != nil {
		return nil, err
	}
	if s.server, err = ttrpc.NewServer(); err != nil {
		return nil, errors.Join(err, s.ledger.Close())
	}
	shimapi.RegisterTask(s.server, service{s})
	shim.RegisterShimService(s.server, own{s})
	go func() { _ = s.server.Serve(context.Background(), &listener{l, s}) }() // ends with Stop or Crash
	return s, nil
}

// Stop ends the shim in order, and closes its ledger.
func (s *Shim) Stop() {
	s.end()
	_ = s.ledger.Close()
}

// Crash ends the shim as a SIGKILL does: the ledger is what was written, the connections break.
func (s *Shim) Crash() {
	s.mu.Lock()
	crash := s.crash
	s.mu.Unlock()
	crash()
	s.end()
}

func (s *Shim) end() {
	s.once.Do(func() {
		close(s.stopped)
		_ = s.server.Close()
		s.Drop()
	})
}

// Drop breaks every connection, and goes on serving.
func (s *Shim) Drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = c.Close()
	}
	s.conns = map[net.Conn]struct{}{}
}

// Ended is closed when a Shutdown has been accepted.
func (s *Shim) Ended() <-chan struct{} { return s.ended }

// Calls is how often a method was called.
func (s *Shim) Calls(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[method]
}

// Exit ends a process; execID is empty for the init.
func (s *Shim) Exit(execID string, status uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.findLocked(s.cfg.ID, execID, shimapi.ReqKill)
	if err != nil {
		return err
	}
	return s.exitLocked(p, status)
}

func (s *Shim) exitLocked(p *process, status uint32) error {
	p.status, p.at = status, time.Now()
	_, err := s.ledger.Append(&ledgerpb.Record{Exit: &ledgerpb.Exit{
		ContainerId: s.cfg.ID, ExecId: p.execID, Pid: pid(), Status: status, ExitedUnixNano: p.at.UnixNano(),
	}})
	if err != nil {
		return err
	}
	id := p.execID
	if id == "" {
		id = s.cfg.ID
	}
	err = s.emit("/tasks/exit", &events.TaskExit{ContainerID: s.cfg.ID, ID: id, Pid: pid(), ExitStatus: status, ExitedAt: timestamppb.New(p.at)})
	p.state = shimapi.MustNext(p.kind, p.state, shimapi.Exited)
	close(p.exited)
	return err
}

// pid stands for every process: the fake's own, which lives as long as the fake runs as a program.
func pid() uint32 { return uint32(os.Getpid()) }

func (s *Shim) emit(topic string, event proto.Message) error {
	body, err := typeurl.MarshalAnyToProto(event)
	if err != nil {
		return err
	}
	_, err = s.ledger.Append(&ledgerpb.Record{Event: &ledgerpb.Event{Topic: topic, TypeUrl: body.TypeUrl, Value: body.Value}})
	return err
}

func (s *Shim) findLocked(id, execID string, req shimapi.Request) (*process, error) {
	if id != s.cfg.ID {
		return nil, fmt.Errorf("container %s is not kept by this shim, which keeps %s: %w", id, s.cfg.ID, errdefs.ErrNotFound)
	}
	kind, p, name := shimapi.Init, s.init, id
	if execID != "" && p != nil && p.state != shimapi.Deleted {
		kind, p, name = shimapi.Exec, s.execs[execID], execID+" of container "+id
	}
	if p == nil {
		return nil, shimapi.Check(kind, name, shimapi.Absent, req)
	}
	return p, shimapi.Check(p.kind, name, p.state, req)
}

// listener remembers its connections, so that they can be broken.
type listener struct {
	net.Listener
	s *Shim
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.s.mu.Lock()
		l.s.conns[c] = struct{}{}
		l.s.mu.Unlock()
	}
	return c, err
}
