// Package peer is a connection to another program on this machine that serves one of containerd's services (a proxy
// plugin). That program may be slow, hang, be killed and started again; who calls it has a deadline, and is told.
package peer

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

const (
	// maxMessage is what servers of containerd's services are built for, in bytes.
	maxMessage = 16 << 20
	// rest is how long a program that let a deadline pass is not asked again.
	rest = 3 * time.Second
	// settle is how long a call waits for a connection to a program that has just been started again.
	settle = time.Second
)

// SilentError is the error of a call to a program that is there and does not answer. To ask again at once is in vain.
type SilentError struct{ text string }

func (e *SilentError) Error() string { return e.text }

// Unwrap says that it is Unavailable, because a deadline passed.
func (e *SilentError) Unwrap() []error {
	return []error{errdefs.ErrUnavailable, context.DeadlineExceeded}
}

// Peer is the other program.
type Peer struct {
	name, address string
	conn          *grpc.ClientConn

	mu     sync.Mutex
	silent time.Time // since when it does not answer; zero: it does
	until  time.Time // when it is asked again
}

// New connects when something is asked for, not before: the program need not run yet. address is the path of its socket.
func New(name, address string) (*Peer, error) {
	address = strings.TrimPrefix(address, "unix://")
	conn, err := grpc.NewClient("unix://"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("cannot use %s at %s: %w", name, address, err)
	}
	return &Peer{name: name, address: address, conn: conn}, nil
}

// Conn is for clients whose calls are made in Call.
func (p *Peer) Conn() grpc.ClientConnInterface { return p.conn }

// Close disconnects; calls under way fail.
func (p *Peer) Close() error { return p.conn.Close() }

// Call runs fn, which makes one call with the context it is given: that has the deadline, and none of the headers that
// the call has that is being served. Errors are those of errdefs. Unavailable: nobody listens, or nothing was answered in
// time; for a while nothing is asked then.
func (p *Peer) Call(ctx context.Context, patience time.Duration, fn func(context.Context) error) error {
	if err := p.resting(); err != nil {
		return err
	}
	inner, cancel := context.WithTimeout(metadata.NewOutgoingContext(ctx, nil), patience)
	defer cancel()
	p.reconnect(inner)
	return p.outcome(ctx, fn(inner), inner.Err() != nil, patience)
}

// outcome is what the caller is told of the error of a call, and notes whether the program answers. late: patience was at
// its end.
func (p *Peer) outcome(ctx context.Context, err error, late bool, patience time.Duration) error {
	switch {
	case err == nil:
		p.answered()
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case late:
		return p.timedOut(patience)
	}
	if err = errgrpc.ToNative(err); !errdefs.IsUnavailable(err) {
		p.answered()
	}
	return fmt.Errorf("%s at %s: %w", p.name, p.address, err)
}

// Session is a call that is a stream: it lasts as long as it is used, and each step of it has a deadline of its own.
type Session struct {
	p      *Peer
	outer  context.Context
	ctx    context.Context
	cancel context.CancelFunc
}

// Session begins one, which ends with ctx at the latest. The caller closes it. Unavailable as from Call.
func (p *Peer) Session(ctx context.Context) (*Session, error) {
	if err := p.resting(); err != nil {
		return nil, err
	}
	s := &Session{p: p, outer: ctx}
	s.ctx, s.cancel = context.WithCancel(metadata.NewOutgoingContext(ctx, nil))
	p.reconnect(s.ctx)
	return s, nil
}

// Context is for the call.
func (s *Session) Context() context.Context { return s.ctx }

// Step runs fn, which waits for the program once. When it takes longer than patience, or ctx ends, the session is over.
// Errors are those of Call.
func (s *Session) Step(ctx context.Context, patience time.Duration, fn func() error) error {
	var late atomic.Bool
	stopLate := time.AfterFunc(patience, func() {
		late.Store(true)
		s.cancel()
	})
	stopGone := context.AfterFunc(ctx, s.cancel)
	err := fn()
	stopLate.Stop()
	stopGone()
	if ctx.Err() == nil {
		ctx = s.outer
	}
	return s.p.outcome(ctx, err, late.Load(), patience)
}

// Close ends the session.
func (s *Session) Close() { s.cancel() }

// Trouble says why the program cannot be used now: nil when somebody listens, who has not let the last call wait in vain.
func (p *Peer) Trouble() error {
	p.mu.Lock()
	silent := p.silent
	p.mu.Unlock()
	if !silent.IsZero() {
		return p.silence(silent)
	}
	conn, err := net.DialTimeout("unix", p.address, settle)
	if err != nil {
		return fmt.Errorf("%s cannot be reached: %w: %w", p.name, err, errdefs.ErrUnavailable)
	}
	return conn.Close()
}

// reconnect does not sit out the backoff after a failure: the program may be back.
func (p *Peer) reconnect(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	for {
		state := p.conn.GetState()
		switch state {
		case connectivity.Ready:
			return
		case connectivity.TransientFailure:
			p.conn.ResetConnectBackoff()
		case connectivity.Idle:
			p.conn.Connect()
		case connectivity.Shutdown:
			return
		}
		if !p.conn.WaitForStateChange(ctx, state) {
			return
		}
		if s := p.conn.GetState(); state == connectivity.Connecting && s == connectivity.TransientFailure {
			return // nobody listens
		}
	}
}

func (p *Peer) resting() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Now().Before(p.until) {
		return p.silence(p.silent)
	}
	return nil
}

func (p *Peer) silence(since time.Time) error {
	return &SilentError{fmt.Sprintf("%s at %s has not answered since %s: %v", p.name, p.address, since.Format(time.RFC3339), errdefs.ErrUnavailable)}
}

func (p *Peer) answered() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silent, p.until = time.Time{}, time.Time{}
}

func (p *Peer) timedOut(patience time.Duration) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.silent.IsZero() {
		p.silent = now.Add(-patience)
	}
	p.until = now.Add(rest)
	return &SilentError{fmt.Sprintf("%s at %s did not answer within %s: %v", p.name, p.address, patience, errdefs.ErrUnavailable)}
}
