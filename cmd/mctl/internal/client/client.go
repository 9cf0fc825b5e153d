// Package client is mctl's connection to managerd, or to any daemon that serves containerd's API: the services, errors
// that people can read, and calls that outlast a daemon which is killed and started again.
package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"

	"github.com/managerd/managerd/manager/archive/remote"
)

// maxMessage is what daemons are built for, in bytes.
const maxMessage = 16 << 20

// Client is a connection and the services on it. Errors of its unary calls are errdefs'; those of streams are gRPC's.
// Close releases it.
type Client struct {
	Address string
	Conn    *grpc.ClientConn

	Version       versionapi.VersionClient
	Introspection introspectionapi.IntrospectionClient
	Namespaces    namespacesapi.NamespacesClient
	Images        imagesapi.ImagesClient
	Content       contentapi.ContentClient
	Snapshots     snapshotsapi.SnapshotsClient
	Leases        leasesapi.LeasesClient
	Containers    containersapi.ContainersClient
	Tasks         tasksapi.TasksClient
	Events        eventsapi.EventsClient

	Sandboxes         sandboxapi.StoreClient
	SandboxController sandboxapi.ControllerClient

	losses losses
}

// Open prepares a connection to the socket at address; nothing is sent yet, but a socket that is not there, or that
// nobody may use, is an error now.
func Open(address string) (*Client, error) {
	path, err := filepath.Abs(strings.TrimPrefix(address, "unix://"))
	if err != nil {
		return nil, err
	}
	c := &Client{Address: path}
	if fi, err := os.Stat(path); err != nil {
		return nil, c.unreachable(err)
	} else if fi.Mode()&fs.ModeSocket == 0 {
		return nil, fmt.Errorf("cannot reach managerd: %s is no socket; name it with --address: %w", path, errdefs.ErrInvalidArgument)
	}
	c.Conn, err = grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithStatsHandler(&c.losses),
		// A daemon that is started again serves within a moment: look often.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithUnaryInterceptor(c.native),
	)
	if err != nil {
		return nil, err
	}
	c.Version = versionapi.NewVersionClient(c.Conn)
	c.Introspection = introspectionapi.NewIntrospectionClient(c.Conn)
	c.Namespaces = namespacesapi.NewNamespacesClient(c.Conn)
	c.Images = imagesapi.NewImagesClient(c.Conn)
	c.Content = contentapi.NewContentClient(c.Conn)
	c.Snapshots = snapshotsapi.NewSnapshotsClient(c.Conn)
	c.Leases = leasesapi.NewLeasesClient(c.Conn)
	c.Containers = containersapi.NewContainersClient(c.Conn)
	c.Tasks = tasksapi.NewTasksClient(c.Conn)
	c.Events = eventsapi.NewEventsClient(c.Conn)
	c.Sandboxes = sandboxapi.NewStoreClient(c.Conn)
	c.SandboxController = sandboxapi.NewControllerClient(c.Conn)
	return c, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.Conn.Close() }

// Blobs is the content service as package archive uses it.
func (c *Client) Blobs() remote.Content { return remote.NewContent(c.Conn) }

// Names is the image service as package archive uses it.
func (c *Client) Names() remote.Images { return remote.NewImages(c.Conn) }

// Snapshotter is the snapshotter of that name as package archive uses it.
func (c *Client) Snapshotter(name string) remote.Snapshotter {
	return remote.NewSnapshotter(c.Conn, name)
}

// native gives the errors of unary calls their errdefs class and the daemon's own words. Package remote, which expects
// gRPC's, classifies once more: its errors keep their class by being statuses still.
func (c *Client) native(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, conn, opts...)
	if err == nil {
		return nil
	}
	return &callError{wire: err, native: errgrpc.ToNative(err)}
}

// callError reads and classifies as errdefs' error, and is still a gRPC status for who looks for one.
type callError struct{ wire, native error }

func (e *callError) Error() string   { return e.native.Error() }
func (e *callError) Unwrap() []error { return []error{e.native, e.wire} }

// losses counts connections that ended.
type losses struct{ n atomic.Int64 }

func (l *losses) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (l *losses) HandleRPC(context.Context, stats.RPCStats)                         {}
func (l *losses) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (l *losses) HandleConn(_ context.Context, s stats.ConnStats) {
	if _, ok := s.(*stats.ConnEnd); ok {
		l.n.Add(1)
	}
}

// Explain makes of a failed call an error that says what to do when it is the daemon that cannot be reached.
func (c *Client) Explain(err error) error {
	if err == nil || !errdefs.IsUnavailable(err) {
		return err
	}
	conn, derr := net.DialTimeout("unix", c.Address, time.Second)
	if derr == nil {
		_ = conn.Close()
		return err
	}
	return c.unreachable(derr)
}

// unreachable says what is wrong with the socket, and what to do.
func (c *Client) unreachable(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("cannot reach managerd: there is no socket %s; start it with `systemctl start managerd` or `managerd --address %s`, or name its socket with --address", c.Address, c.Address)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("cannot reach managerd: nobody serves %s; start it with `systemctl start managerd` or `managerd --address %s`", c.Address, c.Address)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("cannot reach managerd: no permission to use %s; run mctl as root", c.Address)
	}
	return fmt.Errorf("cannot reach managerd at %s: %w", c.Address, err)
}
