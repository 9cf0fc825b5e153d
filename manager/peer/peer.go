// Package peer is a connection to another program on this machine that serves one of containerd's services (a proxy
// plugin). That program may be slow, hang, be killed and started again; who calls it has a deadline, and is told.
package peer

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
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
	err := fn(inner)
	if err == nil {
		p.answered()
		return nil
	}
	if inner.Err() != nil && ctx.Err() == nil {
		return p.timedOut(patience)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err = errgrpc.ToNative(err); !errdefs.IsUnavailable(err) {
		p.answered()
	}
	return fmt.Errorf("%s at %s: %w", p.name, p.address, err)
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
		return fmt.Errorf("%s at %s has not answered since %s: %w", p.name, p.address, p.silent.Format(time.RFC3339), errdefs.ErrUnavailable)
	}
	return nil
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
	return fmt.Errorf("%s at %s did not answer within %s: %w", p.name, p.address, patience, errors.Join(errdefs.ErrUnavailable, context.DeadlineExceeded))
}
