package sandboxes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/bundle"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/shims"
	"github.com/managerd/managerd/shimapi"
)

// Sandboxer is the name of the one controller that there is: it asks a shim for everything.
const Sandboxer = "shim"

// specType is the type of an OCI runtime spec in an Any.
const specType = "types.containerd.io/opencontainers/runtime-spec/1/Spec"

const (
	// undoing is how long a shim may take to undo a Create by itself, before it is killed.
	undoing = 5 * time.Second
	// cleaning is how long all of the undoing may take.
	cleaning = 40 * time.Second
	// ending is how long a shim may take to end.
	ending = 10 * time.Second
)

// exchange takes events.
type exchange interface {
	Publish(ctx context.Context, topic string, event proto.Message) error
	ForwardFrom(source string, seq uint64, e *types.Envelope) error
	Cursor(source string) uint64
}

// Controller runs sandboxes of all namespaces.
type Controller struct {
	bundles *bundle.Store
	shims   *shims.Manager
	store   *Store
	events  exchange
	log     *slog.Logger

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu     sync.Mutex
	closed bool
	all    map[key]*instance
}

type key struct{ ns, id string }

// NewController gives one without sandboxes: see Recover. Close releases it.
func NewController(b *bundle.Store, s *shims.Manager, store *Store, e exchange, log *slog.Logger) *Controller {
	ctx, cancel := context.WithCancel(context.Background())
	return &Controller{bundles: b, shims: s, store: store, events: e, log: log, ctx: ctx, cancel: cancel, all: map[key]*instance{}}
}

// Close lets go of every shim; they live on. Requests under way fail.
func (c *Controller) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.work.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, i := range c.all {
		if shim, _ := i.now(); shim != nil {
			shim.Close()
		}
	}
}

// All gives namespace and id of every sandbox, also of those that are being made.
func (c *Controller) All() (all [][2]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k := range c.all {
		all = append(all, [2]string{k.ns, k.id})
	}
	return all
}

// background runs fn until Close, which waits for it. Unavailable after Close.
func (c *Controller) background(fn func()) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return fmt.Errorf("the daemon is ending: %w", errdefs.ErrUnavailable)
	}
	c.work.Add(1)
	go func() {
		defer c.work.Done()
		fn()
	}()
	return nil
}

// CreateRequest is a sandbox to be made.
type CreateRequest struct {
	ID          string
	Sandbox     *Sandbox // nil: as the store has it
	Rootfs      []*types.Mount
	Options     *anypb.Any // for the sandbox; those of its runtime are in Sandbox
	NetNS       string     // path; empty: what the spec says
	Annotations map[string]string
}

// Create makes a sandbox: a shim that holds its namespaces. On an error nothing is left of it.
func (c *Controller) Create(ctx context.Context, r CreateRequest) (err error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	fail := func(err error) error { return fmt.Errorf("cannot create sandbox %s: %w", r.ID, err) }
	if r.Sandbox == nil {
		of, err := c.store.Get(ctx, r.ID)
		if err != nil {
			return err
		}
		r.Sandbox = &of
	}
	if err := validate(Sandbox{ID: r.ID}); err != nil {
		return fail(err)
	}
	if r.Sandbox.ID != r.ID {
		return fail(fmt.Errorf("the sandbox given is %q: %w", r.Sandbox.ID, errdefs.ErrInvalidArgument))
	}
	_, own, err := c.shims.Resolve(r.Sandbox.Runtime.Name)
	if err != nil {
		return fail(err)
	}
	spec := r.Sandbox.Spec.GetValue()
	if !json.Valid(spec) {
		if own && len(spec) > 0 {
			return fail(fmt.Errorf("its spec is a %s, no OCI runtime spec in JSON: %w", r.Sandbox.Spec.TypeUrl, errdefs.ErrInvalidArgument))
		}
		spec = nil // another's shim may know what to do with it
	}
	i, err := c.reserve(ctx, key{ns, r.ID})
	if err != nil {
		return err
	}
	ctx = namespaces.With(ctx, ns)
	var shim *shims.Shim
	defer func() {
		if err != nil {
			c.undo(i, shim)
		}
	}()
	if i.bundle, err = c.makeBundle(ctx, i.key, spec); err != nil {
		return err
	}
	if shim, err = c.shims.Spawn(ctx, i.bundle, r.Sandbox.Runtime.Name, r.Sandbox.Runtime.Options); err != nil {
		return fail(err)
	}
	if r.Options == nil && own {
		r.Options = r.Sandbox.Runtime.Options
	}
	_, err = shim.Sandbox().CreateSandbox(ctx, &api.CreateSandboxRequest{
		SandboxID: r.ID, BundlePath: i.bundle.Path, Rootfs: r.Rootfs, Options: r.Options, NetnsPath: r.NetNS, Annotations: r.Annotations,
	})
	if err != nil {
		if said := shim.Epitaph(); errdefs.IsUnavailable(err) && said != "" {
			err = fail(fmt.Errorf("%s: %w", said, errdefs.ErrUnavailable))
		}
		return err
	}
	i.settle(shim)
	c.tell(i, shim, shimapi.TopicSandboxCreate, &events.SandboxCreate{SandboxID: r.ID})
	return c.background(func() { c.follow(i, shim) })
}

