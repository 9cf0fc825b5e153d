package api

import (
	"context"
	"strings"
	"sync"

	"google.golang.org/grpc"

	"github.com/managerd/managerd/manager/fsck"
	api "github.com/managerd/managerd/protos/manager/v1"
)

// Fsck serves managerd.v1.Fsck.
type Fsck struct {
	api.UnimplementedFsckServer
	checker *fsck.Checker
	one     sync.Mutex // what one repairs another must not be looking at
}

// NewFsck serves c.
func NewFsck(c *fsck.Checker) *Fsck { return &Fsck{checker: c} }

// Register adds the service to a server.
func (a *Fsck) Register(s *grpc.Server) { api.RegisterFsckServer(s, a) }

// Check finds orphans, and fixes them if that is asked for.
func (a *Fsck) Check(ctx context.Context, r *api.CheckRequest) (*api.CheckResponse, error) {
	a.one.Lock()
	defer a.one.Unlock()
	found, err := a.checker.Run(ctx, fsck.Options{Fix: r.Fix, Objects: r.Objects, Older: r.Older.AsDuration(), FIFOs: r.Fifos})
	resp := &api.CheckResponse{}
	if err != nil {
		resp.Incomplete = strings.Split(err.Error(), "\n")
	}
	for _, o := range found {
		w := &api.Orphan{Kind: o.Kind, Object: o.Object, Owner: o.Owner, Problem: o.Problem, Command: o.Command, Fixed: o.Fixed}
		if o.Err != nil {
			w.Error = o.Err.Error()
		}
		resp.Orphans = append(resp.Orphans, w)
	}
	return resp, nil
}
