package api

import (
	"errors"
	"io"
	"time"

	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/eventlog"
	"github.com/managerd/managerd/manager/events"
	api "github.com/managerd/managerd/protos/manager/v1"
)

// Replay serves managerd.v1.Events.
type Replay struct {
	api.UnimplementedEventsServer
	log *eventlog.Log
}

// NewReplay serves l.
func NewReplay(l *eventlog.Log) *Replay { return &Replay{log: l} }

// Register adds the service to a server.
func (a *Replay) Register(s *grpc.Server) { api.RegisterEventsServer(s, a) }

// progress is how often a consumer whose filters match little is told how far the stream has come.
const progress = 1000

// Replay streams what the log has, and with follow what comes.
func (a *Replay) Replay(r *api.ReplayRequest, stream grpc.ServerStreamingServer[api.ReplayResponse]) error {
	match, err := events.Matcher(r.Filters...)
	if err != nil {
		return toGRPC(err)
	}
	var since time.Time
	if r.SinceTime != nil {
		since = r.SinceTime.AsTime()
	}
	reader := a.log.Read(r.SinceSeq)
	defer reader.Close()
	passed := 0
	for {
		item, err := reader.Next(stream.Context(), r.Follow)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return toGRPC(err)
		}
		resp := &api.ReplayResponse{Seq: item.Seq, Lost: item.Event == nil, LostAfter: item.LostAfter}
		if e := item.Event; e != nil {
			at := time.Unix(0, e.UnixNano)
			env := &types.Envelope{Timestamp: timestamppb.New(at), Namespace: e.Namespace, Topic: e.Topic}
			if e.TypeUrl != "" || len(e.Value) > 0 {
				env.Event = &anypb.Any{TypeUrl: e.TypeUrl, Value: e.Value}
			}
			if at.Before(since) || !match(env) {
				if passed++; passed%progress != 0 {
					continue
				}
			} else {
				resp.Timestamp, resp.Namespace, resp.Topic, resp.Event = env.Timestamp, env.Namespace, env.Topic, env.Event
			}
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
}
