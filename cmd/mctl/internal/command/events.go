package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	_ "github.com/containerd/containerd/api/events" // bodies are decoded by their type's name
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/spf13/cobra"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/cmd/mctl/internal/table"
)

type event struct {
	Seq       uint64    `json:"seq,omitempty"` // with --since
	Timestamp time.Time `json:"timestamp"`
	Namespace string    `json:"namespace"`
	Topic     string    `json:"topic"`
	Event     any       `json:"event"`
}

func (c *cli) eventsCommand() *cobra.Command {
	var since string
	var noFollow bool
	cmd := &cobra.Command{
		Use: "events [FILTER...]", Aliases: []string{"event"}, Short: "Print what happens, in all namespaces, as it happens",
		Long: `Prints events until it is interrupted. When managerd is started anew it goes on: what happens to tasks meanwhile is told by the
next managerd. With -o json every line is an object.
With --since it begins with what managerd has written down: every event then has a number, and --since NUMBER goes on behind
it, with none lost and none twice, however often managerd was killed meanwhile.`,
		Example: `  mctl events 'topic~=^/tasks/' 'namespace==default'
  mctl events --since 10m --no-follow`,
		RunE: func(cmd *cobra.Command, filters []string) error {
			if since != "" {
				r, err := replayRequest(since, time.Now())
				if err != nil {
					return misused(cmd, "%w", err)
				}
				r.Filters, r.Follow = filters, !noFollow
				return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
					return cl.Again(ctx, c.notice, func(ctx context.Context, _ bool) error { return c.replay(ctx, cl, r) })
				})
			}
			if noFollow {
				return misused(cmd, "--no-follow is for --since")
			}
			return c.connect(cmd, func(ctx context.Context, cl *client.Client) error {
				return cl.Again(ctx, c.notice, func(ctx context.Context, _ bool) error { return c.follow(ctx, cl, filters) })
			})
		},
	}
	cmd.Flags().StringVar(&since, "since", "", "begin with events of the last `TIME` (10m, 2h), or behind the one of a NUMBER (0: with the oldest there is)")
	cmd.Flags().BoolVar(&noFollow, "no-follow", false, "with --since: end when all that there is was printed")
	return cmd
}

// follow prints events until the stream ends; an end without an error is the daemon's.
func (c *cli) follow(ctx context.Context, cl *client.Client, filters []string) error {
	s, err := cl.Events.Subscribe(ctx, &eventsapi.SubscribeRequest{Filters: filters})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	for {
		e, err := s.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return fmt.Errorf("the daemon ended the stream of events: %w", errdefs.ErrUnavailable)
		case err != nil:
			return errgrpc.ToNative(err)
		}
		if err := c.printEvent(0, e); err != nil {
			return err
		}
	}
}

func (c *cli) printEvent(seq uint64, e *types.Envelope) error {
	var body any
	if e.Event != nil {
		v, err := typeurl.UnmarshalAny(e.Event)
		if err != nil { // of a kind that this program does not know
			v = map[string]any{"type_url": e.Event.TypeUrl, "value": e.Event.Value}
		}
		body = v
	}
	at := e.Timestamp.AsTime()
	if c.format() == table.JSON {
		return json.NewEncoder(c.out).Encode(event{seq, at, e.Namespace, e.Topic, body})
	}
	data, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("cannot print event %s: %w", e.Topic, err)
	}
	if seq != 0 {
		_, err = fmt.Fprintln(c.out, seq, at, e.Namespace, e.Topic, string(data))
		return err
	}
	_, err = fmt.Fprintln(c.out, at, e.Namespace, e.Topic, string(data))
	return err
}