// tell tells of another's shim's sandbox; ours does it by its ledger.
func (c *Controller) tell(i *instance, shim *shims.Shim, topic string, event proto.Message) {
	if shim.Own {
		return
	}
	if err := c.events.Publish(namespaces.With(c.ctx, i.key.ns), topic, event); err != nil {
		c.log.Error("cannot tell of a sandbox", "namespace", i.key.ns, "id", i.key.id, "topic", topic, "error", err)
	}
}

// makeBundle makes the bundle of a sandbox that was reserved. What an earlier one of its name left, and nobody keeps, is
// cleared away first.
func (c *Controller) makeBundle(ctx context.Context, k key, spec []byte) (*bundle.Bundle, error) {
	b, err := c.bundles.Create(k.ns, k.id, spec)
	if !errdefs.IsAlreadyExists(err) {
		return b, err
	}
	old, err := c.bundles.Load(k.ns, k.id)
	if err == nil {
		c.log.Warn("clearing away what is left of an earlier sandbox", "namespace", k.ns, "id", k.id)
		err = c.clear(ctx, old)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot clear away what is left of an earlier sandbox %s: %w", k.id, err)
	}
	return c.bundles.Create(k.ns, k.id, spec)
}

// clear ends what is left of a sandbox, and removes its bundle.
func (c *Controller) clear(ctx context.Context, b *bundle.Bundle) error {
	if shim, err := c.shims.Adopt(ctx, b); err == nil {
		ectx, cancel := context.WithTimeout(ctx, undoing)
		_ = shim.End(ectx) // else the next step does it
		cancel()
		shim.Close()
		shim.Forget()
	}
	if _, err := c.shims.Cleanup(ctx, b); err != nil {
		return err
	}
	return b.Remove()
}

// undo takes away what there is of a sandbox that could not be made: its bundle and shim may be nil.
func (c *Controller) undo(i *instance, shim *shims.Shim) {
	log := c.log.With("namespace", i.key.ns, "id", i.key.id)
	defer c.drop(i)
	// The client's own deadline may be what failed it.
	ctx, cancel := context.WithTimeout(namespaces.With(context.Background(), i.key.ns), cleaning)
	defer cancel()
	if shim != nil {
		if !c.end(ctx, shim) {
			if err := shim.KillProcess(); err != nil && !errdefs.IsNotFound(err) {
				log.Error("cannot kill the shim of a sandbox that could not be created", "error", err)
			}
			if _, err := c.shims.Cleanup(ctx, i.bundle); err != nil {
				log.Error("cannot clean up after a sandbox that could not be created", "error", err)
			}
		}
		shim.Close()
		shim.Forget()
	}
	if i.bundle != nil {
		if err := i.bundle.Remove(); err != nil {
			log.Error("cannot remove the bundle of a sandbox that could not be created", "error", err)
		}
	}
}

// end asks a shim to end, with its sandbox, and says whether it did.
func (c *Controller) end(ctx context.Context, shim *shims.Shim) bool {
	ctx, cancel := context.WithTimeout(ctx, undoing)
	defer cancel()
	if err := shim.End(ctx); err != nil {
		return false
	}
	select {
	case <-shim.Gone():
		return true
	case <-ctx.Done():
		return false
	}
}

// Started is a sandbox that may be used.
type Started struct {
	*api.StartSandboxResponse
	Address string // of the shim, for tasks of its containers: "ttrpc+unix:///path"
	Version uint32 // of the task API there
}

