package boot

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"time"

	events "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/service"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi"
)

// giveUp is how long after the end of its container a shim goes on trying to deliver its last events.
const giveUp = 10 * time.Second

// forwarder sends every event of the ledger to a foreign daemon's event socket, in order, each until it was taken: the
// queue is the ledger itself, so a daemon that is away for a while misses nothing.
type forwarder struct {
	sending chan struct{} // a semaphore: taken while an event is sent and noted
	taken   uint64        // sequence number of the last event that the daemon took; guarded by sending
}

func newForwarder(taken uint64) *forwarder {
	return &forwarder{sending: make(chan struct{}, 1), taken: taken}
}

// run returns when the shim ends.
func (f *forwarder) run(a *args, svc *service.Service, log *slog.Logger) {
	address := os.Getenv(shimapi.EnvTTRPCAddress)
	if address == "" {
		log.Warn("events are not forwarded: " + shimapi.EnvTTRPCAddress + " is not set")
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-svc.Ending():
			select {
			case <-time.After(giveUp):
				cancel()
			case <-ctx.Done():
			}
		case <-ctx.Done():
		}
	}()
	var client *ttrpc.Client
	defer func() {
		if client != nil {
			_ = client.Close()
		}
	}()
	err := svc.Follow(ctx, f.taken, func(r *ledgerpb.Record) error {
		if strings.HasPrefix(r.Event.Topic, shimapi.TopicSandboxes) {
			return nil // a foreign daemon tells of sandboxes itself
		}
		req := &events.ForwardRequest{Envelope: &types.Envelope{
			Timestamp: timestamppb.New(time.Unix(0, r.UnixNano)), Namespace: a.namespace, Topic: r.Event.Topic,
			Event: &anypb.Any{TypeUrl: r.Event.TypeUrl, Value: r.Event.Value},
		}}
		for wait := 10 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
			f.sending <- struct{}{}
			err := send(ctx, &client, address, req)
			if err == nil {
				f.taken = r.Seq
				svc.Taken(r.Seq)
			}
			<-f.sending
			if err == nil {
				return nil
			}
			log.Debug("event not taken, trying again", "topic", r.Event.Topic, "error", err)
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(wait):
			}
		}
	})
	if err != nil {
		log.Warn("events were not all forwarded", "error", err)
	}
}

func send(ctx context.Context, client **ttrpc.Client, address string, req *events.ForwardRequest) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if *client == nil {
		conn, err := shimapi.DialSocket(ctx, address)
		if err != nil {
			return err
		}
		*client = ttrpc.NewClient(conn)
	}
	_, err := events.NewTTRPCEventsClient(*client).Forward(ctx, req)
	if err != nil {
		_ = (*client).Close()
		*client = nil
	}
	return err
}
