package api

import (
	"context"
	"fmt"
	"time"

	api "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/manager/sandboxes"
)

// SandboxStore serves containerd.services.sandbox.v1.Store.
type SandboxStore struct {
	api.UnimplementedStoreServer
	store *sandboxes.Store
}

// NewSandboxStore serves store.
func NewSandboxStore(store *sandboxes.Store) *SandboxStore { return &SandboxStore{store: store} }

// Register adds the service to a server.
func (a *SandboxStore) Register(s *grpc.Server) { api.RegisterStoreServer(s, a) }

func sandboxToWire(b sandboxes.Sandbox) *types.Sandbox {
	return &types.Sandbox{
		SandboxID: b.ID, Runtime: &types.Sandbox_Runtime{Name: b.Runtime.Name, Options: b.Runtime.Options}, Spec: b.Spec, Labels: b.Labels,
		CreatedAt: timestamppb.New(b.CreatedAt), UpdatedAt: timestamppb.New(b.UpdatedAt), Extensions: b.Extensions, Sandboxer: b.Sandboxer,
	}
}

func sandboxFromWire(b *types.Sandbox) sandboxes.Sandbox {
	return sandboxes.Sandbox{
		ID: b.GetSandboxID(), Runtime: sandboxes.Runtime{Name: b.GetRuntime().GetName(), Options: b.GetRuntime().GetOptions()},
		Spec: b.GetSpec(), Labels: b.GetLabels(), Extensions: b.GetExtensions(), Sandboxer: b.GetSandboxer(),
	}
}

func noSandbox() error {
	return toGRPC(fmt.Errorf("no sandbox given: %w", errdefs.ErrInvalidArgument))
}

// Create adds a sandbox.
func (a *SandboxStore) Create(ctx context.Context, r *api.StoreCreateRequest) (*api.StoreCreateResponse, error) {
	if r.Sandbox == nil {
		return nil, noSandbox()
	}
	b, err := a.store.Create(ctx, sandboxFromWire(r.Sandbox))
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.StoreCreateResponse{Sandbox: sandboxToWire(b)}, nil
}

// Update changes a sandbox.
func (a *SandboxStore) Update(ctx context.Context, r *api.StoreUpdateRequest) (*api.StoreUpdateResponse, error) {
	if r.Sandbox == nil {
		return nil, noSandbox()
	}
	b, err := a.store.Update(ctx, sandboxFromWire(r.Sandbox), r.Fields...)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.StoreUpdateResponse{Sandbox: sandboxToWire(b)}, nil
}

// Delete removes a sandbox.
func (a *SandboxStore) Delete(ctx context.Context, r *api.StoreDeleteRequest) (*api.StoreDeleteResponse, error) {
	return &api.StoreDeleteResponse{}, toGRPC(a.store.Delete(ctx, r.SandboxID))
}

// List gives the sandboxes that match.
func (a *SandboxStore) List(ctx context.Context, r *api.StoreListRequest) (*api.StoreListResponse, error) {
	f, err := filters.ParseAll(r.Filters...)
	if err != nil {
		return nil, toGRPC(err)
	}
	all, err := a.store.List(ctx, f)
	if err != nil {
		return nil, toGRPC(err)
	}
	resp := &api.StoreListResponse{}
	for _, b := range all {
		resp.List = append(resp.List, sandboxToWire(b))
	}
	return resp, nil
}