// Start starts a sandbox that was created.
func (c *Controller) Start(ctx context.Context, id string) (Started, error) {
	var out Started
	tries := 0
	err := c.ask(ctx, id, func(ctx context.Context, i *instance, shim *shims.Shim) (err error) {
		tries++
		out.StartSandboxResponse, err = shim.Sandbox().StartSandbox(ctx, &api.StartSandboxRequest{SandboxID: id})
		if tries > 1 && errdefs.IsFailedPrecondition(err) { // the shim that died may have done it
			out.StartSandboxResponse, err = startedAlready(ctx, id, shim, err)
		}
		if err == nil {
			out.Address, out.Version = endpoint(shim)
			c.tell(i, shim, shimapi.TopicSandboxStart, &events.SandboxStart{SandboxID: id})
		}
		return err
	})
	return out, err
}

// startedAlready is what StartSandbox has answered of a sandbox that is ready; refused is the error otherwise.
func startedAlready(ctx context.Context, id string, shim *shims.Shim, refused error) (*api.StartSandboxResponse, error) {
	st, err := shim.Sandbox().SandboxStatus(ctx, &api.SandboxStatusRequest{SandboxID: id, Verbose: true})
	if err != nil || st.State != shimapi.SandboxReady {
		return nil, refused
	}
	return &api.StartSandboxResponse{Pid: st.Pid, CreatedAt: st.CreatedAt, Spec: &anypb.Any{TypeUrl: specType, Value: []byte(st.Info["spec"])}}, nil
}

func endpoint(shim *shims.Shim) (address string, version uint32) {
	version = 3
	if _, p, err := shim.Bundle.Shim(); err == nil {
		version = uint32(p.Version)
	}
	return "ttrpc+" + shim.Address, version
}

// UpgradeShims replaces, in the background and one after the other, the code of those shims that run another version than that
// on disk.
func (c *Controller) UpgradeShims() error {
	return c.background(func() {
		version, err := c.shims.Version(c.ctx)
		if err != nil {
			c.log.Error("shims of sandboxes are not upgraded", "error", err)
			return
		}
		c.mu.Lock()
		all := slices.Collect(maps.Values(c.all))
		c.mu.Unlock()
		for _, i := range all {
			select {
			case <-i.settled:
			case <-c.ctx.Done():
				return
			}
			if shim, _ := i.now(); shim != nil && shim.Own && c.ctx.Err() == nil {
				c.shims.Renew(namespaces.With(c.ctx, i.key.ns), shim, version, false) // it has no execs
			}
		}
	})
}

// Platform says what a sandbox's containers run on.
func (c *Controller) Platform(ctx context.Context, id string) (p *types.Platform, err error) {
	err = c.ask(ctx, id, func(ctx context.Context, _ *instance, shim *shims.Shim) error {
		r, err := shim.Sandbox().Platform(ctx, &api.PlatformRequest{SandboxID: id})
		p = r.GetPlatform()
		return err
	})
	return p, err
}

