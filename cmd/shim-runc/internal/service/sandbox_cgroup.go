package service

import (
	"context"
	"encoding/json"
	"fmt"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/protos/shimstate"
)

// makeCgroup makes the sandbox's cgroup, or sets the limits of the one that there is, which stays its maker's. path is where it
// is in each hierarchy.
func makeCgroup(asked string, limits *specs.LinuxResources) (path string, made bool, err error) {
	if engine.IsSlice(asked) {
		slice, err := engine.NewSlice(asked, limits)
		if err != nil {
			return "", false, err
		}
		if _, err := cgroups.AtPath(slice.Path()); err == nil {
			return slice.Path(), false, slice.Limit()
		}
		return slice.Path(), true, slice.Make()
	}
	if _, err := cgroups.Make(asked, limits); err == nil {
		return asked, true, nil
	} else if !errdefs.IsAlreadyExists(err) {
		return "", false, err
	}
	if limits == nil {
		return asked, false, nil
	}
	return asked, false, limitCgroup(asked, asked, limits)
}

// limitCgroup changes the limits of the cgroup that was asked for, and is at path.
func limitCgroup(asked, path string, limits *specs.LinuxResources) error {
	if engine.IsSlice(asked) { // systemd would take away what it does not know of
		slice, err := engine.NewSlice(asked, limits)
		if err != nil {
			return err
		}
		return slice.Limit()
	}
	cg, err := cgroups.AtPath(path)
	if err != nil {
		return err
	}
	return cg.Limit(limits)
}

// removeCgroup removes the cgroup that a sandbox has made.
func removeCgroup(record *shimstate.Sandbox) error {
	if !record.CgroupMade {
		return nil
	}
	var spec specs.Spec
	if err := json.Unmarshal(record.Spec, &spec); err == nil && spec.Linux != nil && engine.IsSlice(spec.Linux.CgroupsPath) {
		slice, err := engine.NewSlice(spec.Linux.CgroupsPath, nil)
		if err != nil {
			return err
		}
		return slice.Remove()
	}
	return cgroups.Remove(record.Cgroup)
}

// SandboxMetrics reads the counters of the sandbox's cgroup, in which those of its containers are to be.
func (b *Sandbox) SandboxMetrics(_ context.Context, r *api.SandboxMetricsRequest) (*api.SandboxMetricsResponse, error) {
	record, err := b.check(r.SandboxID, boxUse)
	if err != nil {
		return nil, fmt.Errorf("cannot read metrics: %w", err)
	}
	if record.Cgroup == "" {
		return nil, fmt.Errorf("sandbox %s has no cgroup: its spec has no linux.cgroupsPath: %w", b.cfg.ID, errdefs.ErrFailedPrecondition)
	}
	cg, err := cgroups.AtPath(record.Cgroup)
	if err != nil {
		return nil, fmt.Errorf("cannot read metrics of sandbox %s: %w", b.cfg.ID, err)
	}
	m, err := cg.Stats()
	if err != nil {
		return nil, err
	}
	data, err := anyOf(m)
	if err != nil {
		return nil, err
	}
	return &api.SandboxMetricsResponse{Metrics: &types.Metric{Timestamp: timestamppb.Now(), ID: b.cfg.ID, Data: data}}, nil
}
