package shimtest

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi"
)

// sandboxCases are for shims that serve containerd.runtime.sandbox.v1.
var sandboxCases = []struct {
	name string
	run  func(*shim)
}{
	{"life", sandboxLifeCase},
	{"members", sandboxMembersCase},
	{"illegal", sandboxIllegalCase},
	{"shim killed", sandboxKilledCase},
}

// sandboxes tests the sandbox API in every form, if the shim has it.
func (s *suite) sandboxes(t *testing.T, forms []form) {
	served := false
	t.Run("sandbox announced", func(t *testing.T) {
		f := form{name: "sandbox", env: []string{"MAX_SHIM_VERSION=3"}, version: 3, sandbox: true}
		s.with(t, f, func(sh *shim) {
			_, err := request(sh.Sandbox().Platform, &api.PlatformRequest{SandboxID: sh.id})
			served = !errdefs.IsNotImplemented(err)
		})
	})
	if !served {
		t.Log("the shim does not serve the sandbox API")
		return
	}
	for _, f := range forms {
		f.sandbox = true
		t.Run("sandbox "+f.name, func(t *testing.T) {
			for _, c := range sandboxCases {
				t.Run(c.name, func(t *testing.T) { s.with(t, f, c.run) })
			}
		})
	}
}

// newSandboxSpec is a sandbox with ipc and uts.
func newSandboxSpec() *specs.Spec {
	return &specs.Spec{Version: "1.0.2", Hostname: "pod", Linux: &specs.Linux{
		Namespaces: []specs.LinuxNamespace{{Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}},
	}}
}

// startSandbox creates and starts it, and gives the spec that it was carried out with.
func (sh *shim) startSandbox() *specs.Spec {
	sh.t.Helper()
	_, err := request(sh.Sandbox().CreateSandbox, &api.CreateSandboxRequest{SandboxID: sh.id, BundlePath: sh.bundle})
	sh.must("CreateSandbox", err)
	r, err := request(sh.Sandbox().StartSandbox, &api.StartSandboxRequest{SandboxID: sh.id})
	sh.must("StartSandbox", err)
	sh.expect("sandbox/created at", !r.CreatedAt.AsTime().IsZero() && r.CreatedAt != nil, "StartSandbox answers %v", r)
	spec := &specs.Spec{}
	sh.must("spec of StartSandbox", json.Unmarshal(r.Spec.GetValue(), spec))
	return spec
}

func sandboxLifeCase(sh *shim) {
	spec := sh.startSandbox()
	for _, ns := range spec.Linux.Namespaces {
		var of, own unix.Stat_t
		err := unix.Stat(ns.Path, &of)
		sh.expect("sandbox/namespace", err == nil && unix.Stat("/proc/self/ns/"+string(ns.Type), &own) == nil && of.Ino != own.Ino,
			"the %s namespace is at %q: %v", ns.Type, ns.Path, err)
	}
	st, err := request(sh.Sandbox().SandboxStatus, &api.SandboxStatusRequest{SandboxID: sh.id, Verbose: true})
	sh.must("SandboxStatus", err)
	sh.expect("sandbox/ready", st.State == shimapi.SandboxReady, "state %q", st.State)
	_, err = request(sh.Sandbox().PingSandbox, &api.PingRequest{SandboxID: sh.id})
	sh.expect("sandbox/ping", err == nil, "PingSandbox: %v", err)
	p, err := request(sh.Sandbox().Platform, &api.PlatformRequest{SandboxID: sh.id})
	sh.expect("sandbox/platform", err == nil && p.Platform.GetOS() == "linux", "Platform: %v, %v", p, err)
	for range 2 { // the second finds it ended
		_, err = request(sh.Sandbox().StopSandbox, &api.StopSandboxRequest{SandboxID: sh.id, TimeoutSecs: 1})
		sh.expect("sandbox/stop", err == nil, "StopSandbox: %v", err)
	}
	w, err := request(sh.Sandbox().WaitSandbox, &api.WaitSandboxRequest{SandboxID: sh.id})
	sh.expect("sandbox/wait", err == nil && w.ExitStatus == 0 && !w.ExitedAt.AsTime().IsZero(), "WaitSandbox: %v, %v", w, err)
	st, err = request(sh.Sandbox().SandboxStatus, &api.SandboxStatusRequest{SandboxID: sh.id})
	sh.expect("sandbox/not ready", err == nil && st.State == shimapi.SandboxNotReady, "SandboxStatus: %v, %v", st, err)
	_, err = request(sh.Sandbox().PingSandbox, &api.PingRequest{SandboxID: sh.id})
	sh.expect("sandbox/ping ended", err != nil, "PingSandbox of one that has ended succeeds")
}