// Stop ends a sandbox, within timeout if it obeys, else by force. One that is not there is no error, as with containerd.
func (c *Controller) Stop(ctx context.Context, id string, timeout time.Duration) error {
	err := c.ask(ctx, id, func(ctx context.Context, _ *instance, shim *shims.Shim) error {
		_, err := shim.Sandbox().StopSandbox(ctx, &api.StopSandboxRequest{SandboxID: id, TimeoutSecs: uint32((timeout + time.Second - 1) / time.Second)})
		return err
	})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Wait waits for a sandbox's end.
func (c *Controller) Wait(ctx context.Context, id string) (status uint32, at *timestamppb.Timestamp, err error) {
	err = c.ask(ctx, id, func(ctx context.Context, i *instance, shim *shims.Shim) error {
		r, err := shim.Sandbox().WaitSandbox(ctx, &api.WaitSandboxRequest{SandboxID: id})
		if err == nil {
			c.tell(i, shim, shimapi.TopicSandboxExit, &events.SandboxExit{SandboxID: id, ExitStatus: r.ExitStatus, ExitedAt: r.ExitedAt})
		}
		status, at = r.GetExitStatus(), r.GetExitedAt()
		return err
	})
	var dead *deadError
	if errors.As(err, &dead) && dead.exit != nil {
		return dead.exit.Status, timestamppb.New(time.Unix(0, dead.exit.ExitedUnixNano)), nil
	}
	return status, at, err
}

// Status is how a sandbox is.
type Status struct {
	*api.SandboxStatusResponse
	Address string // empty without a shim
	Version uint32
}

// Status says how a sandbox is. One that only the store knows is not ready, as with containerd.
func (c *Controller) Status(ctx context.Context, id string, verbose bool) (Status, error) {
	var out Status
	err := c.ask(ctx, id, func(ctx context.Context, _ *instance, shim *shims.Shim) (err error) {
		if out.SandboxStatusResponse, err = shim.Sandbox().SandboxStatus(ctx, &api.SandboxStatusRequest{SandboxID: id, Verbose: verbose}); err == nil {
			out.Address, out.Version = endpoint(shim)
		}
		return err
	})
	var dead *deadError
	switch {
	case errors.As(err, &dead):
		out.SandboxStatusResponse = &api.SandboxStatusResponse{SandboxID: id, State: shimapi.SandboxNotReady, Info: map[string]string{"error": err.Error()}}
		if dead.exit != nil {
			out.ExitedAt = timestamppb.New(time.Unix(0, dead.exit.ExitedUnixNano))
		}
		return out, nil
	case errdefs.IsNotFound(err):
		if _, serr := c.store.Get(ctx, id); serr != nil {
			return out, err
		}
		out.SandboxStatusResponse = &api.SandboxStatusResponse{SandboxID: id, State: shimapi.SandboxNotReady, ExitedAt: timestamppb.Now()}
		return out, nil
	}
	return out, err
}

// Metrics reads a sandbox's counters.
func (c *Controller) Metrics(ctx context.Context, id string) (m *types.Metric, err error) {
	err = c.ask(ctx, id, func(ctx context.Context, _ *instance, shim *shims.Shim) error {
		r, err := shim.Sandbox().SandboxMetrics(ctx, &api.SandboxMetricsRequest{SandboxID: id})
		m = r.GetMetrics()
		return err
	})
	return m, err
}

// Update has a running sandbox carry out what has changed: see containerd.runtime.sandbox.v1.
func (c *Controller) Update(ctx context.Context, id string, of *types.Sandbox, fields []string) error {
	return c.ask(ctx, id, func(ctx context.Context, _ *instance, shim *shims.Shim) error {
		_, err := shim.Sandbox().UpdateSandbox(ctx, &api.UpdateSandboxRequest{SandboxID: id, Sandbox: of, Fields: fields})
		return err
	})
}

// Shutdown ends a sandbox and its shim, and removes all that there is of it but what the store has. It goes on when ctx ends
// before it is done.
func (c *Controller) Shutdown(ctx context.Context, id string) error {
	i, err := c.find(ctx, id)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	if err := c.background(func() { done <- c.shutdown(i) }); err != nil {
		return err
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("sandbox %s is being shut down: %w", id, ctx.Err())
	}
}

func (c *Controller) shutdown(i *instance) error {
	i.ending.Lock() // one at a time
	defer i.ending.Unlock()
	ctx, cancel := context.WithTimeout(namespaces.With(c.ctx, i.key.ns), cleaning)
	defer cancel()
	i.expectEnd()
	shim, _ := i.now()
	clean := false // the shim has taken everything away itself
	switch {
	case i.isGone():
		return fmt.Errorf("sandbox %s: %w", i.key.id, errdefs.ErrNotFound)
	case shim != nil:
		if err := shim.End(ctx); err != nil {
			return fmt.Errorf("cannot shut down sandbox %s: %w", i.key.id, err)
		}
		select {
		case <-i.followed:
			clean = shim.Own
		case <-time.After(ending):
			c.log.Warn("the shim of a sandbox does not end; killing it", "namespace", i.key.ns, "id", i.key.id)
			if err := shim.KillProcess(); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		case <-c.ctx.Done():
			return fmt.Errorf("the daemon is ending; the next one removes what is left of sandbox %s: %w", i.key.id, errdefs.ErrUnavailable)
		}
		shim.Close()
		shim.Forget()
	}
	if !clean {
		if _, err := c.shims.Cleanup(ctx, i.bundle); err != nil {
			return fmt.Errorf("cannot remove what is left of sandbox %s: %w", i.key.id, err)
		}
	}
	if err := i.bundle.Remove(); err != nil {
		return err
	}
	c.drop(i)
	return nil
}
