package shimapi

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/ttrpc"

	shim "github.com/managerd/managerd/protos/shim/v1"
)

// Client is a connection to one shim. Its methods may be called by many goroutines at once.
type Client struct {
	TaskService
	conn *ttrpc.Client
	own  shim.ShimClient
	gone chan struct{}
	once sync.Once
}

// Dial connects to the shim that p describes. It fails fast when nobody listens: the error wraps ENOENT (no
// socket file) or ECONNREFUSED (no process). The caller closes the client.
func Dial(ctx context.Context, p BootstrapParams) (*Client, error) {
	conn, err := DialSocket(ctx, p.Address)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to shim at %s: %w", p.Address, err)
	}
	c := &Client{gone: make(chan struct{})}
	c.conn = ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { c.once.Do(func() { close(c.gone) }) }))
	c.TaskService = NewTaskClient(c.conn, p.Version)
	c.own = shim.NewShimClient(c.conn)
	return c, nil
}

// Shim gives the managerd.shim.v1 service; a shim that is not ours answers Unimplemented.
func (c *Client) Shim() shim.ShimClient { return c.own }

// Gone is closed when the connection has ended, from either side.
func (c *Client) Gone() <-chan struct{} { return c.gone }

// Close ends the connection; calls under way fail with ErrUnavailable.
func (c *Client) Close() error { return c.conn.Close() }
