package shimapi

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Inside both programs an error says what it is by wrapping a sentinel of containerd/errdefs. These two functions
// are the only places where that becomes, and is read from, a ttrpc status.

// ToWire turns a domain error into the status error that a ttrpc service returns. nil stays nil.
func ToWire(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	}
	return plain(errgrpc.ToGRPC(err))
}

// plain is a status without errgrpc's details, which describe an error's tree: read back, an error that wraps two others
// would say everything twice. The code and the sentence are all that is meant.
func plain(err error) error {
	st := status.Convert(err)
	return status.Error(st.Code(), st.Message())
}

// FromWire turns what a ttrpc call returned into an error that wraps a sentinel of errdefs; a connection that is
// gone is ErrUnavailable, so that nobody takes it for an answer of the shim. nil stays nil.
func FromWire(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ttrpc.ErrClosed):
		return fmt.Errorf("shim closed the connection: %w", errdefs.ErrUnavailable)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return err
	}
	return errgrpc.ToNative(plain(err))
}
