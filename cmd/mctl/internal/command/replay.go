package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	managerapi "github.com/managerd/managerd/protos/manager/v1"
)

// replayRequest reads a duration before now, or a number.
func replayRequest(since string, now time.Time) (*managerapi.ReplayRequest, error) {
	if n, err := strconv.ParseUint(since, 10, 64); err == nil {
		return &managerapi.ReplayRequest{SinceSeq: n}, nil
	}
	d, err := time.ParseDuration(since)
	if err != nil || d < 0 {
		return nil, fmt.Errorf("--since %q is neither a time such as 10m nor the number of an event", since)
	}
	return &managerapi.ReplayRequest{SinceTime: timestamppb.New(now.Add(-d))}, nil
}

// replay prints what r asks for, and notes in r how far it has come: called again it goes on there.
func (c *cli) replay(ctx context.Context, cl *client.Client, r *managerapi.ReplayRequest) error {
	s, err := managerapi.NewEventsClient(cl.Conn).Replay(ctx, r)
	if err != nil {
		return errgrpc.ToNative(err)
	}
	for {
		e, err := s.Recv()
		switch {
		case errors.Is(err, io.EOF) && !r.Follow:
			return nil
		case errors.Is(err, io.EOF):
			return fmt.Errorf("the daemon ended the stream of events: %w", errdefs.ErrUnavailable)
		case err != nil:
			return errgrpc.ToNative(err)
		}
		switch {
		case e.Lost:
			c.notice(fmt.Sprintf("events behind number %d, up to %d, are lost: too old, too many, or damaged", e.LostAfter, e.Seq))
		case e.Topic != "":
			if err := c.printEvent(e.Seq, &types.Envelope{Timestamp: e.Timestamp, Namespace: e.Namespace, Topic: e.Topic, Event: e.Event}); err != nil {
				return err
			}
		}
		r.SinceSeq = e.Seq
	}
}
