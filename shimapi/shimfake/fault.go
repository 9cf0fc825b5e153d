package shimfake

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Fault is what goes wrong with a method.
type Fault struct {
	// Times is how often; 0 is every time.
	Times int `json:"times,omitempty"`
	// After has it go wrong when the method has done its work, instead of that.
	After bool `json:"after,omitempty"`

	// What goes wrong, in this order:

	// Delay comes before anything else, in nanoseconds.
	Delay time.Duration `json:"delay,omitempty"`
	// Hang never answers.
	Hang bool `json:"hang,omitempty"`
	// Crash ends the shim without a word.
	Crash bool `json:"crash,omitempty"`
	// Drop breaks every connection, and goes on serving new ones.
	Drop bool `json:"drop,omitempty"`
	// Code is answered as an error, with Message.
	Code    codes.Code `json:"code,omitempty"`
	Message string     `json:"message,omitempty"`
}

// Faults are the faults by method: Create, State, ..., Events.
type Faults map[string]Fault

// SetFaults replaces what goes wrong from now on; the counts of Times begin anew.
func (s *Shim) SetFaults(f Faults) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults, s.used = f, map[string]int{}
}

// WriteFaults is SetFaults for a shim that runs as a program (see Main): for the shim of container id, read anew at every
// call. dir is that of EnvFaults.
func WriteFaults(dir, id string, f Faults) error {
	data, err := json.Marshal(f)
	if err != nil {
		return err
	}
	half := filepath.Join(dir, "."+id)
	if err := os.WriteFile(half, data, 0o600); err != nil {
		return err
	}
	return os.Rename(half, filepath.Join(dir, id))
}

func readFaults(dir, id string) (f Faults, err error) {
	data, err := os.ReadFile(filepath.Join(dir, id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return f, json.Unmarshal(data, &f)
}

// take finds the fault of a call, and counts it.
func (s *Shim) take(method string) (Fault, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls[method]++
	faults := s.faults
	if s.cfg.FaultDir != "" {
		var err error
		if faults, err = readFaults(s.cfg.FaultDir, s.cfg.ID); err != nil {
			return Fault{}, err
		}
	}
	f, ok := faults[method]
	if !ok || (f.Times > 0 && s.used[method] >= f.Times) {
		return Fault{}, nil
	}
	s.used[method]++
	return f, nil
}

// suffer lets a fault happen; nil when it leaves the call alone.
func (s *Shim) suffer(ctx context.Context, f Fault) error {
	if f.Delay > 0 {
		select {
		case <-time.After(f.Delay):
		case <-s.stopped:
		}
	}
	if f.Hang {
		select {
		case <-ctx.Done(): // the client's deadline may come here first
			return ctx.Err()
		case <-s.stopped:
			return errGone
		}
	}
	if f.Crash {
		s.Crash()
		return errGone
	}
	if f.Drop {
		s.Drop()
		return errGone
	}
	if f.Code != codes.OK {
		return errgrpc.ToNative(status.Error(f.Code, f.Message))
	}
	return nil
}

var errGone = fmt.Errorf("nobody hears this: %w", errdefs.ErrUnavailable)

// through runs a method with its fault.
func through[Req, Resp any](s *Shim, method string, f func(context.Context, *Req) (*Resp, error)) func(context.Context, *Req) (*Resp, error) {
	return func(ctx context.Context, r *Req) (*Resp, error) {
		fault, err := s.take(method)
		if err != nil {
			return nil, err
		}
		if !fault.After {
			if err := s.suffer(ctx, fault); err != nil {
				return nil, err
			}
		}
		resp, err := f(ctx, r)
		if err == nil && fault.After {
			err = s.suffer(ctx, fault)
		}
		return resp, err
	}
}
