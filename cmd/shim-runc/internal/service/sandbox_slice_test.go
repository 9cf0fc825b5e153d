package service_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
)

// TestSandboxSlice: with a path in systemd's form the sandbox's cgroup is a slice, whose limits outlast systemd's reload and the
// shim, and which goes with the sandbox. Without systemd it is refused, and nothing is left.
func TestSandboxSlice(t *testing.T) {
	limit := int64(64)
	spec := boxSpec(utsNS)
	spec.Linux.CgroupsPath = "system.slice:managerd:test-pod"
	spec.Linux.Resources = &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &limit}}
	b := serveBox(t, "sliced", spec)
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		if err := b.createBox(nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "needs systemd, which does not run here") {
			t.Errorf("create: %v", err)
		}
		if left := mountsIn(b.dir); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		return
	}
	b.startBox()
	const slice = `system.slice/system-managerd.test\x2dpod.slice`
	limits := func() string {
		t.Helper()
		for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/pids"} {
			if data, err := os.ReadFile(filepath.Join(dir, slice, "pids.max")); err == nil {
				return strings.TrimSpace(string(data))
			}
		}
		return "none"
	}
	reload := func() {
		t.Helper()
		if out, err := exec.Command("systemctl", "daemon-reload").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	reload()
	if got := limits(); got != "64" {
		t.Errorf("limit %s", got)
	}
	b.succeed()
	limit = 65
	data, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Sandbox().UpdateSandbox(ctx, &api.UpdateSandboxRequest{
		SandboxID: "sliced", Sandbox: &types.Sandbox{SandboxID: "sliced", Spec: &anypb.Any{Value: data}},
	}); err != nil {
		t.Error(err)
	}
	reload()
	if got := limits(); got != "65" {
		t.Errorf("limit %s", got)
	}
	r, err := b.Sandbox().SandboxMetrics(ctx, &api.SandboxMetricsRequest{SandboxID: "sliced"})
	if err != nil || len(r.Metrics.GetData().GetValue()) == 0 {
		t.Errorf("metrics: %v, %v", r, err)
	}
	if _, err := b.Sandbox().ShutdownSandbox(ctx, &api.ShutdownSandboxRequest{SandboxID: "sliced"}); err != nil {
		t.Error(err)
	}
	if got := limits(); got != "none" {
		t.Errorf("the slice is left, its limit is %s", got)
	}
}
