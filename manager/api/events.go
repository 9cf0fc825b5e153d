package api

import (
	"context"

	api "github.com/containerd/containerd/api/services/events/v1"
	ttrpcapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/events"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/shimapi"
)

// Events serves containerd.services.events.v1.Events, and the forwarding half of it to shims, over ttrpc.
type Events struct {
	api.UnimplementedEventsServer
	exchange *events.Exchange
}

// NewEvents serves x.
func NewEvents(x *events.Exchange) *Events { return &Events{exchange: x} }

// Register adds the service to a server.
func (a *Events) Register(s *grpc.Server) { api.RegisterEventsServer(s, a) }

// RegisterTTRPC adds the forwarding service to a ttrpc server.
func (a *Events) RegisterTTRPC(s *ttrpc.Server) {
	ttrpcapi.RegisterTTRPCEventsService(s, forwarder{a.exchange})
}

// Publish hands on a client's event.
func (a *Events) Publish(ctx context.Context, r *api.PublishRequest) (*emptypb.Empty, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, toGRPC(err)
	}
	return done, toGRPC(a.exchange.Forward(&types.Envelope{Timestamp: timestamppb.Now(), Namespace: ns, Topic: r.Topic, Event: r.Event}))
}

// Forward hands on an event with its envelope.
func (a *Events) Forward(_ context.Context, r *api.ForwardRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.exchange.Forward(r.Envelope))
}

// Subscribe streams events.
func (a *Events) Subscribe(r *api.SubscribeRequest, stream api.Events_SubscribeServer) error {
	sub, err := a.exchange.Subscribe(r.Filters...)
	if err != nil {
		return toGRPC(err)
	}
	defer sub.Close()
	// At once, not with the first event: a client then knows that it misses nothing from here on.
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	for {
		e, err := sub.Next(stream.Context())
		if err != nil {
			return toGRPC(err)
		}
		if err := stream.Send(e); err != nil {
			return err
		}
	}
}

type forwarder struct{ exchange *events.Exchange }

// Forward takes an event of a shim.
func (f forwarder) Forward(_ context.Context, r *ttrpcapi.ForwardRequest) (*emptypb.Empty, error) {
	return done, shimapi.ToWire(f.exchange.Forward(r.Envelope))
}
