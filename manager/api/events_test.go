package api_test

import (
	"context"
	"fmt"
	"testing"

	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/namespaces"
)

func TestEvents(t *testing.T) {
	ctx, d := domainServer(t)
	publish := func(ctx context.Context, topic string) error {
		_, err := d.events.Publish(ctx, &eventsapi.PublishRequest{Topic: topic, Event: &anypb.Any{TypeUrl: "t"}})
		return err
	}
	all := d.subscribe(ctx, t)
	some := d.subscribe(ctx, t, `topic~=/^\/b/,namespace==one`, "namespace==three")
	for _, e := range []struct{ ns, topic string }{{"one", "/a"}, {"one", "/b/1"}, {"two", "/b/2"}, {"three", "/a/3"}} {
		if err := publish(namespaces.With(ctx, e.ns), e.topic); err != nil {
			t.Fatal(err)
		}
	}
	at := timestamppb.Now()
	env := func(change func(e *types.Envelope)) error {
		e := &types.Envelope{Timestamp: at, Namespace: "one", Topic: "/b/forwarded", Event: &anypb.Any{TypeUrl: "t"}}
		change(e)
		_, err := d.events.Forward(context.Background(), &eventsapi.ForwardRequest{Envelope: e}) // it has its own namespace
		return err
	}
	wantCode(t, env(func(*types.Envelope) {}), codes.OK, "")
	for s, want := range map[eventsapi.Events_SubscribeClient][]string{all: {"/a", "/b/1", "/b/2", "/a/3", "/b/forwarded"}, some: {"/b/1", "/a/3", "/b/forwarded"}} {
		for _, topic := range want {
			e, err := s.Recv()
			if err != nil || e.Topic != topic {
				t.Fatalf("%v instead of %s: %v", e, topic, err)
			}
			if topic == "/b/forwarded" && e.Timestamp.AsTime() != at.AsTime() {
				t.Errorf("%v is not of %v", e, at)
			}
		}
	}
	for _, topic := range []string{"", "a", "/", "/a//b", "/a/"} {
		wantCode(t, publish(ctx, topic), codes.InvalidArgument, "topic")
	}
	wantCode(t, env(func(e *types.Envelope) { e.Namespace = "" }), codes.InvalidArgument, "namespace")
	wantCode(t, env(func(e *types.Envelope) { e.Timestamp = nil }), codes.InvalidArgument, "timestamp")
	_, err := d.events.Forward(ctx, &eventsapi.ForwardRequest{})
	wantCode(t, err, codes.InvalidArgument, "envelope")
	bad, err := d.events.Subscribe(ctx, &eventsapi.SubscribeRequest{Filters: []string{"topic="}})
	if err == nil {
		_, err = bad.Recv()
	}
	wantCode(t, err, codes.InvalidArgument, "filter")
}

// TestSlowSubscriber: one that never reads holds up no publisher and no other subscriber, and is told that it lost
// events.
func TestSlowSubscriber(t *testing.T) {
	ctx, d := domainServer(t)
	slow := d.subscribe(ctx, t)
	quick := d.subscribe(ctx, t)
	const n = 12000
	body := &anypb.Any{TypeUrl: "t", Value: make([]byte, 100)}
	errs := make(chan error, 1)
	go func() {
		for i := range n {
			if _, err := d.events.Publish(ctx, &eventsapi.PublishRequest{Topic: fmt.Sprintf("/n/%d", i), Event: body}); err != nil {
				errs <- err
				return
			}
		}
		errs <- nil
	}()
	for i := range n {
		e, err := quick.Recv()
		if err != nil || e.Topic != fmt.Sprintf("/n/%d", i) {
			t.Fatalf("event %d: %v, %v", i, e, err)
		}
	}
	if err := <-errs; err != nil {
		t.Fatal(err)
	}
	got := 0
	for {
		if _, err := slow.Recv(); err != nil {
			wantCode(t, err, codes.ResourceExhausted, "subscribe again")
			break
		}
		got++
	}
	if got == 0 || got >= n {
		t.Errorf("it was sent %d events of %d", got, n)
	}
}
