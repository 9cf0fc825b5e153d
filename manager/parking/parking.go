// Package parking keeps, for the shims that run, copies of the descriptors that must outlive them (see package
// shimapi/parking), and hands them to the successor of one that died. It knows nothing of what they are.
package parking

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/parking"
)

// Lot is where descriptors are parked. Close gives it up.
type Lot struct {
	path     string
	listener *net.UnixListener
	log      *slog.Logger
	serving  sync.WaitGroup
	keeping  *keeping // nil: nothing outlives this process

	mu     sync.Mutex // guards all below
	closed bool
	conns  map[*net.UnixConn]chan struct{} // closed when everything was received of it
	held   map[task]map[name]*os.File
}

type task struct{ ns, id string }

type name struct{ exec, kind string }

// Open listens at path, a socket that it makes. What is parked is kept in v too, if there is one, and what an earlier daemon
// had kept there is parked again.
func Open(path string, v Vault, log *slog.Logger) (*Lot, error) {
	l, err := parking.Listen(path)
	if err != nil {
		return nil, err
	}
	lot := &Lot{path: path, listener: l, log: log, conns: map[*net.UnixConn]chan struct{}{}, held: map[task]map[name]*os.File{}}
	if v != nil {
		lot.restore(v)
	}
	lot.serving.Add(1)
	go func() {
		defer lot.serving.Done()
		lot.accept()
	}()
	return lot, nil
}

func (l *Lot) accept() {
	for {
		c, err := l.listener.AcceptUnix()
		if err != nil {
			return // closed
		}
		l.mu.Lock()
		if l.closed {
			l.mu.Unlock()
			_ = c.Close()
			return
		}
		l.conns[c] = make(chan struct{})
		l.serving.Add(1)
		l.mu.Unlock()
		go func() {
			defer l.serving.Done()
			l.serve(c)
		}()
	}
}

// serve receives what one shim parks, until it has ended. What it parked stays.
func (l *Lot) serve(c *net.UnixConn) {
	defer func() {
		_ = c.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		close(l.conns[c])
		delete(l.conns, c)
	}()
	seen := map[name]bool{}
	for {
		p, files, err := parking.Receive(c)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				l.log.Warn("a shim cannot park what must outlive it", "error", err)
			}
			return
		}
		failpoint.Hit("parking.received")
		l.take(p, files, seen)
		failpoint.Hit("parking.taken")
	}
}

func (l *Lot) take(p *shimstate.Parcel, files []*os.File, seen map[name]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := task{p.Namespace, p.ContainerId}
	of := l.held[k]
	if of == nil {
		of = map[name]*os.File{}
		l.held[k] = of
	}
	drop := func(n name) {
		if f := of[n]; f != nil {
			_ = f.Close()
			delete(of, n)
			l.changedLocked(process{k, n.exec})
		}
	}
	for _, kind := range p.Drop {
		drop(name{p.ExecId, kind})
	}
	for i, kind := range p.Kinds {
		n := name{p.ExecId, kind}
		seen[n] = true
		if of[n] != nil && same(of[n], files[i]) {
			_ = files[i].Close()
			continue
		}
		drop(n)
		of[n] = files[i]
		l.changedLocked(process{k, n.exec})
	}
	if p.Whole {
		for n := range of {
			if !seen[n] {
				drop(n)
			}
		}
	}
	if len(of) == 0 {
		delete(l.held, k)
	}
}

// settling is how long HandOver waits for what a dead shim has sent last.
const settling = 2 * time.Second

// HandOver sends everything that is parked of a task, whose shim is dead, through c, and keeps it: it is the successor's to
// say what is not needed any more.
func (l *Lot) HandOver(c *net.UnixConn, ns, id string) error {
	if err := l.settle(); err != nil {
		l.log.Warn("what a dead shim parked last may be missing", "namespace", ns, "id", id, "error", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for n, f := range l.held[task{ns, id}] {
		p := &shimstate.Parcel{Namespace: ns, ContainerId: id, ExecId: n.exec, Kinds: []string{n.kind}}
		if err := parking.Send(c, p, []*os.File{f}); err != nil {
			return fmt.Errorf("cannot hand over what was parked of task %s: %w", id, err)
		}
		failpoint.Hit("parking.handed")
	}
	return nil
}

// settle waits until everything is received that shims had sent which are dead now: it may still lie in their sockets, and
// even those may not have been accepted yet.
func (l *Lot) settle() error {
	ctx, cancel := context.WithTimeout(context.Background(), settling)
	defer cancel()
	// One more connection is accepted after those that were made before it; that it was, its end tells.
	last, err := parking.Dial(ctx, l.path)
	if err != nil {
		return err
	}
	defer func() { _ = last.Close() }()
	deadline, _ := ctx.Deadline()
	if err := errors.Join(last.CloseWrite(), last.SetReadDeadline(deadline)); err != nil {
		return err
	}
	if _, err := last.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the parking socket is not served: %w", err)
	}
	var ending []chan struct{}
	l.mu.Lock()
	for c, done := range l.conns {
		if hungUp(c) {
			ending = append(ending, done)
		}
	}
	l.mu.Unlock()
	for _, done := range ending {
		select {
		case <-done:
		case <-ctx.Done():
			return fmt.Errorf("a dead shim's parcels: %w", ctx.Err())
		}
	}
	return nil
}

// hungUp says whether the other side of a connection is closed; what it sent before may be unread.
func hungUp(c *net.UnixConn) (closed bool) {
	if rc, err := c.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
			n, err := unix.Poll(fds, 0)
			closed = err == nil && n > 0 && fds[0].Revents&(unix.POLLHUP|unix.POLLRDHUP) != 0
		})
	}
	return closed
}

// Drop closes everything that is parked of a task: it is gone.
func (l *Lot) Drop(ns, id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := task{ns, id}
	for n, f := range l.held[k] {
		_ = f.Close()
		l.changedLocked(process{k, n.exec})
	}
	delete(l.held, k)
}

// Close closes the socket and everything that is parked; the shims have theirs, and the vault has.
func (l *Lot) Close() {
	_ = l.listener.Close()
	l.mu.Lock()
	l.closed = true
	for c := range l.conns {
		_ = c.Close()
	}
	l.mu.Unlock()
	l.serving.Wait()
	if l.keeping != nil {
		l.keeping.once.Do(func() { close(l.keeping.end) })
		l.keeping.work.Wait()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, of := range l.held {
		for _, f := range of {
			_ = f.Close()
		}
	}
	l.held = map[task]map[name]*os.File{}
}
