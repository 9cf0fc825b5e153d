package service

import (
	"context"
	"encoding/json"
	"fmt"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/cmd/shim-runc/internal/sandbox"
	"github.com/managerd/managerd/protos/shimstate"
)

// UpdateSandbox carries out what has changed in the sandbox's spec: hostname, sysctls, and the limits of its cgroup. What else
// is in it cannot change; labels and extensions mean nothing to a shim.
func (b *Sandbox) UpdateSandbox(_ context.Context, r *api.UpdateSandboxRequest) (*api.UpdateSandboxResponse, error) {
	b.transition.Lock()
	defer b.transition.Unlock()
	record, err := b.check(r.SandboxID, boxUse)
	//lint:ignore SA1019 what is sent is not passed over
	if err == nil && r.Resources != nil {
		err = fmt.Errorf("resources are to be in the spec of the sandbox: %w", errdefs.ErrInvalidArgument)
	}
	if err == nil {
		err = b.update(&record, r)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot update sandbox %s: %w", r.SandboxID, err)
	}
	return &api.UpdateSandboxResponse{}, nil
}

func (b *Sandbox) update(record *shimstate.Sandbox, r *api.UpdateSandboxRequest) error {
	if !changesSpec(r.Fields) || r.Sandbox.GetSpec() == nil {
		return nil
	}
	var now, want specs.Spec
	if err := json.Unmarshal(record.Spec, &now); err != nil {
		return err
	}
	if err := json.Unmarshal(r.Sandbox.Spec.Value, &want); err != nil {
		return fmt.Errorf("malformed spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	change, err := sandbox.Compare(&now, &want)
	if err != nil {
		return err
	}
	if limits := change.Limits; limits != nil {
		if record.Cgroup == "" {
			return fmt.Errorf("linux.resources: it has no cgroup, for its spec had no linux.cgroupsPath: %w", errdefs.ErrFailedPrecondition)
		}
		if err := limitCgroup(now.Linux.CgroupsPath, record.Cgroup, limits); err != nil {
			return err
		}
	}
	if err := change.Apply(b.cfg.Bundle); err != nil {
		return err
	}
	carried, err := json.Marshal(change.Spec)
	if err != nil {
		return err
	}
	b.state.Lock()
	b.record.Spec = carried
	b.state.Unlock()
	return b.keepSandbox()
}

// changesSpec says whether the fields of an update, none of them meaning all, name the spec.
func changesSpec(fields []string) bool {
	for _, f := range fields {
		if f == "spec" {
			return true
		}
	}
	return len(fields) == 0
}
