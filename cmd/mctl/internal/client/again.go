package client

import (
	"context"
	"fmt"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/connectivity"
)

const (
	// patience is how long a daemon may be away before Again tells about it.
	patience = 5 * time.Second
	// refusals is how often a daemon that is there may say itself that it is unavailable: while it ends, it does.
	refusals = 6
)

// Again calls f until it is answered. A daemon that is killed under a call, and is away for however long, is waited for,
// and the call is made once more; again then tells f that an earlier call may have had its effect. Once the daemon has
// been away for some seconds, notice (may be nil) is called with a sentence about that.
func (c *Client) Again(ctx context.Context, notice func(string), f func(ctx context.Context, again bool) error) error {
	refused := 0
	for again := false; ; again = true {
		before := c.losses.n.Load()
		err := f(ctx, again)
		// A daemon that ends cancels what it does for others.
		broken := errdefs.IsUnavailable(err) || errdefs.IsCanceled(err)
		if !broken || ctx.Err() != nil {
			return err
		}
		if c.losses.n.Load() == before && c.Conn.GetState() == connectivity.Ready {
			if refused++; refused > refusals {
				return err
			}
			select {
			case <-time.After(10 * time.Millisecond << refused):
			case <-ctx.Done():
				return err
			}
		} else {
			refused = 0
		}
		if !c.reconnect(ctx, notice) {
			return err
		}
	}
}

// reconnect waits for a connection. false: ctx ended first.
func (c *Client) reconnect(ctx context.Context, notice func(string)) bool {
	timer := time.AfterFunc(patience, func() {
		if notice != nil {
			notice(fmt.Sprintf("managerd does not answer at %s; containers run on, waiting for it to come back", c.Address))
		}
	})
	defer timer.Stop()
	for {
		state := c.Conn.GetState()
		switch state {
		case connectivity.Ready:
			return true
		case connectivity.Idle:
			c.Conn.Connect()
		}
		if !c.Conn.WaitForStateChange(ctx, state) {
			return false
		}
	}
}

// Wait waits for the end of a process (of container id's own with exec empty) and gives its exit status. It outlasts the
// daemon.
func (c *Client) Wait(ctx context.Context, notice func(string), id, exec string) (*tasksapi.WaitResponse, error) {
	var resp *tasksapi.WaitResponse
	err := c.Again(ctx, notice, func(ctx context.Context, _ bool) (err error) {
		resp, err = c.Tasks.Wait(ctx, &tasksapi.WaitRequest{ContainerID: id, ExecID: exec})
		return err
	})
	return resp, err
}

// Reach waits for a connection, for at most that long.
func (c *Client) Reach(ctx context.Context, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if c.reconnect(ctx, nil) {
		return nil
	}
	return c.Explain(fmt.Errorf("no connection to %s within %v: %w", c.Address, within, errdefs.ErrUnavailable))
}
