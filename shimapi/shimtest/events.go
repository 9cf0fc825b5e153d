package shimtest

import (
	"context"
	"fmt"
	"net"
	"sync"

	"github.com/containerd/containerd/api/events"
	forward "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	shimpb "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// published is one event of a shim.
type published struct {
	namespace, topic string
	body             any
}

// recorder keeps what a shim published: it is the daemon's event socket, and the reader of the stream of our own.
type recorder struct {
	namespace string // of events that name none
	server    *ttrpc.Server
	served    chan struct{}

	mu   sync.Mutex
	seen []published
	more chan struct{} // closed by the next event
}

func newRecorder(socket, namespace string) (*recorder, error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		return nil, err
	}
	r := &recorder{namespace: namespace, server: srv, served: make(chan struct{}), more: make(chan struct{})}
	forward.RegisterTTRPCEventsService(srv, r)
	go func() {
		defer close(r.served)
		_ = srv.Serve(context.Background(), l) // ends with close
	}()
	return r, nil
}

func (r *recorder) close() {
	_ = r.server.Close()
	<-r.served
}

// Forward implements containerd's event socket.
func (r *recorder) Forward(_ context.Context, req *forward.ForwardRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, r.add(req.Envelope.Namespace, req.Envelope.Topic, req.Envelope.Event)
}

// follow reads the stream of a shim that forwards nothing, until the shim ends.
func (r *recorder) follow(c *shimapi.Client) error {
	stream, err := c.Shim().Events(context.Background(), &shimpb.EventsRequest{})
	if err != nil {
		return err
	}
	go func() {
		for {
			e, err := stream.Recv()
			if err != nil {
				return
			}
			_ = r.add(r.namespace, e.Topic, e.Event)
		}
	}()
	return nil
}

func (r *recorder) add(namespace, topic string, event *anypb.Any) error {
	body, err := typeurl.UnmarshalAny(event)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, published{namespace, topic, body})
	close(r.more)
	r.more = make(chan struct{})
	return nil
}

// wait gives all events once there are n, or what came in time.
func (r *recorder) wait(n int) []published {
	return r.waitFor(func(seen []published) bool { return len(seen) >= n })
}

// waitFor gives all events once they are enough, or what came in time.
func (r *recorder) waitFor(enough func([]published) bool) []published {
	ctx, cancel := within()
	defer cancel()
	for {
		r.mu.Lock()
		seen, more := append([]published(nil), r.seen...), r.more
		r.mu.Unlock()
		if enough(seen) {
			return seen
		}
		select {
		case <-more:
		case <-ctx.Done():
			return seen
		}
	}
}

// describe is an event in a line: its topic, and what tells it from others.
func (p published) describe() string {
	switch e := p.body.(type) {
	case *events.TaskExit:
		return fmt.Sprintf("%s %s/%s %d", p.topic, e.ContainerID, e.ID, e.ExitStatus)
	case *events.TaskExecAdded:
		return fmt.Sprintf("%s %s/%s", p.topic, e.ContainerID, e.ExecID)
	case *events.TaskExecStarted:
		return fmt.Sprintf("%s %s/%s", p.topic, e.ContainerID, e.ExecID)
	case *events.TaskCreate:
		return fmt.Sprintf("%s %s", p.topic, e.ContainerID)
	case *events.TaskStart:
		return fmt.Sprintf("%s %s", p.topic, e.ContainerID)
	case *events.TaskDelete:
		return fmt.Sprintf("%s %s %d", p.topic, e.ContainerID, e.ExitStatus)
	case *events.TaskPaused:
		return fmt.Sprintf("%s %s", p.topic, e.ContainerID)
	case *events.TaskResumed:
		return fmt.Sprintf("%s %s", p.topic, e.ContainerID)
	case *events.TaskOOM:
		return fmt.Sprintf("%s %s", p.topic, e.ContainerID)
	}
	return fmt.Sprintf("%s %T", p.topic, p.body)
}
