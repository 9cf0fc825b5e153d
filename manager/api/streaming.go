package api

import (
	"fmt"
	"sync"

	api "github.com/containerd/containerd/api/services/streaming/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/manager/streaming"
)

// Streaming serves containerd.services.streaming.v1.Streaming.
type Streaming struct {
	api.UnimplementedStreamingServer
	streams *streaming.Manager
}

// NewStreaming enters clients' streams into streams.
func NewStreaming(streams *streaming.Manager) *Streaming { return &Streaming{streams: streams} }

// Register adds the service to a server.
func (a *Streaming) Register(s *grpc.Server) { api.RegisterStreamingServer(s, a) }

// Stream enters a stream, says so, and ends when whoever uses it closes it.
func (a *Streaming) Stream(srv api.Streaming_StreamServer) error {
	first, err := srv.Recv()
	if err != nil {
		return err
	}
	var init api.StreamInit
	if err := typeurl.UnmarshalTo(first, &init); err != nil {
		return toGRPC(fmt.Errorf("the first message of a stream must be a StreamInit: %w: %w", err, errdefs.ErrInvalidArgument))
	}
	s := &wireStream{Streaming_StreamServer: srv, closed: make(chan struct{})}
	done, err := a.streams.Register(srv.Context(), init.ID, s)
	if err != nil {
		return toGRPC(err)
	}
	defer done()
	ack, err := typeurl.MarshalAnyToProto(&emptypb.Empty{})
	if err != nil {
		return toGRPC(err)
	}
	if err := srv.Send(ack); err != nil {
		return err
	}
	select {
	case <-s.closed:
		return nil
	case <-srv.Context().Done():
		return toGRPC(srv.Context().Err())
	}
}

type wireStream struct {
	api.Streaming_StreamServer
	once   sync.Once
	closed chan struct{}
}

func (s *wireStream) Send(a *anypb.Any) error {
	select {
	case <-s.closed:
		return fmt.Errorf("the stream is closed: %w", errdefs.ErrAborted)
	default:
		return s.Streaming_StreamServer.Send(a)
	}
}

func (s *wireStream) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}
