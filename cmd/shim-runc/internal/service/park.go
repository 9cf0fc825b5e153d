package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sort"
	"sync"
	"time"

	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/parking"
)

// parkRetry is how long to wait before a daemon that is away, or stopped, is tried again.
const parkRetry = time.Second

// parker keeps the daemon's copies of our descriptors up to date. A daemon that is away misses nothing: it asks for all
// of them when it is back.
type parker struct {
	mu      sync.Mutex // held while something is sent: the order of parcels is that of what they tell of
	socket  string     // empty: nobody wants them
	conn    *net.UnixConn
	retries *time.Timer // one is under way
	closed  bool
}

// Park begins to park with the daemon that listens at r.Socket.
func (s *Service) Park(_ context.Context, r *shim.ParkRequest) (*shim.ParkResponse, error) {
	s.parker.mu.Lock()
	defer s.parker.mu.Unlock()
	s.parker.socket = r.Socket
	if err := s.parkAllLocked(); err != nil {
		return nil, shimapi.ToWire(fmt.Errorf("cannot park what must outlive the shim of container %s: %w", s.cfg.ID, err))
	}
	return &shim.ParkResponse{}, nil
}

// park parks everything of one process.
func (s *Service) park(p *process) {
	s.parker.mu.Lock()
	defer s.parker.mu.Unlock()
	if s.parker.socket == "" || s.parker.closed {
		return
	}
	if s.parker.conn == nil {
		s.parkAgainLocked(s.parkAllLocked())
		return
	}
	s.parkAgainLocked(s.parkOneLocked(p))
}

// unpark has copies closed that the daemon has of a process: none may keep a client from seeing the end of its output. It
// does not wait, and may be called with any lock held.
func (s *Service) unpark(p *process, kinds ...string) {
	s.unparking.Add(1)
	go func() {
		defer s.unparking.Done()
		s.parker.mu.Lock()
		defer s.parker.mu.Unlock()
		if s.parker.conn != nil {
			s.parkAgainLocked(s.sendLocked(&shimstate.Parcel{ExecId: p.execID, Drop: kinds}, nil))
		}
	}()
}

// parkAgainLocked tries all of it once more, some time after err, if that says that the daemon is there but does not read.
// One that is not there asks when it is back.
func (s *Service) parkAgainLocked(err error) {
	if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) || s.parker.closed || s.parker.retries != nil {
		return
	}
	s.cfg.Log.Debug("what must outlive this shim is not parked, trying again", "error", err)
	s.parker.retries = time.AfterFunc(parkRetry, func() {
		s.parker.mu.Lock()
		defer s.parker.mu.Unlock()
		s.parker.retries = nil
		if !s.parker.closed {
			s.parkAgainLocked(s.parkAllLocked())
		}
	})
}

// parkAllLocked connects anew and parks everything that there is.
func (s *Service) parkAllLocked() error {
	if s.parker.conn != nil {
		_ = s.parker.conn.Close()
		s.parker.conn = nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), parkRetry)
	defer cancel()
	conn, err := parking.Dial(ctx, s.parker.socket)
	if err != nil {
		return err
	}
	s.parker.conn = conn
	s.mu.Lock()
	var all []*process
	if s.init != nil && !s.deleted {
		all = append(s.execsLocked(), s.init)
	}
	s.mu.Unlock()
	for _, p := range all {
		if err := s.parkOneLocked(p); err != nil {
			return err
		}
	}
	return s.sendLocked(&shimstate.Parcel{Whole: true}, nil)
}

func (s *Service) parkOneLocked(p *process) error {
	s.mu.Lock()
	open, proc := p.io.open, p.proc
	s.mu.Unlock()
	files := map[string]*os.File{}
	if open != nil {
		files = open.Handles()
	}
	if proc != nil {
		if f, err := proc.Pidfd(); err == nil { // else it has ended, and somebody sees to that
			files[parking.Pidfd] = f
		}
	}
	parcel := &shimstate.Parcel{ExecId: p.execID}
	for kind := range files {
		parcel.Kinds = append(parcel.Kinds, kind)
	}
	sort.Strings(parcel.Kinds)
	list := make([]*os.File, 0, len(files))
	for _, kind := range parcel.Kinds {
		list = append(list, files[kind])
	}
	defer func() {
		for _, f := range list {
			_ = f.Close()
		}
	}()
	if len(list) == 0 {
		return nil
	}
	return s.sendLocked(parcel, list)
}

func (s *Service) sendLocked(p *shimstate.Parcel, files []*os.File) error {
	p.Namespace, p.ContainerId = s.cfg.Namespace, s.cfg.ID
	err := parking.Send(s.parker.conn, p, files)
	failpoint.Hit("shim.park.sent")
	if err != nil {
		_ = s.parker.conn.Close()
		s.parker.conn = nil
	}
	return err
}

// stopParking ends it; the daemon keeps what it has until it is told that the task is gone.
func (s *Service) stopParking() {
	s.unparking.Wait()
	s.parker.mu.Lock()
	defer s.parker.mu.Unlock()
	s.parker.closed = true
	if s.parker.retries != nil {
		s.parker.retries.Stop()
	}
	if s.parker.conn != nil {
		_ = s.parker.conn.Close()
		s.parker.conn = nil
	}
}
