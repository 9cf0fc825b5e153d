package sandboxes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/shims"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
)

const (
	// adopters is how many shims are connected to at once after a start.
	adopters = 16
	// connecting is how long connecting to a shim may take.
	connecting = 5 * time.Second
	// succeeding is how long the successor of a dead shim may take.
	succeeding = 20 * time.Second
	// again is how long to wait before something that broke is tried anew.
	again = time.Second
	// maxDeaths of shims of one sandbox within deathsWithin, and it is left without one until the next start of the daemon.
	maxDeaths    = 5
	deathsWithin = time.Minute
)

// instance is a sandbox that has a bundle, from the moment it is being made or was found until it is gone.
type instance struct {
	key      key
	bundle   *bundle.Bundle
	settled  chan struct{} // closed once it is known whether there is a shim
	followed chan struct{} // closed once no more events of it come
	ending   sync.Mutex    // held by a Shutdown

	mu       sync.Mutex
	shim     *shims.Shim   // nil: it is dead, or is being looked for
	changed  chan struct{} // closed, and replaced, when that changes
	known    bool          // settled is closed
	gone     bool
	expected bool // the shim was told to end
}

func newInstance(k key, b *bundle.Bundle) *instance {
	return &instance{key: k, bundle: b, settled: make(chan struct{}), followed: make(chan struct{}), changed: make(chan struct{})}
}

// settle says which shim keeps the sandbox; nil for none.
func (i *instance) settle(shim *shims.Shim) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.shim = shim
	close(i.changed)
	i.changed = make(chan struct{})
	if !i.known {
		i.known = true
		close(i.settled)
	}
}

func (i *instance) now() (*shims.Shim, <-chan struct{}) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.shim, i.changed
}

func (i *instance) isGone() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.gone
}

func (i *instance) expectEnd() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.expected = true
}

func (i *instance) endExpected() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.expected
}

// reserve enters a sandbox that is being made.
func (c *Controller) reserve(ctx context.Context, k key) (*instance, error) {
	for {
		c.mu.Lock()
		old := c.all[k]
		if old == nil {
			i := newInstance(k, nil)
			c.all[k] = i
			c.mu.Unlock()
			return i, nil
		}
		c.mu.Unlock()
		select { // one that lived before this daemon may be none
		case <-old.settled:
		case <-ctx.Done():
			return nil, fmt.Errorf("sandbox %s is being made or looked for: %w", k.id, ctx.Err())
		}
		if !old.isGone() {
			return nil, fmt.Errorf("sandbox %s: %w", k.id, errdefs.ErrAlreadyExists)
		}
	}
}

// drop takes a sandbox out: it is gone.
func (c *Controller) drop(i *instance) {
	c.mu.Lock()
	if c.all[i.key] == i {
		delete(c.all, i.key)
	}
	c.mu.Unlock()
	i.mu.Lock()
	i.gone = true
	i.mu.Unlock()
	i.settle(nil)
}

// find gives the sandbox, once it is known whether its shim lives.
func (c *Controller) find(ctx context.Context, id string) (*instance, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	i := c.all[key{ns, id}]
	c.mu.Unlock()
	if i != nil {
		select {
		case <-i.settled:
		case <-ctx.Done():
			return nil, fmt.Errorf("sandbox %s is being made or looked for: %w", id, ctx.Err())
		}
	}
	if i == nil || i.isGone() {
		return nil, fmt.Errorf("sandbox %s does not run: %w", id, errdefs.ErrNotFound)
	}
	return i, nil
}

// deadError is the answer for a sandbox whose shim is dead and has no successor.
type deadError struct {
	id   string
	exit *ledgerpb.Exit // nil: nobody knows
}

func (e *deadError) Error() string { return fmt.Sprintf("the shim of sandbox %s is dead", e.id) }
func (e *deadError) Unwrap() error { return errdefs.ErrUnavailable }

// ask calls the shim of a sandbox. When the connection breaks meanwhile, its successor is asked the same.
func (c *Controller) ask(ctx context.Context, id string, call func(context.Context, *instance, *shims.Shim) error) error {
	i, err := c.find(ctx, id)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(namespaces.With(ctx, i.key.ns))
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)() // requests end with the daemon
	for {
		shim, changed := i.now()
		if shim == nil {
			if i.isGone() {
				return fmt.Errorf("sandbox %s is gone: %w", id, errdefs.ErrNotFound)
			}
			return &deadError{id, c.read(i.bundle).exit}
		}
		err := call(ctx, i, shim)
		if !errdefs.IsUnavailable(err) || c.ctx.Err() != nil {
			return err
		}
		select {
		case <-shim.Gone():
		case <-time.After(again): // the shim lives, and says so
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("sandbox %s: %w", id, ctx.Err())
		}
	}
}

// Recover enters every sandbox that has a bundle, and returns; their shims are found behind that. To be called once, before the
// controller is used.
func (c *Controller) Recover() error {
	found, err := c.bundles.List()
	if err != nil {
		return err
	}
	jobs := make(chan *instance, len(found))
	c.mu.Lock()
	for _, b := range found {
		i := newInstance(key{b.Namespace, b.ID}, b)
		c.all[i.key] = i
		jobs <- i
	}
	c.mu.Unlock()
	close(jobs)
	for range min(adopters, len(found)) {
		if err := c.background(func() {
			for i := range jobs {
				c.adopt(i)
			}
		}); err != nil {
			return err
		}
	}
	return nil
}

