package proxy

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
)

const (
	// maxMessage is what servers of containerd's services are built for, in bytes.
	maxMessage = 16 << 20
	// rest is how long a program that let a deadline pass is not asked again.
	rest = 3 * time.Second
	// settle is how long a call waits for a connection to a program that has just been started again.
	settle = time.Second
)

// link is a connection to a program that may come and go.
type link struct {
	name, address string
	conn          *grpc.ClientConn

	mu     sync.Mutex
	silent time.Time // since when it does not answer; zero: it does
	until  time.Time // when it is asked again
}

func dial(name, address string) (*link, error) {
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
	return &link{name: name, address: address, conn: conn}, nil
}

// call runs fn with a deadline. Unavailable: nobody listens, or nothing was answered in time.
func (l *link) call(ctx context.Context, patience time.Duration, fn func(context.Context) error) error {
	if err := l.resting(); err != nil {
		return err
	}
	inner, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	l.reconnect(inner)
	err := fn(inner)
	if err == nil {
		l.answered()
		return nil
	}
	if inner.Err() != nil && ctx.Err() == nil {
		return l.timedOut(patience)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err = errgrpc.ToNative(err); !errdefs.IsUnavailable(err) {
		l.answered()
	}
	return fmt.Errorf("%s at %s: %w", l.name, l.address, err)
}

// reconnect does not sit out the backoff after a failure: the program may be back.
func (l *link) reconnect(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	for {
		state := l.conn.GetState()
		switch state {
		case connectivity.Ready:
			return
		case connectivity.TransientFailure:
			l.conn.ResetConnectBackoff()
		case connectivity.Idle:
			l.conn.Connect()
		case connectivity.Shutdown:
			return
		}
		if !l.conn.WaitForStateChange(ctx, state) {
			return
		}
		if s := l.conn.GetState(); state == connectivity.Connecting && s == connectivity.TransientFailure {
			return // nobody listens
		}
	}
}

func (l *link) resting() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Now().Before(l.until) {
		return fmt.Errorf("%s at %s has not answered since %s: %w", l.name, l.address, l.silent.Format(time.RFC3339), errdefs.ErrUnavailable)
	}
	return nil
}

func (l *link) answered() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.silent, l.until = time.Time{}, time.Time{}
}

func (l *link) timedOut(patience time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.silent.IsZero() {
		l.silent = now.Add(-patience)
	}
	l.until = now.Add(rest)
	return fmt.Errorf("%s at %s did not answer within %s: %w", l.name, l.address, patience, errors.Join(errdefs.ErrUnavailable, context.DeadlineExceeded))
}
