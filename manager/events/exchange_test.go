package events

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	eventtypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/namespaces"
)

func in(ns string) context.Context { return namespaces.With(context.Background(), ns) }

func envelope(t testing.TB, ns, topic string, at time.Time, body proto.Message) *types.Envelope {
	t.Helper()
	any, err := typeurl.MarshalAnyToProto(body)
	if err != nil {
		t.Fatal(err)
	}
	return &types.Envelope{Timestamp: timestamppb.New(at), Namespace: ns, Topic: topic, Event: any}
}

func subscribe(t testing.TB, x *Exchange, fs ...string) *Subscription {
	t.Helper()
	s, err := x.Subscribe(fs...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// waiting takes what is there, without waiting for more.
func waiting(t testing.TB, s *Subscription) (topics []string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for {
		s.mu.Lock()
		n := len(s.queue)
		s.mu.Unlock()
		if n == 0 {
			return topics
		}
		e, err := s.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		topics = append(topics, e.Topic)
	}
}

func TestFilters(t *testing.T) {
	x := NewExchange()
	x.Open()
	cases := map[string]int{ // filter: how many of those below match
		"":                            5,
		"topic==/tasks/exit":          2,
		`topic~="^/tasks/"`:           3,
		"namespace==b":                1,
		"event.container_id==c1":      2,
		"event.exit_status==7":        1,
		"event.id==i,namespace==a":    1,
		"event.labels.colour==red":    1,
		"event.runtime.name==fast":    1,
		"event.container_id.deeper":   0,
		"event.no_such_field":         0,
		"event":                       0,
		"topic==/tasks/exit,event.id": 1,
	}
	subs := map[string]*Subscription{}
	for f := range cases {
		subs[f] = subscribe(t, x, f)
	}
	both := subscribe(t, x, "namespace==b", "topic==/containers/update")
	for _, e := range []struct {
		ns, topic string
		body      proto.Message
	}{
		{"a", "/tasks/exit", &eventtypes.TaskExit{ContainerID: "c1", ID: "i", ExitStatus: 7}},
		{"a", "/tasks/exit", &eventtypes.TaskExit{ContainerID: "c2"}},
		{"b", "/tasks/start", &eventtypes.TaskStart{ContainerID: "c1"}},
		{"a", "/containers/update", &eventtypes.ContainerUpdate{ID: "u", Labels: map[string]string{"colour": "red"}}},
		{"a", "/containers/create", &eventtypes.ContainerCreate{ID: "v", Runtime: &eventtypes.ContainerCreate_Runtime{Name: "fast"}}},
	} {
		if err := x.Publish(in(e.ns), e.topic, e.body); err != nil {
			t.Fatal(err)
		}
	}
	for f, want := range cases {
		if got := waiting(t, subs[f]); len(got) != want {
			t.Errorf("filter %q: %v, want %d", f, got, want)
		}
	}
	if got := waiting(t, both); len(got) != 2 {
		t.Errorf("two filters: %v", got)
	}
	if _, err := x.Subscribe("topic=="); !errdefs.IsInvalidArgument(err) {
		t.Errorf("malformed filter: %v", err)
	}
}

// TestUnknownBody: an event of a type that we do not know, or damaged, is handed on; filters do not see into it.
func TestUnknownBody(t *testing.T) {
	x := NewExchange()
	x.Open()
	all, some := subscribe(t, x), subscribe(t, x, "event.id")
	for _, body := range []*anypb.Any{nil, {TypeUrl: "no.such.Type", Value: []byte{1}}, {TypeUrl: "containerd.events.TaskExit", Value: []byte{0xff}}} {
		if err := x.Forward(&types.Envelope{Timestamp: timestamppb.Now(), Namespace: "a", Topic: "/x", Event: body}); err != nil {
			t.Error(err)
		}
	}
	if got := waiting(t, all); len(got) != 3 {
		t.Errorf("got %v", got)
	}
	if got := waiting(t, some); len(got) != 0 {
		t.Errorf("filtered: got %v", got)
	}
}

func TestBadEvents(t *testing.T) {
	x := NewExchange()
	x.Open()
	now := timestamppb.Now()
	for name, e := range map[string]*types.Envelope{
		"none":          nil,
		"no time":       {Namespace: "a", Topic: "/x"},
		"no topic":      {Timestamp: now, Namespace: "a"},
		"no slash":      {Timestamp: now, Namespace: "a", Topic: "x"},
		"slash only":    {Timestamp: now, Namespace: "a", Topic: "/"},
		"empty part":    {Timestamp: now, Namespace: "a", Topic: "/x//y"},
		"bad part":      {Timestamp: now, Namespace: "a", Topic: "/x y"},
		"no namespace":  {Timestamp: now, Topic: "/x"},
		"bad namespace": {Timestamp: now, Namespace: "../a", Topic: "/x"},
	} {
		if err := x.Forward(e); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := x.Publish(context.Background(), "/x", &eventtypes.TaskStart{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("no namespace in the context: %v", err)
	}
}

// TestSlowSubscriber: one that does not read holds nobody up and is cut off with an error, not by a gap.
func TestSlowSubscriber(t *testing.T) {
	x := NewExchange()
	x.Open()
	slow, fast := subscribe(t, x), subscribe(t, x)
	const extra = 10
	for i := range backlog + extra {
		if err := x.Publish(in("a"), "/tasks/exit", &eventtypes.TaskExit{Pid: uint32(i)}); err != nil {
			t.Fatal(err)
		}
		if _, err := fast.Next(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := slow.Next(context.Background()); !errdefs.IsResourceExhausted(err) {
		t.Errorf("slow subscriber: %v", err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(slow.queue) != 0 {
		t.Errorf("%d events are kept for nobody", len(slow.queue))
	}
}

func TestNextWaits(t *testing.T) {
	x := NewExchange()
	x.Open()
	s := subscribe(t, x)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := s.Next(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nothing happened: %v", err)
	}
	got := make(chan string)
	go func() {
		e, err := s.Next(context.Background())
		if err != nil {
			got <- err.Error()
			return
		}
		got <- e.Topic
	}()
	if err := x.Publish(in("a"), "/x", &eventtypes.TaskStart{}); err != nil {
		t.Fatal(err)
	}
	if topic := <-got; topic != "/x" {
		t.Error(topic)
	}
	s.Close()
	if err := x.Publish(in("a"), "/y", &eventtypes.TaskStart{}); err != nil {
		t.Fatal(err)
	}
	if got := waiting(t, s); len(got) != 0 {
		t.Errorf("after Close: %v", got)
	}
}

// TestMissed: what happened while no daemon lived is told once to everyone who subscribes soon after the start, before or
// after it arrived; what happens later is told only to those who are there.
func TestMissed(t *testing.T) {
	x := NewExchange()
	x.Open()
	early := subscribe(t, x)
	const many = backlog + 100 // more than a subscriber may lag behind otherwise
	for i := range many {
		e := envelope(t, "a", fmt.Sprintf("/missed/%d", i), x.opened.Add(-time.Minute), &eventtypes.TaskExit{})
		if err := x.Forward(e); err != nil {
			t.Fatal(err)
		}
		if i%1000 == 0 {
			waiting(t, early)
		}
	}
	waiting(t, early)
	if err := x.Publish(in("a"), "/now", &eventtypes.TaskStart{}); err != nil {
		t.Fatal(err)
	}
	if got := waiting(t, early); len(got) != 1 || got[0] != "/now" {
		t.Errorf("early: %v", got)
	}
	for range 2 {
		got := waiting(t, subscribe(t, x))
		if len(got) != many || got[0] != "/missed/0" || got[many-1] != fmt.Sprintf("/missed/%d", many-1) {
			t.Errorf("late subscriber: %d events", len(got))
		}
	}
	if got := waiting(t, subscribe(t, x, "topic==/missed/7")); len(got) != 1 {
		t.Errorf("late subscriber with filter: %v", got)
	}
	x.opened = time.Now().Add(-grace) // half a minute goes by
	if got := waiting(t, subscribe(t, x)); len(got) != 0 {
		t.Errorf("too late: %v", got)
	}
	if x.missed != nil {
		t.Error("what nobody can get any more is kept")
	}
}

// TestOpen: what happens while the daemon is starting, when nobody can subscribe yet, counts as missed.
func TestOpen(t *testing.T) {
	x := NewExchange()
	if err := x.Publish(in("a"), "/starting", &eventtypes.TaskExit{}); err != nil {
		t.Fatal(err)
	}
	x.Open()
	if err := x.Publish(in("a"), "/open", &eventtypes.TaskExit{}); err != nil {
		t.Fatal(err)
	}
	if got := waiting(t, subscribe(t, x)); len(got) != 1 || got[0] != "/starting" {
		t.Errorf("subscriber: %v, not /starting alone", got)
	}
}