// adopt finds out what there is of a sandbox that lived before this daemon.
func (c *Controller) adopt(i *instance) {
	log := c.log.With("namespace", i.key.ns, "id", i.key.id)
	ctx, cancel := context.WithTimeout(namespaces.With(c.ctx, i.key.ns), connecting)
	defer cancel()
	shim, err := c.shims.Adopt(ctx, i.bundle)
	if err == nil {
		_, err = shim.Sandbox().SandboxStatus(ctx, &api.SandboxStatusRequest{SandboxID: i.key.id})
		if errdefs.IsNotFound(err) { // nobody was told of it
			shim.Close()
		} else if err != nil {
			log.Warn("the shim of a sandbox was adopted but does not answer", "error", err)
			err = nil
		}
	} else if errdefs.IsNotFound(err) && c.read(i.bundle).made {
		shim, err = c.succeed(i)
	}
	switch {
	case c.ctx.Err() != nil:
		if err == nil {
			shim.Close()
		}
		i.settle(nil)
	case err == nil:
		log.Info("adopted a sandbox")
		i.settle(shim)
		if err := c.background(func() { c.follow(i, shim) }); err != nil {
			close(i.followed)
		}
	case !c.read(i.bundle).made:
		log.Info("clearing away a sandbox that was never made")
		if err := c.clear(namespaces.With(c.ctx, i.key.ns), i.bundle); err != nil {
			log.Error("cannot clear away a sandbox that was never made", "error", err)
		}
		close(i.followed)
		c.drop(i)
	default:
		log.Error("cannot reach the shim of a sandbox", "error", err)
		c.catchUp(i)
		i.settle(nil)
		close(i.followed)
	}
}

func (c *Controller) succeed(i *instance) (*shims.Shim, error) {
	if !c.shims.Own(i.bundle) {
		return nil, fmt.Errorf("the shim of sandbox %s was not ours: %w", i.key.id, errdefs.ErrNotFound)
	}
	ctx, cancel := context.WithTimeout(namespaces.With(c.ctx, i.key.ns), succeeding)
	defer cancel()
	return c.shims.Succeed(ctx, i.bundle)
}

// follow hands on what our own shim tells, from where the last daemon stopped, until the shim ends. One that dies has a
// successor.
func (c *Controller) follow(i *instance, shim *shims.Shim) {
	defer close(i.followed)
	log := c.log.With("namespace", i.key.ns, "id", i.key.id)
	ctx := namespaces.With(c.ctx, i.key.ns)
	var deaths []time.Time
	for {
		err := c.stream(ctx, i, shim)
		if ctx.Err() != nil {
			return
		}
		if err != nil && !isClosed(shim.Gone()) {
			log.Warn("the event stream of a sandbox's shim broke", "error", err)
			select {
			case <-time.After(again):
			case <-shim.Gone():
			case <-ctx.Done():
				return
			}
			continue
		}
		if i.endExpected() {
			c.catchUp(i)
			return
		}
		actx, cancel := context.WithTimeout(ctx, connecting)
		next, aerr := c.shims.Adopt(actx, i.bundle)
		cancel()
		if aerr != nil {
			log.Error("the shim of a sandbox has died", "error", aerr)
			deaths = append(deaths, time.Now())
			if n := len(deaths); n > maxDeaths && deaths[n-1].Sub(deaths[n-1-maxDeaths]) < deathsWithin {
				aerr = errors.New("its successors die again and again")
			} else {
				next, aerr = c.succeed(i)
			}
		}
		shim.Close()
		if ctx.Err() != nil {
			if aerr == nil {
				next.Close()
			}
			return
		}
		if aerr != nil {
			log.Error("a sandbox is left without a shim", "error", aerr)
			c.catchUp(i)
			i.settle(nil)
			return
		}
		shim = next
		i.settle(shim)
	}
}

// stream hands on events until the shim has shut down (nil), or the stream breaks.
func (c *Controller) stream(ctx context.Context, i *instance, shim *shims.Shim) error {
	if !shim.Own {
		select {
		case <-shim.Gone():
		case <-ctx.Done():
		}
		return nil
	}
	source := i.bundle.Source()
	since := max(i.bundle.Cursor(), c.events.Cursor(source))
	return shim.Follow(ctx, since, func(e *shims.Event) {
		if e.Seq > since {
			since = e.Seq
			c.hand(i, source, e)
		}
	})
}

// hand hands an event on, then remembers that it was.
func (c *Controller) hand(i *instance, source string, e *shims.Event) {
	if err := c.events.ForwardFrom(source, e.Seq, shims.Envelope(i.key.ns, e)); err != nil {
		c.log.Error("a shim's event is malformed", "namespace", i.key.ns, "id", i.key.id, "topic", e.Topic, "error", err)
	}
	if err := i.bundle.SetCursor(e.Seq); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.log.Warn("cannot remember which events were handed on", "bundle", i.bundle.Path, "error", err)
	}
}

// catchUp hands on the events that a dead shim could not any more.
func (c *Controller) catchUp(i *instance) {
	source := i.bundle.Source()
	cursor := max(i.bundle.Cursor(), c.events.Cursor(source))
	for _, e := range c.read(i.bundle).events {
		if e.Seq > cursor {
			c.hand(i, source, e)
		}
	}
}

// legacy is what a shim has written down.
type legacy struct {
	made   bool
	exit   *ledgerpb.Exit // nil: it has not ended, or nobody knows
	events []*shims.Event
}

func (c *Controller) read(b *bundle.Bundle) (l legacy) {
	records, err := b.Ledger()
	if err != nil {
		c.log.Error("the ledger of a sandbox is damaged; what could be read is used", "bundle", b.Path, "error", err)
	}
	l.made = b.HasSandbox()
	for _, r := range records {
		if r.Exit != nil {
			l.exit = r.Exit
		}
		if e := shims.FromLedger(r); e != nil {
			l.made = l.made || e.Topic == shimapi.TopicSandboxCreate
			l.events = append(l.events, e)
		}
	}
	if !c.shims.Own(b) {
		l.made = true
	}
	return l
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
