package shimapi

import (
	"context"

	sandbox "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
)

// SandboxService is the name on the wire of the API of a shim that keeps a sandbox.
const SandboxService = "containerd.runtime.sandbox.v1.Sandbox"

// SandboxAPI is that API, as a shim implements it and as a client sees it.
type SandboxAPI = sandbox.TTRPCSandboxService

// Topics of the events of a sandbox, which carry SandboxCreate, SandboxStart and SandboxExit of containerd's package events.
const (
	TopicSandboxes     = "/sandboxes/" // how they all begin
	TopicSandboxCreate = "/sandboxes/create"
	TopicSandboxStart  = "/sandboxes/start"
	TopicSandboxExit   = "/sandboxes/exit"
)

// States of a sandbox in SandboxStatusResponse, in the words of the CRI.
const (
	SandboxReady    = "SANDBOX_READY"
	SandboxNotReady = "SANDBOX_NOTREADY"
)

// RegisterSandbox serves svc. Errors of svc go through ToWire.
func RegisterSandbox(srv *ttrpc.Server, svc SandboxAPI) {
	srv.RegisterService(SandboxService, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"CreateSandbox":   method(svc.CreateSandbox),
		"StartSandbox":    method(svc.StartSandbox),
		"Platform":        method(svc.Platform),
		"StopSandbox":     method(svc.StopSandbox),
		"WaitSandbox":     method(svc.WaitSandbox),
		"SandboxStatus":   method(svc.SandboxStatus),
		"PingSandbox":     method(svc.PingSandbox),
		"ShutdownSandbox": method(svc.ShutdownSandbox),
		"SandboxMetrics":  method(svc.SandboxMetrics),
		"UpdateSandbox":   method(svc.UpdateSandbox),
	}})
}

// sandboxClient calls a shim; its errors have been through FromWire.
type sandboxClient struct{ c *ttrpc.Client }

// Sandbox gives the sandbox API; a shim that keeps no sandbox answers NotImplemented.
func (c *Client) Sandbox() SandboxAPI { return sandboxClient{c.conn} }

func callSandbox[Resp any](ctx context.Context, s sandboxClient, name string, req any) (*Resp, error) {
	resp := new(Resp)
	if err := s.c.Call(ctx, SandboxService, name, req, resp); err != nil {
		return nil, FromWire(err)
	}
	return resp, nil
}

func (s sandboxClient) CreateSandbox(ctx context.Context, r *sandbox.CreateSandboxRequest) (*sandbox.CreateSandboxResponse, error) {
	return callSandbox[sandbox.CreateSandboxResponse](ctx, s, "CreateSandbox", r)
}

func (s sandboxClient) StartSandbox(ctx context.Context, r *sandbox.StartSandboxRequest) (*sandbox.StartSandboxResponse, error) {
	return callSandbox[sandbox.StartSandboxResponse](ctx, s, "StartSandbox", r)
}

func (s sandboxClient) Platform(ctx context.Context, r *sandbox.PlatformRequest) (*sandbox.PlatformResponse, error) {
	return callSandbox[sandbox.PlatformResponse](ctx, s, "Platform", r)
}

func (s sandboxClient) StopSandbox(ctx context.Context, r *sandbox.StopSandboxRequest) (*sandbox.StopSandboxResponse, error) {
	return callSandbox[sandbox.StopSandboxResponse](ctx, s, "StopSandbox", r)
}

func (s sandboxClient) WaitSandbox(ctx context.Context, r *sandbox.WaitSandboxRequest) (*sandbox.WaitSandboxResponse, error) {
	return callSandbox[sandbox.WaitSandboxResponse](ctx, s, "WaitSandbox", r)
}

func (s sandboxClient) SandboxStatus(ctx context.Context, r *sandbox.SandboxStatusRequest) (*sandbox.SandboxStatusResponse, error) {
	return callSandbox[sandbox.SandboxStatusResponse](ctx, s, "SandboxStatus", r)
}

func (s sandboxClient) PingSandbox(ctx context.Context, r *sandbox.PingRequest) (*sandbox.PingResponse, error) {
	return callSandbox[sandbox.PingResponse](ctx, s, "PingSandbox", r)
}

// ShutdownSandbox asks the shim to end. As with Shutdown, a closed connection is an answer.
func (s sandboxClient) ShutdownSandbox(ctx context.Context, r *sandbox.ShutdownSandboxRequest) (*sandbox.ShutdownSandboxResponse, error) {
	resp, err := callSandbox[sandbox.ShutdownSandboxResponse](ctx, s, "ShutdownSandbox", r)
	if errdefs.IsUnavailable(err) {
		return &sandbox.ShutdownSandboxResponse{}, nil
	}
	return resp, err
}

func (s sandboxClient) SandboxMetrics(ctx context.Context, r *sandbox.SandboxMetricsRequest) (*sandbox.SandboxMetricsResponse, error) {
	return callSandbox[sandbox.SandboxMetricsResponse](ctx, s, "SandboxMetrics", r)
}

func (s sandboxClient) UpdateSandbox(ctx context.Context, r *sandbox.UpdateSandboxRequest) (*sandbox.UpdateSandboxResponse, error) {
	return callSandbox[sandbox.UpdateSandboxResponse](ctx, s, "UpdateSandbox", r)
}
