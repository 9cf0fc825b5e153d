package e2e

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"
)

// window is a time without a daemon: from just before it was killed to when the next one was seen to serve.
type window struct{ from, to time.Time }

// flight is how long before its death a killed daemon may have had an event in hand: read from the shim and not written to
// the client, or written to the client and not noted down.
const flight = 100 * time.Millisecond

// watcher collects the events of all daemons, one after the other, as a client that subscribes again when it is cut off.
type watcher struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu         sync.Mutex
	seen       []*types.Envelope
	subscribed []time.Time // when a subscription was asked for
}

// watch begins to collect, and returns when the first subscription stands.
func watch(c *client) *watcher {
	ctx, cancel := context.WithCancel(c.ctx)
	w := &watcher{cancel: cancel, done: make(chan struct{})}
	first := make(chan struct{})
	go func() {
		defer close(w.done)
		var once sync.Once
		for ctx.Err() == nil {
			stream, err := eventsapi.NewEventsClient(c.conn).Subscribe(ctx, &eventsapi.SubscribeRequest{Filters: []string{"namespace==" + c.ns}})
			if err != nil {
				continue
			}
			if _, err := stream.Header(); err != nil {
				continue
			}
			once.Do(func() { close(first) })
			w.mu.Lock()
			w.subscribed = append(w.subscribed, time.Now())
			w.mu.Unlock()
			for {
				e, err := stream.Recv()
				if err != nil {
					break
				}
				w.mu.Lock()
				w.seen = append(w.seen, e)
				w.mu.Unlock()
			}
		}
	}()
	<-first
	return w
}

// process names a process of a container in an event of its life; ok is false for other events.
func process(e *types.Envelope) (id, exec string, ok bool) {
	var m interface {
		proto.Message
		GetContainerID() string
	}
	switch e.Topic {
	case "/tasks/create":
		m = &events.TaskCreate{}
	case "/tasks/start":
		m = &events.TaskStart{}
	case "/tasks/exec-added":
		m = &events.TaskExecAdded{}
	case "/tasks/exec-started":
		m = &events.TaskExecStarted{}
	case "/tasks/exit":
		m = &events.TaskExit{}
	case "/tasks/delete":
		m = &events.TaskDelete{}
	default:
		return "", "", false
	}
	if proto.Unmarshal(e.Event.Value, m) != nil {
		return "", "", false
	}
	id = m.GetContainerID()
	switch m := m.(type) {
	case *events.TaskExecAdded:
		exec = m.ExecID
	case *events.TaskExecStarted:
		exec = m.ExecID
	case *events.TaskExit:
		exec = m.ID
	case *events.TaskDelete:
		exec = m.ID
	}
	if exec == id {
		exec = ""
	}
	return id, exec, true
}

// check holds what was seen against what the daemon promises. A shim's events come in the order in which they
// happened, and each once: also those of a time without a daemon. Only one that the daemon had in hand when it was killed
// may be lost or come twice, and one of a time in which nobody had subscribed yet may be lost.
func (w *watcher) check(t *testing.T, down []window) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !w.settled() && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond) // events are told without anybody waiting for them
	}
	w.cancel()
	<-w.done
	inHand := func(at time.Time) bool {
		return slices.ContainsFunc(down, func(d window) bool { return at.After(d.from.Add(-flight)) && at.Before(d.from.Add(flight)) })
	}

	type thread struct {
		last   time.Time
		topics map[string]time.Time // "TOPIC EXEC"
	}
	threads := map[string]*thread{}
	doubled := 0
	for _, e := range w.seen {
		id, exec, ok := process(e)
		if !ok {
			continue
		}
		th := threads[id]
		if th == nil {
			th = &thread{topics: map[string]time.Time{}}
			threads[id] = th
		}
		at, what := e.Timestamp.AsTime(), strings.TrimSpace(e.Topic+" "+exec)
		if _, twice := th.topics[what]; twice {
			if doubled++; !inHand(at) {
				t.Errorf("%s: %s came twice", id, what)
			}
			continue
		}
		th.topics[what] = at
		if at.Before(th.last) {
			t.Errorf("%s: %s of %s came after an event of %s", id, what, at, th.last)
		}
		th.last = at
	}
	lost := 0
	for id, th := range threads {
		before, steps := time.Time{}, []string{"/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"}
		for i, topic := range steps {
			if at, ok := th.topics[topic]; ok {
				before = at
				continue
			}
			lost++
			// It happened between its neighbours.
			after := time.Now()
			for _, next := range steps[i+1:] {
				if at, ok := th.topics[next]; ok {
					after = at
					break
				}
			}
			if !w.blind(down, before, after) {
				t.Errorf("%s: %s never came; seen: %v", id, topic, th.topics)
			}
		}
	}
	if lost > len(threads)*4/10 {
		t.Errorf("%d events of %d containers were lost: too many to have been in hand", lost, len(threads))
	}
	t.Logf("%d events of %d containers, %d doubled and %d lost, each in the hands of a daemon that was killed", len(w.seen), len(threads), doubled, lost)
}

// blind says whether, at a moment between from and to, a daemon that was killed may have had an event in hand, or the next
// one served but nobody had subscribed again yet.
func (w *watcher) blind(down []window, from, to time.Time) bool {
	for _, d := range down {
		again := d.to
		for _, s := range w.subscribed {
			if s.After(d.from) {
				again = s
				break
			}
		}
		if from.Before(again) && to.After(d.from.Add(-flight)) {
			return true
		}
	}
	return false
}

// settled says whether the containers that ran all the time are seen to be gone: no more events come.
func (w *watcher) settled() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	gone := 0
	for _, e := range w.seen {
		if id, exec, ok := process(e); ok && e.Topic == "/tasks/delete" && exec == "" && strings.HasPrefix(id, "steady") {
			gone++
		}
	}
	return gone >= steady
}
