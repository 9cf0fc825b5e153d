package e2e

import (
	"context"
	"net"
	"testing"

	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	"github.com/containerd/containerd/api/services/tasks/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"
)

// publish publishes an event with a body of its own.
func (c *client) publish(topic, body string) error {
	_, err := eventsapi.NewEventsClient(c.conn).Publish(c.ctx, &eventsapi.PublishRequest{
		Topic: topic, Event: &anypb.Any{TypeUrl: "test", Value: []byte(body)},
	})
	return err
}

// halfOpen connects some clients to a gRPC socket that stop in the middle of what a client says first, or before it.
func halfOpen(t *testing.T, socket string, n int) (closeAll func()) {
	t.Helper()
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" // RFC 9113, 3.4
	var conns []net.Conn
	for i := range n {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			_, err = conn.Write([]byte(preface)[:len(preface)*(i%5)/4])
		}
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	return func() {
		for _, conn := range conns {
			_ = conn.Close()
		}
	}
}

// neverReading makes some clients that subscribe to events, and wait for the end of the task "long", and do not take what they
// are sent.
func neverReading(t *testing.T, c *client, socket string, n int) (closeAll func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(c.ctx)
	var conns []*grpc.ClientConn
	for range n {
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
		s, err := eventsapi.NewEventsClient(conn).Subscribe(ctx, &eventsapi.SubscribeRequest{})
		if err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = tasks.NewTasksClient(conn).Wait(ctx, &tasks.WaitRequest{ContainerID: "long"}) }()
		_ = s // what comes fills the stream's window, and stays there
	}
	return func() {
		cancel()
		for _, conn := range conns {
			_ = conn.Close()
		}
	}
}
