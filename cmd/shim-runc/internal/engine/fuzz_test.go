package engine

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// FuzzSpec: whatever spec a bundle has, it becomes a configuration or is an invalid argument. A panic would take the shim
// away while it creates.
func FuzzSpec(f *testing.F) {
	whole, err := json.Marshal(testSpec("c", "true"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	const head = `{"root":{"path":"rootfs"},"process":{"args":["true"],"cwd":"/"},`
	for _, rest := range []string{
		`"linux":{}}`,
		`"linux":{"resources":{"devices":[{"allow":true}]}}}`,
		`"linux":{"resources":{"memory":{},"cpu":{},"pids":{},"blockIO":{"weightDevice":[{}],"throttleReadBpsDevice":[{}]},"network":{},"hugepageLimits":[{}],"rdma":{"x":{}},"unified":{"":""}}}}`,
		`"linux":{"seccomp":{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{}],"architectures":["X"]}}}`,
		`"linux":{"namespaces":[{"type":"user"},{"type":"user"}],"uidMappings":[{}],"timeOffsets":{"x":{}}}}`,
		`"linux":{"devices":[{}],"intelRdt":{},"personality":{},"mountLabel":"x","rootfsPropagation":"x","sysctl":{"":""}}}`,
		`"linux":{},"mounts":[{}]}`,
		`"linux":{},"mounts":[{"destination":"/x","options":["idmap"],"uidMappings":[{}]}]}`,
		`"linux":{},"hooks":{"prestart":[{}],"createRuntime":[{}],"poststop":[{}]}}`,
		`"linux":{},"annotations":{"":""},"hostname":"h","domainname":"d"}`,
		`"linux":{"cgroupsPath":"a:b:c:d"}}`,
	} {
		f.Add([]byte(head + rest))
	}
	f.Add([]byte(`{"process":{"args":["true"],"cwd":"/","user":{"additionalGids":[1]},"rlimits":[{}],"scheduler":{},"ioPriority":{},"execCPUAffinity":{"initial":"x"},"capabilities":{}},"root":{"path":"rootfs"},"linux":{}}`))
	bundle := f.TempDir()
	if err := os.Mkdir(filepath.Join(bundle, "rootfs"), 0o755); err != nil {
		f.Fatal(err)
	}
	e := New(Config{Root: filepath.Join(bundle, "runc"), Reaper: reap})
	f.Fuzz(func(t *testing.T, data []byte) {
		var spec specs.Spec
		if json.Unmarshal(data, &spec) != nil {
			return // the service's to refuse
		}
		config, err := e.config("c", bundle, &spec)
		if err == nil {
			_, err = process(spec.Process)
		}
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v is not an invalid argument", err)
		}
		if err == nil && config.Rootfs == "" {
			t.Error("a container without a rootfs")
		}
	})
}
