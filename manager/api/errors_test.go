package api

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestErrors: each sentinel has its code, also deep inside, and the client reads the whole sentence.
func TestErrors(t *testing.T) {
	for _, c := range []struct {
		err  error
		want codes.Code
	}{
		{errdefs.ErrInvalidArgument, codes.InvalidArgument}, {errdefs.ErrNotFound, codes.NotFound}, {errdefs.ErrAlreadyExists, codes.AlreadyExists},
		{errdefs.ErrFailedPrecondition, codes.FailedPrecondition}, {errdefs.ErrConflict, codes.FailedPrecondition}, {errdefs.ErrUnavailable, codes.Unavailable},
		{errdefs.ErrNotImplemented, codes.Unimplemented}, {errdefs.ErrPermissionDenied, codes.PermissionDenied}, {errdefs.ErrUnauthenticated, codes.Unauthenticated},
		{errdefs.ErrResourceExhausted, codes.ResourceExhausted}, {errdefs.ErrOutOfRange, codes.OutOfRange}, {errdefs.ErrAborted, codes.Aborted},
		{errdefs.ErrDataLoss, codes.DataLoss}, {errdefs.ErrInternal, codes.Internal}, {errdefs.ErrUnknown, codes.Unknown},
		{context.Canceled, codes.Canceled}, {context.DeadlineExceeded, codes.DeadlineExceeded},
		{unix.ENOSPC, codes.ResourceExhausted}, {unix.EDQUOT, codes.ResourceExhausted}, {&os.PathError{Op: "write", Path: "/x", Err: unix.ENOSPC}, codes.ResourceExhausted},
		{unix.EACCES, codes.PermissionDenied}, {errors.New("anything"), codes.Unknown},
		{errors.Join(errors.New("first"), errdefs.ErrNotFound), codes.NotFound},
		// What the client did wrong outweighs what came of it.
		{errors.Join(errdefs.ErrInternal, errdefs.ErrInvalidArgument), codes.InvalidArgument},
	} {
		err := fmt.Errorf("cannot do it: %w", fmt.Errorf("image %q: %w", "x", c.err))
		got := toGRPC(err)
		if s, ok := status.FromError(got); !ok || s.Code() != c.want || s.Message() != err.Error() {
			t.Errorf("%v becomes %v, not %s", c.err, got, c.want)
		}
		if again := toGRPC(got); again != got {
			t.Errorf("a status became %v", again)
		}
	}
	if err := toGRPC(nil); err != nil {
		t.Error(err)
	}
}
