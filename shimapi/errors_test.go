package shimapi

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
)

// TestErrors: an error keeps its sentence, said once, and its sentinel, whoever's shim sends it.
func TestErrors(t *testing.T) {
	two := fmt.Errorf(`exec: "sh" not found: %w: %w`, errors.New("permission denied"), errdefs.ErrInvalidArgument)
	for _, c := range []struct {
		err  error
		is   error
		says string
	}{
		{fmt.Errorf("task x: %w", errdefs.ErrNotFound), errdefs.ErrNotFound, "task x: not found"},
		{fmt.Errorf("cannot create container x: %w", two), errdefs.ErrInvalidArgument,
			`cannot create container x: exec: "sh" not found: permission denied: invalid argument`},
		{fmt.Errorf("x: %w", errors.Join(errors.New("a"), errdefs.ErrFailedPrecondition)), errdefs.ErrFailedPrecondition, "x: a\nfailed precondition"},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), context.DeadlineExceeded, "x: context deadline exceeded"},
		{fmt.Errorf("x: %w", context.Canceled), context.Canceled, "x: context canceled"},
		{errors.New("anything"), errdefs.ErrUnknown, "anything"},
	} {
		for from, wire := range map[string]error{"ours": ToWire(c.err), "containerd's": errgrpc.ToGRPC(c.err)} {
			if got := FromWire(wire); !errors.Is(got, c.is) || got.Error() != c.says {
				t.Errorf("%s: %q (%v), want %q (%v)", from, got, errors.Is(got, c.is), c.says, c.is)
			}
		}
	}
	if err := FromWire(ttrpc.ErrClosed); !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
	if FromWire(nil) != nil || ToWire(nil) != nil {
		t.Error("no error is none")
	}
}
