package external

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine/criu"
)

// Checkpoint saves the processes of the container that came of its init. Frozen or not, the container is after it as it
// was before, unless it was to end.
func (c *Container) Checkpoint(ck criu.Checkpoint) error {
	fail := func(err error) error { return fmt.Errorf("cannot checkpoint container %s: %w", c.id, err) }
	if err := ck.Validate(); err != nil {
		return fail(err)
	}
	pids, err := c.Pids()
	if err != nil {
		return fail(err)
	}
	annotations, err := readAnnotations(ck.Bundle)
	if err != nil {
		return fail(err)
	}
	err = c.engine.cfg.Reaper.Guard(func() error {
		return ck.Run(pids, annotations, func(work string) error {
			var actions []runc.CheckpointAction
			if !ck.Exit {
				actions = append(actions, runc.LeaveRunning)
			}
			opts := checkpointOpts(ck.Options, ck.Images, work)
			return c.engine.call(func(r *runc.Runc, _ string) error {
				return r.Checkpoint(context.Background(), c.id, &opts, actions...)
			})
		})
	})
	if err != nil {
		return fail(err)
	}
	return nil
}

func checkpointOpts(o criu.Options, images, work string) runc.CheckpointOpts {
	return runc.CheckpointOpts{
		ImagePath: images, WorkDir: work, AllowOpenTCP: o.OpenTCP, AllowExternalUnixSockets: o.ExternalUnixSockets,
		AllowTerminal: o.Terminal, FileLocks: o.FileLocks, EmptyNamespaces: o.EmptyNamespaces, Cgroups: runc.CgroupMode(o.CgroupsMode),
	}
}

// Restore makes a container again from a checkpoint, running. On an error nothing is left of it.
func (e *Engine) Restore(ctx context.Context, id, bundle string, spec *specs.Spec, io engine.IO, r criu.Restore) (*Container, error) {
	begin := time.Now()
	fail := func(err error) (*Container, error) {
		return nil, fmt.Errorf("cannot restore container %s: %w", id, err)
	}
	if err := engine.Check(bundle, spec); err != nil {
		return fail(err)
	}
	if _, err := os.Stat(filepath.Join(e.cfg.Root, id)); err == nil {
		return fail(fmt.Errorf("it is there already: %w", errdefs.ErrAlreadyExists))
	}
	if err := os.MkdirAll(e.cfg.Root, 0o711); err != nil {
		return fail(err)
	}
	process := *spec.Process
	process.Terminal = io.Console != nil
	if err := rewrite(bundle, &process); err != nil {
		return fail(err)
	}
	annotations, err := readAnnotations(bundle)
	if err != nil {
		return fail(err)
	}
	done, err := engine.EndedInput(&io, r)
	if err != nil {
		return fail(err)
	}
	defer done()
	var tcp bool
	proc, err := e.launch(io, func(_ *runc.Runc, s *streams) error {
		return r.Run(annotations, func(o criu.Options, work string) error {
			tcp = o.OpenTCP
			return e.call(func(rc *runc.Runc, _ string) error { // with a log of its own: criu's is told behind what that says
				_, err := rc.Restore(ctx, id, bundle, &runc.RestoreOpts{
					CheckpointOpts: checkpointOpts(o, r.Images, work), IO: s, Detach: true, PidFile: s.pidFile, NoSubreaper: true,
					NoPivot: e.cfg.NoPivotRoot, ConsoleSocket: s.socket(),
				})
				return err
			})
		})
	})
	if err != nil {
		return fail(errors.Join(err, e.Remove(id, bundle)))
	}
	c := &Container{id: id, engine: e, init: proc, sharedPID: engine.SharesPID(spec)}
	c.started.Store(true)
	c.cgroup, err = cgroups.Load(proc.Pid())
	if netns := networkPath(spec); err == nil && tcp && netns != "" {
		err = e.cfg.Reaper.Guard(func() error { return criu.Unlock(netns) })
	}
	if err != nil {
		_ = proc.Signal(9)
		<-proc.Done()
		return fail(errors.Join(err, e.Remove(id, bundle)))
	}
	e.cfg.OnPhase("restore", time.Since(begin))
	return c, nil
}

// networkPath is where the network namespace is that a container joins; empty: it has one of its own, or the machine's.
func networkPath(spec *specs.Spec) string {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			return ns.Path
		}
	}
	return ""
}