// Get finds a sandbox.
func (a *SandboxStore) Get(ctx context.Context, r *api.StoreGetRequest) (*api.StoreGetResponse, error) {
	b, err := a.store.Get(ctx, r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.StoreGetResponse{Sandbox: sandboxToWire(b)}, nil
}

// SandboxController serves containerd.services.sandbox.v1.Controller.
type SandboxController struct {
	api.UnimplementedControllerServer
	c *sandboxes.Controller
}

// NewSandboxController serves c.
func NewSandboxController(c *sandboxes.Controller) *SandboxController {
	return &SandboxController{c: c}
}

// Register adds the service to a server.
func (a *SandboxController) Register(s *grpc.Server) { api.RegisterControllerServer(s, a) }

// known checks the name of the controller; none means ours.
func known(sandboxer string) error {
	if sandboxer != "" && sandboxer != sandboxes.Sandboxer {
		return toGRPC(fmt.Errorf("sandboxer %q is not known, %q is: %w", sandboxer, sandboxes.Sandboxer, errdefs.ErrNotFound))
	}
	return nil
}

// Create makes a sandbox.
func (a *SandboxController) Create(ctx context.Context, r *api.ControllerCreateRequest) (*api.ControllerCreateResponse, error) {
	if err := known(r.Sandboxer); err != nil {
		return nil, err
	}
	req := sandboxes.CreateRequest{ID: r.SandboxID, Rootfs: r.Rootfs, Options: r.Options, NetNS: r.NetnsPath, Annotations: r.Annotations}
	if r.Sandbox != nil {
		b := sandboxFromWire(r.Sandbox)
		if b.ID == "" {
			b.ID = r.SandboxID
		}
		req.Sandbox = &b
	}
	if err := a.c.Create(ctx, req); err != nil {
		return nil, toGRPC(err)
	}
	return &api.ControllerCreateResponse{SandboxID: r.SandboxID}, nil
}

// Start starts one that was created.
func (a *SandboxController) Start(ctx context.Context, r *api.ControllerStartRequest) (*api.ControllerStartResponse, error) {
	if err := known(r.Sandboxer); err != nil {
		return nil, err
	}
	s, err := a.c.Start(ctx, r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.ControllerStartResponse{
		SandboxID: r.SandboxID, Pid: s.Pid, CreatedAt: s.CreatedAt, Spec: s.Spec, Address: s.Address, Version: s.Version,
	}, nil
}

// Platform says what the containers run on.
func (a *SandboxController) Platform(ctx context.Context, r *api.ControllerPlatformRequest) (*api.ControllerPlatformResponse, error) {
	if err := known(r.Sandboxer); err != nil {
		return nil, err
	}
	p, err := a.c.Platform(ctx, r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.ControllerPlatformResponse{Platform: p}, nil
}

// Stop ends a sandbox.
func (a *SandboxController) Stop(ctx context.Context, r *api.ControllerStopRequest) (*api.ControllerStopResponse, error) {
	if err := known(r.Sandboxer); err != nil {
		return nil, err
	}
	return &api.ControllerStopResponse{}, toGRPC(a.c.Stop(ctx, r.SandboxID, time.Duration(r.TimeoutSecs)*time.Second))
}

// Wait answers when a sandbox has ended.
func (a *SandboxController) Wait(ctx context.Context, r *api.ControllerWaitRequest) (*api.ControllerWaitResponse, error) {
	if err := known(r.Sandboxer); err != nil {
		return nil, err
	}
	status, at, err := a.c.Wait(ctx, r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.ControllerWaitResponse{ExitStatus: status, ExitedAt: at}, nil
}

// Status says how a sandbox is.
func (a *SandboxController) Status(ctx context.Context, r *api.ControllerStatusRequest) (*api.ControllerStatusResponse, error) {
	if err := known(r.Sandboxer); err != nil {
		return nil, err
	}
	s, err := a.c.Status(ctx, r.SandboxID, r.Verbose)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.ControllerStatusResponse{
		SandboxID: r.SandboxID, Pid: s.Pid, State: s.State, Info: s.Info, CreatedAt: s.CreatedAt, ExitedAt: s.ExitedAt, Extra: s.Extra,
		Address: s.Address, Version: s.Version,
	}, nil
}

// Shutdown ends a sandbox and its shim.
func (a *SandboxController) Shutdown(ctx context.Context, r *api.ControllerShutdownRequest) (*api.ControllerShutdownResponse, error) {
	if err := known(r.Sandboxer); err != nil {
		return nil, err
	}
	return &api.ControllerShutdownResponse{}, toGRPC(a.c.Shutdown(ctx, r.SandboxID))
}

// Metrics reads a sandbox's counters.
func (a *SandboxController) Metrics(ctx context.Context, r *api.ControllerMetricsRequest) (*api.ControllerMetricsResponse, error) {
	if err := known(r.Sandboxer); err != nil {
		return nil, err
	}
	m, err := a.c.Metrics(ctx, r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.ControllerMetricsResponse{Metrics: m}, nil
}

// Update has a running sandbox follow its record.
func (a *SandboxController) Update(ctx context.Context, r *api.ControllerUpdateRequest) (*api.ControllerUpdateResponse, error) {
	if err := known(r.Sandboxer); err != nil {
		return nil, err
	}
	return &api.ControllerUpdateResponse{}, toGRPC(a.c.Update(ctx, r.SandboxID, r.Sandbox, r.Fields))
}
