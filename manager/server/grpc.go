package server

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/managerd/managerd/manager/config"
)

// maxMessage is what clients are built for, in bytes, where the configuration sets no other limit.
const maxMessage = 16 << 20

// lastingMethods are the calls that may last: as long as a container, or as an image is large. When the daemon stops they
// end, and begin again at the next one: a pull goes on where it was.
var lastingMethods = map[string]bool{
	"/containerd.services.tasks.v1.Tasks/Wait":           true,
	"/containerd.services.transfer.v1.Transfer/Transfer": true,
}

// newGRPC makes the server. A panic in one call fails that call and is logged with its stack: nothing else ends.
func newGRPC(cfg *config.Config, under *calls, log *slog.Logger) *grpc.Server {
	limit := func(configured int) int {
		if configured > 0 {
			return configured
		}
		return maxMessage
	}
	caught := func(method string, err *error) {
		if p := recover(); p != nil {
			log.Error("a call panicked", "method", method, "panic", p, "stack", string(debug.Stack()))
			*err = status.Errorf(codes.Internal, "%s failed: %v; see the daemon's log", method, p)
		}
	}
	return grpc.NewServer(
		grpc.MaxRecvMsgSize(limit(cfg.GRPC.MaxRecvMessageSize)),
		grpc.MaxSendMsgSize(limit(cfg.GRPC.MaxSendMessageSize)),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, r any, i *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
			if lastingMethods[i.FullMethod] {
				var end func(*error)
				ctx, end = under.lasting(ctx)
				defer end(&err)
			} else {
				defer under.enter()()
			}
			defer caught(i.FullMethod, &err)
			resp, err = next(ctx, r)
			if err != nil {
				log.Debug("call failed", "method", i.FullMethod, "error", err)
			}
			return resp, err
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, i *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
			ctx, end := under.lasting(ss.Context())
			defer end(&err)
			defer caught(i.FullMethod, &err)
			return next(srv, &stream{ServerStream: ss, ctx: ctx})
		}),
	)
}

// recoverTTRPC does the same for shims' calls.
func recoverTTRPC(log *slog.Logger) ttrpc.UnaryServerInterceptor {
	return func(ctx context.Context, u ttrpc.Unmarshaler, i *ttrpc.UnaryServerInfo, next ttrpc.Method) (resp any, err error) {
		defer func() {
			if p := recover(); p != nil {
				log.Error("a call panicked", "method", i.FullMethod, "panic", p, "stack", string(debug.Stack()))
				err = fmt.Errorf("%s failed: %v; see the daemon's log", i.FullMethod, p)
			}
		}()
		return next(ctx, u)
	}
}

// stream is one whose context ends when the daemon stops.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *stream) Context() context.Context { return s.ctx }

// calls knows the calls under way: how many of them end by themselves, and what ends the others, which are streams and
// waits for the end of a process.
type calls struct {
	mu       sync.Mutex
	n        int
	idle     chan struct{} // closed when n is 0 and somebody asked
	lasts    context.Context
	endLasts context.CancelFunc
}

func newCalls() *calls {
	c := &calls{}
	c.lasts, c.endLasts = context.WithCancel(context.Background())
	return c
}

// errStopping answers the calls that last. Clients call again on this code, and reach the next daemon.
var errStopping = status.Error(codes.Unavailable, "managerd is stopping; containers run on")

// lasting gives a call that may last for ever a context that endLasts ends as well. The returned function is to be called
// with the call's error when it has ended.
func (c *calls) lasting(ctx context.Context) (context.Context, func(*error)) {
	ctx, cancel := context.WithCancelCause(ctx)
	unhook := context.AfterFunc(c.lasts, func() { cancel(errStopping) })
	return ctx, func(err *error) {
		if *err != nil && context.Cause(ctx) == errStopping {
			*err = errStopping
		}
		unhook()
		cancel(nil)
	}
}

// enter counts a call; the returned function says that it has ended.
func (c *calls) enter() func() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.n--; c.n == 0 && c.idle != nil {
			close(c.idle)
			c.idle = nil
		}
	}
}

// ended is closed as soon as no call is under way. To be asked once, when no new ones begin.
func (c *calls) ended() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	idle := make(chan struct{})
	if c.n == 0 {
		close(idle)
		return idle
	}
	c.idle = idle
	return idle
}

// none says whether no call is under way.
func (c *calls) none() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n == 0
}

// yielding is how long work that can wait does, all in all, for calls that are under way; yieldOnce, at one time.
const yielding, yieldOnce = time.Second, 50 * time.Millisecond

// yield gives a function that returns when no call is under way, or has waited long enough, for work that is to leave the
// machine to clients.
func (c *calls) yield(ctx context.Context) func() {
	var waited atomic.Int64
	return func() {
		begin := time.Now()
		most := min(yieldOnce, yielding-time.Duration(waited.Load()))
		for time.Since(begin) < most && !c.none() {
			select {
			case <-time.After(time.Millisecond):
			case <-ctx.Done():
				return
			}
		}
		waited.Add(int64(time.Since(begin)))
	}
}
