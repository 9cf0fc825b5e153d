package engine

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer/specconv"

	"github.com/managerd/managerd/cgroups"
)

// TestRemoveHalf: of a create that was cut off before there was a state, the cgroup goes as well, or the next create of that
// name would find it in use.
func TestRemoveHalf(t *testing.T) {
	f := newFixture(t)
	const id = "half"
	spec := testSpec(id, "true")
	data, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(f.bundle, "config.json"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: id, Spec: spec})
	if err != nil {
		t.Fatal(err)
	}
	m, err := manager.New(config.Cgroups)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Apply(-1); err != nil {
		t.Fatal(err)
	}
	if len(leftCgroups(cgroups.Root)) == 0 {
		t.Fatal("no cgroup was made")
	}
	if err := os.MkdirAll(filepath.Join(f.root, id), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := f.Remove(id, f.bundle); err != nil {
			t.Error(err)
		}
	}
	if left := leftCgroups(cgroups.Root); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	if _, err := os.Stat(filepath.Join(f.root, id)); !os.IsNotExist(err) {
		t.Errorf("the state directory is left: %v", err)
	}
}
