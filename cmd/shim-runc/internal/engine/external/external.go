// Package external runs OCI containers with another program: crun, a distribution's runc, nvidia-container-runtime, any
// that understands runc's command line. It is an engine like the one in package engine, and knows no libcontainer.
//
// What the program starts becomes our child when the program ends (we are a subreaper). Each call that starts a process
// therefore runs under the reaper's fork guard until that process is registered: nobody else can have waited for it.
package external

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/cgroups"
	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// Engine makes containers with one program.
type Engine struct {
	cfg    engine.Config
	clamp  engine.Clamp
	binary string // absolute path
}

// New gives an engine that runs binary: a path, or a name to look for in PATH. FailedPrecondition names one that is
// missing.
func New(cfg engine.Config, binary string) (*Engine, error) {
	path, err := find(binary)
	if err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.OnPhase == nil {
		cfg.OnPhase = func(string, time.Duration) {}
	}
	return &Engine{cfg: cfg, clamp: engine.NewClamp(cfg.Log), binary: path}, nil
}

// find gives the absolute path of a program, or FailedPrecondition with its name.
func find(binary string) (string, error) {
	path, err := exec.LookPath(binary)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", fmt.Errorf("cannot run runtime %q (the runtime option BinaryName): %w: %w", binary, err, errdefs.ErrFailedPrecondition)
	}
	return path, nil
}

// scratch is a directory for the files of one call: the pid file, the log, the console socket.
func scratch() (dir string, remove func(), err error) {
	dir, err = os.MkdirTemp("", "shim") // short: a socket's name has 107 bytes
	return dir, func() { _ = os.RemoveAll(dir) }, err
}

// call runs one command of the program. What went wrong is in its log, in its own words.
func (e *Engine) call(fn func(r *runc.Runc, dir string) error) error {
	dir, remove, err := scratch()
	if err != nil {
		return err
	}
	defer remove()
	log := filepath.Join(dir, "log.json")
	err = fn(&runc.Runc{Command: e.binary, Root: e.cfg.Root, Log: log, LogFormat: runc.JSON, SystemdCgroup: e.cfg.SystemdCgroup}, dir)
	if err == nil {
		return nil
	}
	return e.failure(err, log)
}

// guarded is call for what starts no process that stays.
func (e *Engine) guarded(fn func(r *runc.Runc) error) error {
	return e.cfg.Reaper.Guard(func() error {
		return e.call(func(r *runc.Runc, _ string) error { return fn(r) })
	})
}

// failure is the last error in the program's log, or err if it wrote none, with its kind.
func (e *Engine) failure(err error, log string) error {
	data, _ := os.ReadFile(log)
	said, _, _ := strings.Cut(lastError(data), "\nlog file: ") // of criu: where it is kept says package criu
	if said == "" {
		return fmt.Errorf("%s: %w", filepath.Base(e.binary), err)
	}
	lower := strings.ToLower(said)
	for _, mark := range []string{
		"executable file", "no such file or directory", "permission denied", "is a directory", "not a directory", "exec format error",
	} {
		if strings.Contains(lower, mark) && strings.Contains(lower, "exec") {
			return fmt.Errorf("%s: %s: %w", filepath.Base(e.binary), said, errdefs.ErrInvalidArgument)
		}
	}
	return fmt.Errorf("%s: %s", filepath.Base(e.binary), said)
}

// lastError finds the message of the last line of level error in a log of JSON lines; lines that are none are skipped.
func lastError(log []byte) (said string) {
	for _, line := range strings.Split(string(log), "\n") {
		var l struct{ Level, Msg string }
		if json.Unmarshal([]byte(line), &l) == nil && l.Level == "error" && l.Msg != "" {
			said = strings.TrimSpace(l.Msg)
		}
	}
	return said
}

// Create makes a container whose init is parked before the user's program. On an error nothing is left of it. The
// program reads the bundle's config.json itself; only what rewrite says is brought in line there.
func (e *Engine) Create(ctx context.Context, id, bundle string, spec *specs.Spec, io engine.IO) (*Container, error) {
	begin := time.Now()
	fail := func(err error) (*Container, error) { return nil, fmt.Errorf("cannot create container %s: %w", id, err) }
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
	process.Terminal, process.Rlimits = io.Console != nil, slices.Clone(process.Rlimits)
	e.clamp.Process(&process)
	if err := rewrite(bundle, &process); err != nil {
		return fail(err)
	}
	failpoint.Hit("external.create.rewritten")
	proc, err := e.launch(io, func(r *runc.Runc, s *streams) error {
		return r.Create(ctx, id, bundle, &runc.CreateOpts{
			IO: s, PidFile: s.pidFile, ConsoleSocket: s.socket(), NoPivot: e.cfg.NoPivotRoot, NoNewKeyring: e.cfg.NoNewKeyring,
		})
	})
	if err != nil {
		if _, serr := os.Stat(filepath.Join(e.cfg.Root, id)); serr == nil {
			if derr := e.Remove(id, bundle); derr != nil {
				e.cfg.Log.Warn("cannot clean up after a failed create", "id", id, "error", derr)
				_ = os.RemoveAll(filepath.Join(e.cfg.Root, id))
			}
		}
		return fail(err)
	}
	failpoint.Hit("external.create.made")
	c := &Container{id: id, engine: e, init: proc, sharedPID: engine.SharesPID(spec)}
	c.cgroup, err = cgroups.Load(proc.Pid())
	if err != nil {
		_ = proc.Signal(9)
		<-proc.Done()
		return fail(errors.Join(err, e.Remove(id, bundle)))
	}
	e.cfg.OnPhase("create.init", time.Since(begin))
	return c, nil
}

// launch runs a command that leaves a process behind, and registers that.
func (e *Engine) launch(io engine.IO, fn func(r *runc.Runc, s *streams) error) (*reaper.Process, error) {
	var master *os.File
	proc, err := e.cfg.Reaper.Fork(func() (pid int, err error) {
		err = e.call(func(r *runc.Runc, dir string) error {
			s, err := newStreams(io, dir)
			if err != nil {
				return err
			}
			defer s.close()
			if err := fn(r, s); err != nil {
				return err
			}
			failpoint.Hit("external.launched")
			data, err := os.ReadFile(s.pidFile)
			if err != nil {
				return fmt.Errorf("it wrote no pid file: %w", err)
			}
			if pid, err = strconv.Atoi(strings.TrimSpace(string(data))); err != nil {
				return fmt.Errorf("it wrote a pid file that is no number: %w", err)
			}
			master, err = s.master()
			return err
		})
		return pid, err
	})
	if err != nil || io.Console == nil {
		return proc, err
	}
	if err := io.Console(master); err != nil {
		_ = proc.Signal(9)
		<-proc.Done()
		return nil, fmt.Errorf("cannot set up the terminal: %w", err)
	}
	return proc, nil
}

// Remove ends and removes what is left of a container that nobody keeps any more (its shim died). Nothing there is not
// an error.
func (e *Engine) Remove(id, _ string) error {
	dir := filepath.Join(e.cfg.Root, id)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	err := e.guarded(func(r *runc.Runc) error {
		// What shares our pid namespace outlives its init.
		if st, err := r.State(context.Background(), id); err == nil && st.Pid > 0 {
			if cg, err := cgroups.Load(st.Pid); err == nil {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				if err := cg.Kill(ctx); err != nil {
					return err
				}
			}
		}
		return r.Delete(context.Background(), id, &runc.DeleteOpts{Force: true})
	})
	if err != nil {
		return fmt.Errorf("cannot remove container %s: %w", id, err)
	}
	failpoint.Hit("external.removed")
	return nil
}
