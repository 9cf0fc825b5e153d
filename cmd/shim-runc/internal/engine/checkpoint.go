package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine/criu"
)

// Checkpoint saves the processes of the container that came of its init. Frozen or not, the container is after it as it
// was before, unless it was to end.
func (c *Container) Checkpoint(ck criu.Checkpoint) error {
	fail := func(err error) error { return fmt.Errorf("cannot checkpoint container %s: %w", c.id, err) }
	if err := ck.Validate(); err != nil {
		return fail(err)
	}
	lc, err := c.load()
	if err != nil {
		return fail(err)
	}
	pids, err := lc.Processes()
	if err != nil {
		return fail(err)
	}
	labels := lc.Config().Labels
	annotations := map[string]string{}
	for _, l := range labels {
		if k, v, ok := strings.Cut(l, "="); ok {
			annotations[k] = v
		}
	}
	err = c.engine.cfg.Reaper.Guard(func() error {
		return ck.Run(pids, annotations, func(work string) error {
			relabel(labels, ck.Config)
			opts := criuOpts(ck.Options, ck.Images, work)
			opts.LeaveRunning = !ck.Exit
			return lc.Checkpoint(opts)
		})
	})
	if err != nil {
		return fail(err)
	}
	return nil
}

// relabel has criu read config. The labels are those of a value that was loaded for this checkpoint: they are not written
// back. There is always one that can be replaced: the bundle's, which nobody reads there.
func relabel(labels []string, config string) {
	at := 0
	for i, l := range labels {
		if strings.HasPrefix(l, criu.Annotation+"=") || at == 0 && strings.HasPrefix(l, "bundle=") {
			at = i
		}
		if strings.HasPrefix(l, criu.Annotation+"=") {
			break
		}
	}
	labels[at] = criu.Annotation + "=" + config
}

func criuOpts(o criu.Options, images, work string) *libcontainer.CriuOpts {
	opts := &libcontainer.CriuOpts{
		ImagesDirectory: images, WorkDirectory: work, TcpEstablished: o.OpenTCP, ExternalUnixConnections: o.ExternalUnixSockets,
		ShellJob: o.Terminal, FileLocks: o.FileLocks, ManageCgroupsMode: o.CgroupsMode, StatusFd: -1,
	}
	if len(o.EmptyNamespaces) > 0 {
		opts.EmptyNs = unix.CLONE_NEWNET
	}
	return opts
}

// Restore makes a container again from a checkpoint, running. The rootfs must be in place, as it was when the checkpoint
// was made. On an error nothing is left of it. Errors: as of Create, and those of criu.
func (e *Engine) Restore(ctx context.Context, id, bundle string, spec *specs.Spec, io IO, r criu.Restore) (*Container, error) {
	begin := time.Now()
	fail := func(err error) (*Container, error) {
		return nil, fmt.Errorf("cannot restore container %s: %w", id, err)
	}
	spec.Annotations = criu.Annotate(spec.Annotations, r.Config)
	config, err := e.config(id, bundle, spec)
	if err != nil {
		return fail(err)
	}
	done, err := EndedInput(&io, r)
	if err != nil {
		return fail(err)
	}
	defer done()
	lp, err := process(spec.Process)
	if err != nil {
		return fail(err)
	}
	c, err := libcontainer.Create(e.cfg.Root, id, config)
	switch {
	case errors.Is(err, libcontainer.ErrExist):
		return fail(fmt.Errorf("it is there already: %w", errdefs.ErrAlreadyExists))
	case errors.Is(err, libcontainer.ErrInvalidID):
		return fail(fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument))
	case err != nil:
		return fail(err)
	}
	proc, err := e.run(ctx, lp, io, func() error {
		return r.Run(spec.Annotations, func(o criu.Options, work string) error {
			return c.Restore(lp, criuOpts(o, r.Images, work))
		})
	})
	if err != nil {
		if derr := e.cfg.Reaper.Guard(c.Destroy); derr != nil {
			e.cfg.Log.Warn("cannot clean up after a failed restore", "id", id, "error", derr)
			_ = os.RemoveAll(filepath.Join(e.cfg.Root, id))
		}
		return fail(err)
	}
	e.cfg.OnPhase("restore", time.Since(begin))
	restored := &Container{id: id, engine: e, c: c, init: proc, sharedPID: SharesPID(spec), launcher: os.Args[0]}
	restored.released.Store(true)
	return restored, nil
}

// EndedInput gives a process without an input one that is at its end, if the checkpoint has one: the process goes on with
// what it had not read, and then comes to that. done is to be called when the process has it.
func EndedInput(io *IO, r criu.Restore) (done func(), err error) {
	if io.Stdin != nil || io.Console != nil || !r.Has("stdin") {
		return func() {}, nil
	}
	in, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	_ = out.Close()
	io.Stdin = in
	return func() { _ = in.Close() }, nil
}
