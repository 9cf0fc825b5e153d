package shims

import (
	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"time"

	ledgerpb "github.com/managerd/managerd/protos/ledger"
	shim "github.com/managerd/managerd/protos/shim/v1"
)

// Event is one event of a shim's ledger, with its sequence number.
type Event = shim.EventRecord

func eventsSince(seq uint64) *shim.EventsRequest { return &shim.EventsRequest{Since: seq} }

// Envelope is the event as clients see it.
func Envelope(ns string, e *Event) *types.Envelope {
	return &types.Envelope{Timestamp: e.Timestamp, Namespace: ns, Topic: e.Topic, Event: e.Event}
}

// FromLedger is the event of a ledger record that was read without its shim; nil when the record is none.
func FromLedger(r *ledgerpb.Record) *Event {
	if r.Event == nil {
		return nil
	}
	return &Event{
		Seq: r.Seq, Timestamp: timestamppb.New(time.Unix(0, r.UnixNano)), Topic: r.Event.Topic,
		Event: &anypb.Any{TypeUrl: r.Event.TypeUrl, Value: r.Event.Value},
	}
}
