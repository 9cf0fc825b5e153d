package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/api/services/streaming/v1"
	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	"github.com/containerd/containerd/api/types"
	wire "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/platforms"
	"github.com/containerd/typeurl/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/test/harness"
)

// mover is a client of Transfer and Streaming, as ctr 2.x is one.
type mover struct {
	t         *testing.T
	ctx       context.Context
	transfers transferapi.TransferClient
	streams   streaming.StreamingClient
}

func newMover(t *testing.T, d *harness.Daemon) *mover {
	t.Helper()
	conn, err := d.Conn()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(d.Context(context.Background()))
	t.Cleanup(cancel)
	return &mover{t: t, ctx: ctx, transfers: transferapi.NewTransferClient(conn), streams: streaming.NewStreamingClient(conn)}
}

func pack(m proto.Message) *anypb.Any {
	a, err := typeurl.MarshalAnyToProto(m)
	if err != nil {
		panic(err)
	}
	return a
}

var ids atomic.Int64

// stream opens a stream and waits for the daemon's word that it knows of it.
func (m *mover) stream(kind string) (string, streaming.Streaming_StreamClient, error) {
	s, err := m.streams.Stream(m.ctx)
	if err != nil {
		return "", nil, err
	}
	id := fmt.Sprintf("%s-%d", kind, ids.Add(1))
	if err := s.Send(pack(&streaming.StreamInit{ID: id})); err != nil && !errors.Is(err, io.EOF) {
		return "", nil, err
	}
	ack, err := s.Recv()
	if err != nil {
		return "", nil, err
	}
	var empty emptypb.Empty
	return id, s, typeurl.UnmarshalTo(ack, &empty)
}

// move runs a transfer, and gives what was told of it, in order.
func (m *mover) move(from, to proto.Message, opts ...grpc.CallOption) (told []*wire.Progress, err error) {
	id, s, err := m.stream("progress")
	if err != nil {
		return nil, err
	}
	var listening sync.WaitGroup
	listening.Go(func() {
		for {
			a, err := s.Recv()
			if err != nil {
				return
			}
			var p wire.Progress
			if err := typeurl.UnmarshalTo(a, &p); err != nil {
				m.t.Error(err)
				return
			}
			told = append(told, &p)
		}
	})
	_, err = m.transfers.Transfer(m.ctx, &transferapi.TransferRequest{
		Source: pack(from), Destination: pack(to), Options: &transferapi.TransferOptions{ProgressStream: id},
	}, opts...)
	_ = s.CloseSend()
	listening.Wait()
	return told, err
}

// receive collects the bytes that a daemon sends over a stream, granting a window as it takes them.
func receive(s streaming.Streaming_StreamClient, w io.Writer) error {
	const size = 64 << 10
	for window := 0; ; {
		if window < size {
			if err := s.Send(pack(&wire.WindowUpdate{Update: size})); err == nil {
				window += size
			}
		}
		a, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		var d wire.Data
		if err := typeurl.UnmarshalTo(a, &d); err != nil {
			return err
		}
		if _, err := w.Write(d.Data); err != nil {
			return err
		}
		window -= len(d.Data)
	}
}

// send sends all of r over a stream, never more than the daemon has granted.
func send(s streaming.Streaming_StreamClient, r io.Reader) error {
	grants := make(chan int)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			a, err := s.Recv()
			if err != nil {
				return
			}
			var u wire.WindowUpdate
			if typeurl.UnmarshalTo(a, &u) == nil {
				grants <- int(u.Update)
			}
		}
	}()
	buf := make([]byte, 32<<10)
	for room := 0; ; {
		for room <= 0 {
			select {
			case n := <-grants:
				room += n
			case <-ended:
				return io.ErrClosedPipe
			}
		}
		n, err := r.Read(buf[:min(len(buf), room)])
		if n > 0 {
			room -= n
			if serr := s.Send(pack(&wire.Data{Data: buf[:n]})); serr != nil {
				return serr
			}
		}
		if errors.Is(err, io.EOF) {
			go func() { // what is still granted is of no use
				for {
					select {
					case <-grants:
					case <-ended:
						return
					}
				}
			}()
			return s.CloseSend()
		}
		if err != nil {
			return err
		}
	}
}

// plain is a registry over HTTP.
func plain(ref string) *wire.OCIRegistry {
	return &wire.OCIRegistry{Reference: ref, Resolver: &wire.RegistryResolver{DefaultScheme: "http"}}
}

// stored is an image that is named, and unpacked, in the daemon.
func stored(name string) *wire.ImageStore {
	here := types.OCIPlatformToProto([]ocispec.Platform{platforms.DefaultSpec()})
	return &wire.ImageStore{Name: name, Platforms: here, Unpacks: []*wire.UnpackConfiguration{{Platform: here[0], Snapshotter: snapshotter}}}
}

func code(err error) string { return status.Code(err).String() }
