package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	streamingapi "github.com/containerd/containerd/api/services/streaming/v1"
	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	wire "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Asked answers a registry that wants to know who we are.
type Asked func(ctx context.Context, host string) (*wire.AuthResponse, error)

// Transfer has the daemon move from what to what, and returns when that is done. progress is told what happens, by one
// goroutine, and no more when Transfer has returned. asked, if not nil, is asked for credentials of the registry r; what
// r.HttpDebug asks for goes to debug. When the daemon is killed under it, the next one goes on.
func (c *Client) Transfer(ctx context.Context, from, to proto.Message, r *wire.RegistryResolver, asked Asked, progress func(*wire.Progress), notice func(string), debug io.Writer) error {
	var final error
	err := c.Again(ctx, notice, func(ctx context.Context, _ bool) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		err := c.transfer(ctx, from, to, r, asked, progress, debug)
		if errdefs.IsUnavailable(err) && !c.gone(err) {
			final = err // a registry is unavailable, not the daemon
			return nil
		}
		return err
	})
	return errors.Join(final, err)
}

// gone tells whether an error is of a daemon that ends, or has. One that is there says what it could not do.
func (c *Client) gone(err error) bool {
	return !slices.ContainsFunc([]string{"cannot pull ", "cannot push ", "cannot import "}, func(s string) bool { return strings.Contains(err.Error(), s) })
}

func (c *Client) transfer(ctx context.Context, from, to proto.Message, r *wire.RegistryResolver, asked Asked, progress func(*wire.Progress), debug io.Writer) error {
	streams := streamingapi.NewStreamingClient(c.Conn)
	if r.HttpDebug != wire.HTTPDebug_DISABLED {
		id, s, err := open(ctx, streams, "logs")
		if err != nil {
			return err
		}
		r.LogsStream = id
		go copyTo(debug, s)
	}
	if asked != nil {
		id, s, err := open(ctx, streams, "auth")
		if err != nil {
			return err
		}
		r.AuthStream = id
		go answer(ctx, s, asked)
	}
	id, s, err := open(ctx, streams, "progress")
	if err != nil {
		return err
	}
	var told sync.WaitGroup
	told.Go(func() {
		for {
			var p wire.Progress
			if receive(s, &p) != nil {
				return
			}
			progress(&p)
		}
	})
	request := &transferapi.TransferRequest{Options: &transferapi.TransferOptions{ProgressStream: id}}
	if request.Source, err = typeurl.MarshalAnyToProto(from); err != nil {
		return err
	}
	if request.Destination, err = typeurl.MarshalAnyToProto(to); err != nil {
		return err
	}
	_, err = transferapi.NewTransferClient(c.Conn).Transfer(ctx, request)
	_ = s.CloseSend()
	told.Wait() // the daemon ends its side when it has returned
	return err
}

// open opens a stream that the daemon knows by the id that is returned.
func open(ctx context.Context, c streamingapi.StreamingClient, kind string) (string, streamingapi.Streaming_StreamClient, error) {
	s, err := c.Stream(ctx)
	if err != nil {
		return "", nil, errgrpc.ToNative(err)
	}
	id := fmt.Sprintf("mctl-%s-%d-%d", kind, os.Getpid(), time.Now().UnixNano())
	if err := send(s, &streamingapi.StreamInit{ID: id}); err != nil && !errors.Is(err, io.EOF) {
		return "", nil, errgrpc.ToNative(err)
	}
	if _, err := s.Recv(); err != nil { // its word that it knows it
		return "", nil, errgrpc.ToNative(err)
	}
	return id, s, nil
}

func send(s streamingapi.Streaming_StreamClient, m proto.Message) error {
	a, err := typeurl.MarshalAnyToProto(m)
	if err != nil {
		return err
	}
	return s.Send(a)
}

func receive(s streamingapi.Streaming_StreamClient, m proto.Message) error {
	var a *anypb.Any
	a, err := s.Recv()
	if err != nil {
		return err
	}
	return typeurl.UnmarshalTo(a, m)
}

// window is how much the daemon may send that was not written yet, in bytes.
const window = 64 << 10

// copyTo writes what comes over a stream, until it ends.
func copyTo(w io.Writer, s streamingapi.Streaming_StreamClient) {
	for granted := 0; ; {
		if granted < window {
			if send(s, &wire.WindowUpdate{Update: window}) != nil {
				return
			}
			granted += window
		}
		var d wire.Data
		if receive(s, &d) != nil {
			return
		}
		granted -= len(d.Data)
		if _, err := w.Write(d.Data); err != nil {
			return
		}
	}
}

// answer answers for as long as the stream lasts. Without an answer of ours the registry is shown nothing.
func answer(ctx context.Context, s streamingapi.Streaming_StreamClient, asked Asked) {
	for {
		var q wire.AuthRequest
		if receive(s, &q) != nil {
			return
		}
		a, err := asked(ctx, q.Host)
		if err != nil {
			a = &wire.AuthResponse{AuthType: wire.AuthType_NONE}
		}
		if send(s, a) != nil {
			return
		}
	}
}
