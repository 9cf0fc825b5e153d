// Package events takes what happened from whoever made it happen, and hands it to those who subscribed. It knows events
// by their envelope: time, namespace, topic, and a typed body that only filters look into.
package events

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/identifiers"
	"github.com/managerd/managerd/manager/namespaces"
	records "github.com/managerd/managerd/protos/eventlog"
)

const (
	// backlog is how many events a subscriber may lag behind before it is cut off.
	backlog = 4096
	// grace is for how long after the start a subscriber is also given what happened while no daemon lived: clients
	// need a moment to come back.
	grace = 30 * time.Second
)

// journal keeps events, and knows which of a shim's it has (package eventlog).
type journal interface {
	Append(*records.Event) (fresh bool, err error)
	Cursor(source string) uint64
}

// Exchange connects publishers and subscribers. A publisher never waits for a subscriber.
type Exchange struct {
	journal journal // nil: events are not kept

	mu     sync.Mutex
	opened time.Time // what happened before is of the time when no daemon could be asked; zero: that is still so
	subs   map[*Subscription]struct{}
	missed []*event // of the time when no daemon lived, in the order of their arrival; dropped after grace
}

// NewExchange gives an exchange that is not open yet: see Open.
func NewExchange() *Exchange {
	return &Exchange{subs: map[*Subscription]struct{}{}}
}

// Keep has every event written to j before anybody is told. To be called before the first one.
func (x *Exchange) Keep(j journal) { x.journal = j }

// Cursor is the number of the last event of a source that was written down; 0 for none.
func (x *Exchange) Cursor(source string) uint64 {
	if x.journal == nil {
		return 0
	}
	return x.journal.Cursor(source)
}

// Open says that subscribers can come from now on. What happened before, also while the daemon was starting, is of the time
// without one.
func (x *Exchange) Open() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.opened = time.Now()
}

// Publish hands on an event of the namespace of ctx.
func (x *Exchange) Publish(ctx context.Context, topic string, event proto.Message) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return fmt.Errorf("cannot publish %s: %w", topic, err)
	}
	body, err := typeurl.MarshalAnyToProto(event)
	if err != nil {
		return fmt.Errorf("cannot publish %s: %w", topic, err)
	}
	return x.Forward(&types.Envelope{Timestamp: timestamppb.Now(), Namespace: ns, Topic: topic, Event: body})
}

// Forward hands on an event that already has its envelope. One that happened while no daemon could be asked is also kept, for
// the subscribers who come within half a minute from Open.
func (x *Exchange) Forward(e *types.Envelope) error { return x.ForwardFrom("", 0, e) }

// ForwardFrom is Forward for event seq of a source that counts its events; one that was written down before is not handed
// on again.
func (x *Exchange) ForwardFrom(source string, seq uint64, e *types.Envelope) error {
	if err := validate(e); err != nil {
		return err
	}
	ev := &event{Envelope: e}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.journal != nil {
		fresh, err := x.journal.Append(&records.Event{
			UnixNano: e.Timestamp.AsTime().UnixNano(), Namespace: e.Namespace, Topic: e.Topic, TypeUrl: e.Event.GetTypeUrl(),
			Value: e.Event.GetValue(), Source: source, SourceSeq: seq,
		})
		if err != nil { // subscribers are told all the same
			slog.Error("an event was not written down", "namespace", e.Namespace, "topic", e.Topic, "error", err)
		}
		if !fresh {
			return nil
		}
	}
	if x.opened.IsZero() || e.Timestamp.AsTime().Before(x.opened) && x.inGrace() {
		x.missed = append(x.missed, ev)
	}
	for s := range x.subs {
		s.offer(ev)
	}
	return nil
}

func (x *Exchange) inGrace() bool { return x.opened.IsZero() || time.Since(x.opened) < grace }

func validate(e *types.Envelope) error {
	fail := func(format string, a ...any) error {
		return fmt.Errorf("event "+format+": %w", append(a, errdefs.ErrInvalidArgument)...)
	}
	switch {
	case e == nil:
		return fail("has no envelope")
	case e.Timestamp == nil:
		return fail("%q has no timestamp", e.Topic)
	case !strings.HasPrefix(e.Topic, "/"):
		return fail("topic %q must begin with /", e.Topic)
	}
	if err := identifiers.Validate(e.Namespace); err != nil {
		return fmt.Errorf("event %q: namespace: %w", e.Topic, err)
	}
	for _, part := range strings.Split(e.Topic[1:], "/") {
		if err := identifiers.Validate(part); err != nil {
			return fmt.Errorf("event topic %q: %w", e.Topic, err)
		}
	}
	return nil
}

