package external

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/reaper"
)

// Load takes a container over that another incarnation of the shim made of bundle. init is its first process. The program
// knows the state; of a container whose init has ended, nobody knows the cgroup any more but the program.
func (e *Engine) Load(id, bundle string, init *reaper.Process, _ string) (*Container, engine.Found, error) {
	var found engine.Found
	fail := func(err error) (*Container, engine.Found, error) {
		return nil, found, fmt.Errorf("cannot load container %s: %w", id, err)
	}
	c := &Container{id: id, engine: e, init: init, sharedPID: true}
	if _, err := os.Stat(filepath.Join(e.cfg.Root, id)); errors.Is(err, os.ErrNotExist) {
		found.Removed = true
		return c, found, nil
	}
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return fail(err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return fail(err)
	}
	c.sharedPID = engine.SharesPID(&spec)
	var status string
	err = e.guarded(func(r *runc.Runc) error {
		st, err := r.State(context.Background(), id)
		if err == nil {
			status = st.Status
		}
		return err
	})
	if err != nil {
		return fail(err)
	}
	found.Parked, found.Paused = status == "created", status == "paused"
	c.started.Store(!found.Parked)
	c.paused.Store(found.Paused)
	if status != "stopped" {
		if c.cgroup, err = cgroups.Load(init.Pid()); err != nil {
			return fail(err)
		}
	}
	return c, found, nil
}
