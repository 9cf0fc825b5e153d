package service

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"runtime/pprof"
	"runtime/trace"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// longestProfile is how long a recording may be.
const longestProfile = 10 * time.Minute

// Profile streams a profile of this process.
func (s *Service) Profile(ctx context.Context, r *shim.ProfileRequest, stream shim.Shim_ProfileServer) error {
	return shimapi.ToWire(profile(ctx, r, &parts{func(p []byte) error { return stream.Send(&shim.ProfileResponse{Data: p}) }}))
}

func profile(ctx context.Context, r *shim.ProfileRequest, w io.Writer) error {
	duration := time.Duration(r.DurationNano)
	switch r.Name {
	case "profile", "trace":
		if duration <= 0 || duration > longestProfile {
			return fmt.Errorf("cannot record a %s for %v: that is not between 0 and %v: %w", r.Name, duration, longestProfile, errdefs.ErrInvalidArgument)
		}
		return record(ctx, r.Name, duration, w)
	case "heap", "allocs":
		if duration < 0 || duration > longestProfile {
			return fmt.Errorf("cannot watch the %s for %v: that is not between 0 and %v: %w", r.Name, duration, longestProfile, errdefs.ErrInvalidArgument)
		}
		return allocations(ctx, r, duration, w)
	}
	p := pprof.Lookup(r.Name)
	if p == nil {
		names := "profile, trace"
		for _, p := range pprof.Profiles() {
			names += ", " + p.Name()
		}
		return fmt.Errorf("there is no profile %q; there are %s: %w", r.Name, names, errdefs.ErrNotFound)
	}
	return p.WriteTo(w, int(r.Debug))
}

// sampling is the mean number of bytes between allocations that are noted while memory is profiled.
const sampling = 4096

var memory sync.Mutex // held while memory is profiled

// allocations tells of what is allocated during a while, and of how much memory there is. Nothing is noted before: what Go
// keeps of it never shrinks, and would be more than the rest of the heap of a shim that has run thousands of execs.
func allocations(ctx context.Context, r *shim.ProfileRequest, duration time.Duration, w io.Writer) error {
	if !memory.TryLock() {
		return fmt.Errorf("cannot watch the %s: memory is being profiled already: %w", r.Name, errdefs.ErrFailedPrecondition)
	}
	defer memory.Unlock()
	runtime.MemProfileRate = sampling
	defer func() { runtime.MemProfileRate = 0 }()
	select {
	case <-time.After(duration):
	case <-ctx.Done():
		return ctx.Err()
	}
	runtime.GC() // what is told is of the last collection
	return pprof.Lookup(r.Name).WriteTo(w, int(r.Debug))
}

// record records for a while, or until the client has gone.
func record(ctx context.Context, what string, duration time.Duration, w io.Writer) (err error) {
	stop := pprof.StopCPUProfile
	if what == "trace" {
		stop = trace.Stop
		err = trace.Start(w)
	} else {
		err = pprof.StartCPUProfile(w)
	}
	if err != nil { // one at a time
		return fmt.Errorf("cannot record a %s: %w: %w", what, err, errdefs.ErrFailedPrecondition)
	}
	defer stop() // writes what is left
	select {
	case <-time.After(duration):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// parts sends what is written in messages that are not too large for the wire. Package trace compares writers, which functions
// cannot be.
type parts struct{ send func([]byte) error }

func (w *parts) Write(p []byte) (n int, err error) {
	const most = 64 << 10
	for n < len(p) && err == nil {
		part := p[n:min(n+most, len(p))]
		if err = w.send(part); err == nil {
			n += len(part)
		}
	}
	return n, err
}
