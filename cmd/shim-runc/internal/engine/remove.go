package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// departing is how long an init may take to end whose shim died while it made it: it waits for that one's next word.
const departing = 5 * time.Second

// Remove ends and removes what is left of a container of bundle that nobody keeps any more (its shim died): its processes,
// cgroup and state. Nothing there is not an error.
func (e *Engine) Remove(id, bundle string) error {
	c, err := libcontainer.Load(e.cfg.Root, id)
	if errors.Is(err, libcontainer.ErrNotExist) {
		if err := e.removeHalf(id, bundle); err != nil {
			return fmt.Errorf("cannot remove the half-made container %s: %w", id, err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot load container %s: %w", id, err)
	}
	if err := killAll(c); err != nil {
		return fmt.Errorf("cannot kill container %s: %w", id, err)
	}
	if err := awaitStopped(c); err != nil {
		return fmt.Errorf("cannot remove container %s: %w", id, err)
	}
	if err := e.destroy(c); err != nil {
		return fmt.Errorf("cannot remove container %s: %w", id, err)
	}
	return nil
}

// removeHalf removes what a create that was cut off has left: a directory without state.json, and a cgroup. Its processes
// end by themselves, the pipe to their shim is broken. They are not killed: without a state nothing says that the cgroup,
// whose path the client chose, is not somebody else's; then it stays.
func (e *Engine) removeHalf(id, bundle string) error {
	dir := filepath.Join(e.cfg.Root, id)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil // it had not begun, or was removed before
	}
	if err := e.removeCgroup(id, bundle); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

func (e *Engine) removeCgroup(id, bundle string) error {
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var spec specs.Spec
	if err == nil {
		err = json.Unmarshal(data, &spec)
	}
	if err != nil {
		return err
	}
	if Check(bundle, &spec) != nil {
		return nil // nothing was made of such a spec
	}
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: id, UseSystemdCgroup: e.cfg.SystemdCgroup, Spec: &spec})
	if err != nil {
		return nil //nolint:nilerr // as above
	}
	m, err := manager.New(config.Cgroups)
	if err != nil || !m.Exists() {
		return err
	}
	deadline := time.Now().Add(departing)
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		pids, err := m.GetAllPids()
		if err != nil || len(pids) == 0 {
			break //nolint:nilerr // it is gone
		}
		if time.Now().After(deadline) {
			e.cfg.Log.Warn("a cgroup stays: it is in use", "id", id, "processes", pids)
			return nil
		}
		time.Sleep(wait) // a cgroup tells nobody when its last process has gone (v1)
	}
	return e.cfg.Reaper.Guard(m.Destroy)
}
