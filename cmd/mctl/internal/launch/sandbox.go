package launch

import (
	"context"
	"encoding/json"
	"fmt"
	"path"
	"path/filepath"
	"slices"

	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/shimapi"
)

// joinSandbox makes a spec that of a member of the sandbox --sandbox: in its namespaces, with its /dev/shm, below its cgroup.
func (f *Flags) joinSandbox(ctx context.Context, c *client.Client, id string, s *specs.Spec) error {
	b, err := c.Sandboxes.Get(ctx, &sandboxapi.StoreGetRequest{SandboxID: f.Sandbox})
	if err != nil {
		return fmt.Errorf("--sandbox: %w; `mctl sandboxes ls` lists those there are", err)
	}
	r, err := c.SandboxController.Status(ctx, &sandboxapi.ControllerStatusRequest{SandboxID: f.Sandbox, Sandboxer: b.Sandbox.Sandboxer, Verbose: true})
	if err != nil {
		return fmt.Errorf("--sandbox: %w", err)
	}
	if r.State != shimapi.SandboxReady {
		return fmt.Errorf("--sandbox: sandbox %s is not ready: %w", f.Sandbox, errdefs.ErrFailedPrecondition)
	}
	var of specs.Spec
	if err := json.Unmarshal([]byte(r.Info["spec"]), &of); err != nil || of.Linux == nil {
		return fmt.Errorf("--sandbox: sandbox %s does not say what it holds: its runtime is not managerd's", f.Sandbox)
	}
	for _, ns := range of.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace && f.netHost {
			continue
		}
		if err := join(ns)(s); err != nil {
			return err
		}
		if ns.Type == specs.UTSNamespace && f.hostname == "" {
			s.Hostname = "" // it has the sandbox's
		}
	}
	for _, m := range of.Mounts {
		s.Mounts = slices.DeleteFunc(s.Mounts, func(have specs.Mount) bool {
			return filepath.Clean(have.Destination) == filepath.Clean(m.Destination)
		})
		s.Mounts = append(s.Mounts, m)
	}
	if of.Linux.CgroupsPath != "" && f.cgroup == "" && !f.runcSystemd {
		s.Linux.CgroupsPath = path.Join(of.Linux.CgroupsPath, id)
	}
	return nil
}