// sandboxMembersCase runs a container on the sandbox's connection.
func sandboxMembersCase(sh *shim) {
	of := sh.startSandbox()
	id := sh.id + "m"
	spec := newSpec(id, "sh", "-c", "test $(hostname) = pod && echo x > /dev/shm/x && exit 42")
	shared := map[specs.LinuxNamespaceType]bool{}
	for _, ns := range of.Linux.Namespaces {
		shared[ns.Type] = true
	}
	namespaces := of.Linux.Namespaces
	for _, ns := range spec.Linux.Namespaces {
		if !shared[ns.Type] {
			namespaces = append(namespaces, ns)
		}
	}
	spec.Linux.Namespaces, spec.Mounts = namespaces, append(spec.Mounts, of.Mounts...)
	bundle := filepath.Join(sh.dir, id)
	sh.must("bundle", os.MkdirAll(filepath.Join(bundle, shimapi.RootfsDir), 0o711))
	data, err := json.Marshal(spec)
	sh.must("spec", err)
	sh.must("bundle", os.WriteFile(filepath.Join(bundle, shimapi.ConfigFile), data, 0o600))
	sh.must("bundle", unix.Mkfifo(filepath.Join(bundle, shimapi.LogFIFO), 0o600))
	_, err = request(sh.Create, &task.CreateTaskRequest{ID: id, Bundle: bundle, Rootfs: sh.bind(), Options: sh.cfg.Options})
	sh.must("Create of a member", err)
	_, err = request(sh.Start, &task.StartRequest{ID: id})
	sh.must("Start of a member", err)
	w, err := request(sh.Wait, &task.WaitRequest{ID: id})
	sh.expect("sandbox/member", err == nil && w.ExitStatus == 42, "a member ended with %v, %v", w, err)
	for _, m := range of.Mounts {
		_, err := os.Stat(filepath.Join(m.Source, "x"))
		sh.expect("sandbox/shm", err == nil, "what a member wrote to /dev/shm is not there: %v", err)
	}
	_, err = request(sh.Delete, &task.DeleteRequest{ID: id})
	sh.expect("sandbox/member deleted", err == nil, "Delete of a member: %v", err)
	_, err = request(sh.Shutdown, &task.ShutdownRequest{ID: id})
	sh.expect("sandbox/member shut down", err == nil, "Shutdown behind a member: %v", err)
	_, err = request(sh.Sandbox().PingSandbox, &api.PingRequest{SandboxID: sh.id})
	sh.expect("sandbox/outlives members", err == nil, "PingSandbox: %v", err)
	sh.expect("left/mounts", len(mountsBelow(bundle)) == 0, "left: %v", mountsBelow(bundle))
}

func sandboxIllegalCase(sh *shim) {
	_, err := request(sh.Sandbox().StartSandbox, &api.StartSandboxRequest{SandboxID: sh.id})
	sh.expect("sandbox/start of nothing", errdefs.IsNotFound(err), "StartSandbox: %v", err)
	_, err = request(sh.Sandbox().SandboxStatus, &api.SandboxStatusRequest{SandboxID: sh.id})
	sh.expect("sandbox/status of nothing", errdefs.IsNotFound(err), "SandboxStatus: %v", err)
	_, err = request(sh.Sandbox().CreateSandbox, &api.CreateSandboxRequest{SandboxID: sh.id, BundlePath: sh.bundle, NetnsPath: "/proc/self/ns/uts"})
	sh.expect("sandbox/bad netns", errdefs.IsInvalidArgument(err) && strings.Contains(err.Error(), "/proc/self/ns/uts"), "CreateSandbox: %v", err)
	sh.startSandbox()
	_, err = request(sh.Sandbox().CreateSandbox, &api.CreateSandboxRequest{SandboxID: sh.id, BundlePath: sh.bundle})
	sh.expect("sandbox/created twice", errdefs.IsAlreadyExists(err), "CreateSandbox: %v", err)
	_, err = request(sh.State, &task.StateRequest{ID: "nobody"})
	sh.expect("sandbox/no such member", errdefs.IsNotFound(err), "State: %v", err)
}

// sandboxKilledCase: what a killed shim leaves, the verb delete takes away.
func sandboxKilledCase(sh *shim) {
	sh.startSandbox()
	sh.killShim()
	sh.deleteVerb()
	sh.expect("sandbox/delete verb", len(mountsBelow(sh.bundle)) == 0, "left: %v", mountsBelow(sh.bundle))
}