// Subscription delivers events in order until it is closed, or cut off because its reader is too slow.
type Subscription struct {
	x      *Exchange
	filter filters.Filter
	limit  int // most events that may wait

	mu    sync.Mutex
	queue []*types.Envelope
	wake  chan struct{} // has a token when queue or lost changed
	lost  bool
}

// Subscribe begins to collect what matches any of the filters (all, without one): topic, namespace, event.FIELD. The
// caller closes the subscription.
func (x *Exchange) Subscribe(fs ...string) (*Subscription, error) {
	f, err := filters.ParseAll(fs...)
	if err != nil {
		return nil, err
	}
	s := &Subscription{x: x, filter: f, wake: make(chan struct{}, 1)}
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.inGrace() {
		x.missed = nil
	}
	s.limit = backlog + len(x.missed)
	for _, e := range x.missed {
		s.offer(e)
	}
	x.subs[s] = struct{}{}
	return s, nil
}

// offer never waits.
func (s *Subscription) offer(e *event) {
	if !s.filter.Match(e) {
		return
	}
	s.mu.Lock()
	switch {
	case s.lost:
	case len(s.queue) >= s.limit:
		s.lost, s.queue = true, nil
		slog.Warn("an event subscriber was cut off: it does not read", "backlog", backlog)
	default:
		s.queue = append(s.queue, e.Envelope)
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Next waits for the next event. ResourceExhausted says that the subscriber lagged too far behind to be told all.
func (s *Subscription) Next(ctx context.Context) (*types.Envelope, error) {
	for {
		s.mu.Lock()
		if s.lost {
			s.mu.Unlock()
			return nil, fmt.Errorf("subscriber is more than %d events behind; subscribe again: %w", backlog, errdefs.ErrResourceExhausted)
		}
		if len(s.queue) > 0 {
			e := s.queue[0]
			s.queue = s.queue[1:]
			s.mu.Unlock()
			return e, nil
		}
		s.mu.Unlock()
		select {
		case <-s.wake:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Close ends the delivery.
func (s *Subscription) Close() {
	s.x.mu.Lock()
	defer s.x.mu.Unlock()
	delete(s.x.subs, s)
}

// Matcher says of an envelope whether any of the filters (all, without one) matches it.
func Matcher(fs ...string) (func(*types.Envelope) bool, error) {
	f, err := filters.ParseAll(fs...)
	if err != nil {
		return nil, err
	}
	return func(e *types.Envelope) bool { return f.Match(&event{Envelope: e}) }, nil
}

// event is one on its way; filters see its fields. Its body is decoded once, and only if a filter looks into it.
type event struct {
	*types.Envelope
	decode sync.Once
	body   proto.Message // nil: of an unknown type, or damaged
}

// Field is a field of the envelope, or with event.FIELD of the body.
func (e *event) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "topic":
		return e.Topic, e.Topic != ""
	case "namespace":
		return e.Namespace, e.Namespace != ""
	case "event":
		return e.bodyField(path[1:])
	}
	return "", false
}

// bodyField looks into the body by the names of its .proto file: event.container_id, event.labels.KEY.
func (e *event) bodyField(path []string) (string, bool) {
	e.decode.Do(func() {
		if e.Event == nil {
			return
		}
		if v, err := typeurl.UnmarshalAny(e.Event); err == nil {
			e.body, _ = v.(proto.Message)
		}
	})
	if e.body == nil || len(path) == 0 {
		return "", false
	}
	m := e.body.ProtoReflect()
	for i, name := range path {
		fd := m.Descriptor().Fields().ByName(protoreflect.Name(name))
		if fd == nil {
			return "", false
		}
		switch {
		case fd.IsMap():
			key := protoreflect.ValueOfString(strings.Join(path[i+1:], ".")).MapKey()
			if fd.MapKey().Kind() != protoreflect.StringKind || !m.Get(fd).Map().Has(key) {
				return "", false
			}
			return m.Get(fd).Map().Get(key).String(), true
		case fd.IsList():
			return "", false
		case fd.Kind() == protoreflect.MessageKind:
			m = m.Get(fd).Message()
		default:
			s := m.Get(fd).String()
			return s, i == len(path)-1 && s != ""
		}
	}
	return "", false
}
