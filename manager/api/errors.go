package api

import (
	"context"
	"errors"
	"io/fs"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// table says which status an error becomes: the first row that matches. It is the only place where gRPC codes are chosen.
var table = []struct {
	is   func(error) bool
	code codes.Code
}{
	{errdefs.IsInvalidArgument, codes.InvalidArgument},
	{errdefs.IsNotFound, codes.NotFound},
	{errdefs.IsAlreadyExists, codes.AlreadyExists},
	{func(err error) bool { return errdefs.IsFailedPrecondition(err) || errdefs.IsConflict(err) }, codes.FailedPrecondition},
	{errdefs.IsUnavailable, codes.Unavailable},
	{errdefs.IsNotImplemented, codes.Unimplemented},
	{errdefs.IsPermissionDenied, codes.PermissionDenied},
	{errdefs.IsUnauthorized, codes.Unauthenticated},
	{errdefs.IsResourceExhausted, codes.ResourceExhausted},
	{errdefs.IsOutOfRange, codes.OutOfRange},
	{errdefs.IsAborted, codes.Aborted},
	{errdefs.IsDataLoss, codes.DataLoss},
	{errdefs.IsInternal, codes.Internal},
	{is(context.Canceled), codes.Canceled},
	{is(context.DeadlineExceeded), codes.DeadlineExceeded},
	{is(unix.ENOSPC), codes.ResourceExhausted},
	{is(unix.EDQUOT), codes.ResourceExhausted},
	{is(fs.ErrPermission), codes.PermissionDenied},
}

func is(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

// toGRPC turns a domain error into the status that a client sees, with the whole message. nil and what is a status
// already stay as they are; what no row knows is Unknown.
func toGRPC(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	for _, row := range table {
		if row.is(err) {
			return status.Error(row.code, err.Error())
		}
	}
	return status.Error(codes.Unknown, err.Error())
}
