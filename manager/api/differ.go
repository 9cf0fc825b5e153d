package api

import (
	"context"
	"fmt"
	"time"

	api "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/peer"
)

// Differ applies and makes layers. NotImplemented means that another one is to try.
type Differ interface {
	Apply(ctx context.Context, r *api.ApplyRequest) (*api.ApplyResponse, error)
	Diff(ctx context.Context, r *api.DiffRequest) (*api.DiffResponse, error)
}

// patience is how long a layer may take in another program.
const patience = time.Hour

// ProxyDiffer is a Differ that another program serves. It finds the content through this daemon, as a client of it.
type ProxyDiffer struct {
	peer   *peer.Peer
	client api.DiffClient
}

// NewProxyDiffer uses p, which stays the caller's.
func NewProxyDiffer(p *peer.Peer) *ProxyDiffer { return &ProxyDiffer{p, api.NewDiffClient(p.Conn())} }

// Apply unpacks a layer.
func (d *ProxyDiffer) Apply(ctx context.Context, r *api.ApplyRequest) (resp *api.ApplyResponse, err error) {
	err = d.call(ctx, func(ctx context.Context) (err error) {
		resp, err = d.client.Apply(ctx, r)
		return err
	})
	return resp, err
}

// Diff makes a layer of what differs.
func (d *ProxyDiffer) Diff(ctx context.Context, r *api.DiffRequest) (resp *api.DiffResponse, err error) {
	err = d.call(ctx, func(ctx context.Context) (err error) {
		resp, err = d.client.Diff(ctx, r)
		return err
	})
	return resp, err
}

// ApplyLayer unpacks a layer for the daemon itself, and has it on disk.
func (d *ProxyDiffer) ApplyLayer(ctx context.Context, layer ocispec.Descriptor, mounts []*types.Mount) (ocispec.Descriptor, error) {
	r, err := d.Apply(ctx, &api.ApplyRequest{Diff: descriptorToWire(layer), Mounts: mounts, SyncFs: true})
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("cannot apply layer %s: %w", layer.Digest, err)
	}
	return descriptorFromWire(r.Applied), nil
}

func (d *ProxyDiffer) call(ctx context.Context, fn func(context.Context) error) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return err
	}
	return d.peer.Call(ctx, patience, func(ctx context.Context) error { return fn(namespaces.With(ctx, ns)) })
}

// inOrder asks one differ after the other.
func inOrder[R any](differs []Differ, ask func(Differ) (R, error)) (R, error) {
	var none R
	err := error(fmt.Errorf("there is no differ: %w", errdefs.ErrNotImplemented))
	for _, d := range differs {
		var r R
		if r, err = ask(d); err == nil {
			return r, nil
		}
		if !errdefs.IsNotImplemented(err) {
			break
		}
	}
	return none, toGRPC(err)
}
