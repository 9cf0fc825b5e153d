package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/reaper"
)

// Found is how a container was found that another incarnation of this program made.
type Found struct {
	Removed bool // Destroy was done: there is no state of it any more
	Parked  bool // init waits for Start
	Paused  bool
	// Cgroup has the directory of each controller by its name on cgroup v1, and of the cgroup under the empty name on v2.
	Cgroup map[string]string
}

// Load takes a container over from another incarnation of this program, which made it of bundle. init is its first process,
// and launcher argv[0] of the one that forked it.
func (e *Engine) Load(id, bundle string, init *reaper.Process, launcher string) (*Container, Found, error) {
	c := &Container{id: id, engine: e, init: init, sharedPID: true, launcher: launcher}
	lc, err := libcontainer.Load(e.cfg.Root, id)
	if errors.Is(err, libcontainer.ErrNotExist) {
		return c, Found{Removed: true}, nil
	}
	if err != nil {
		return nil, Found{}, fmt.Errorf("cannot load state of container %s: %w", id, err)
	}
	c.c = lc
	config := lc.Config()
	c.sharedPID = !config.Namespaces.IsPrivate(configs.NEWPID)
	var found Found
	status, err := lc.Status()
	if err != nil {
		return nil, found, fmt.Errorf("cannot find out the status of container %s: %w", id, err)
	}
	found.Paused = status == libcontainer.Paused
	fifo := filepath.Join(e.cfg.Root, id, "exec.fifo")
	if _, err := os.Lstat(fifo); err == nil {
		if found.Parked = !c.executed(init); !found.Parked {
			_ = os.Remove(fifo) // libcontainer takes the container for a parked one by it
		}
	}
	if found.Parked { // Start is still to come, and the hooks of its time
		if c.poststart, err = e.poststart(id, bundle); err != nil {
			return nil, found, fmt.Errorf("cannot load hooks of container %s: %w", id, err)
		}
	}
	c.released.Store(!found.Parked)
	if st, err := lc.State(); err == nil {
		found.Cgroup = st.CgroupPaths
	}
	return c, found, nil
}

// poststart reads the hooks that run at Start from the bundle's config.json: libcontainer's state does not have them.
func (e *Engine) poststart(id, bundle string) (configs.HookList, error) {
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, err
	}
	var spec specs.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return nil, err
	}
	if spec.Hooks == nil || len(spec.Hooks.Poststart) == 0 {
		return nil, nil
	}
	config, err := e.convert(id, bundle, &spec)
	if err != nil {
		return nil, err
	}
	return config.Hooks[configs.Poststart], nil
}
