package shimfake

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// Logs is refused: what a fake keeps has no output.
func (o own) Logs(_ context.Context, r *shim.LogsRequest, _ shim.Shim_LogsServer) error {
	return shimapi.ToWire(fmt.Errorf("no output of %s is kept here: it is a fake: %w", r.Id, errdefs.ErrFailedPrecondition))
}

// ReopenLogs has no logs to begin anew.
func (o own) ReopenLogs(ctx context.Context, r *shim.ReopenLogsRequest) (*shim.ReopenLogsResponse, error) {
	return through(o.s, "ReopenLogs", func(context.Context, *shim.ReopenLogsRequest) (*shim.ReopenLogsResponse, error) {
		return &shim.ReopenLogsResponse{}, nil
	})(ctx, r)
}
