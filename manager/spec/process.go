package spec

import (
	"fmt"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Image takes from an image's config what its containers have: environment (over what is there), working directory,
// user and program. args, if any, take the place of Cmd and follow Entrypoint. Nothing to run is an error. config may
// be nil: an image that says nothing.
//
// The user stays as the image words it, in Process.User.Username, until User (or the end of New) looks it up.
func Image(config *ocispec.ImageConfig, args []string) Option {
	if config == nil {
		config = &ocispec.ImageConfig{}
	}
	return func(s *specs.Spec) error {
		run := slices.Concat(config.Entrypoint, args)
		if len(args) == 0 {
			run = slices.Concat(config.Entrypoint, config.Cmd)
		}
		if len(run) == 0 {
			return fmt.Errorf("nothing to run: the image has neither entrypoint nor command, and no arguments were given: %w", errdefs.ErrInvalidArgument)
		}
		if err := Apply(s, Args(run...), Env(config.Env...)); err != nil {
			return fmt.Errorf("image config: %w", err)
		}
		if config.WorkingDir != "" {
			// Old images have relative ones; they mean below the root.
			if err := Cwd(path.Join("/", config.WorkingDir))(s); err != nil {
				return fmt.Errorf("image config: %w", err)
			}
		}
		if config.User != "" {
			process(s).User = specs.User{Umask: process(s).User.Umask, Username: config.User}
		}
		return nil
	}
}

// Args sets the program and its arguments.
func Args(args ...string) Option {
	return func(s *specs.Spec) error {
		if len(args) == 0 || args[0] == "" {
			return fmt.Errorf("nothing to run: the program's name is missing: %w", errdefs.ErrInvalidArgument)
		}
		for _, a := range args {
			if strings.ContainsRune(a, 0) {
				return fmt.Errorf("argument %q has a zero byte in it: %w", a, errdefs.ErrInvalidArgument)
			}
		}
		process(s).Args = slices.Clone(args)
		return nil
	}
}

// Env sets variables given as KEY=VALUE, each in the place of an earlier one of its key. The value may be empty; "KEY"
// alone is an error: the environment of the caller is no part of this.
func Env(kv ...string) Option {
	return func(s *specs.Spec) error {
		p := process(s)
		for _, e := range kv {
			key, _, ok := strings.Cut(e, "=")
			if !ok || key == "" || strings.ContainsRune(e, 0) {
				return fmt.Errorf("environment variable %q is not KEY=VALUE: %w", e, errdefs.ErrInvalidArgument)
			}
			if i := slices.IndexFunc(p.Env, func(have string) bool { return strings.HasPrefix(have, key+"=") }); i >= 0 {
				p.Env[i] = e
			} else {
				p.Env = append(p.Env, e)
			}
		}
		return nil
	}
}

// Cwd sets the working directory, an absolute path in the container; the runtime makes it if it is missing.
func Cwd(dir string) Option {
	return func(s *specs.Spec) error {
		if !path.IsAbs(dir) || strings.ContainsRune(dir, 0) {
			return fmt.Errorf("working directory %q is not an absolute path: %w", dir, errdefs.ErrInvalidArgument)
		}
		process(s).Cwd = path.Clean(dir)
		return nil
	}
}

// Terminal gives the process a terminal of width columns and height rows (0: not known yet, a resize will tell), and
// TERM=xterm if the environment has no TERM.
func Terminal(width, height uint) Option {
	return func(s *specs.Spec) error {
		p := process(s)
		terminal(p)
		p.ConsoleSize = nil
		if width > 0 && height > 0 {
			p.ConsoleSize = &specs.Box{Width: width, Height: height}
		}
		return nil
	}
}

func terminal(p *specs.Process) {
	p.Terminal = true
	if !slices.ContainsFunc(p.Env, func(e string) bool { return strings.HasPrefix(e, "TERM=") }) {
		p.Env = append(p.Env, "TERM=xterm")
	}
}

// NoNewPrivileges says whether exec never gains privileges (set-user-id programs, file capabilities).
func NoNewPrivileges(on bool) Option {
	return func(s *specs.Spec) error {
		process(s).NoNewPrivileges = on
		return nil
	}
}

// Rlimits sets limits as ParseRlimit reads them, each in the place of an earlier one of its type.
func Rlimits(limits ...string) Option {
	return func(s *specs.Spec) error {
		p := process(s)
		for _, l := range limits {
			r, err := ParseRlimit(l)
			if err != nil {
				return err
			}
			p.Rlimits = slices.DeleteFunc(p.Rlimits, func(have specs.POSIXRlimit) bool { return have.Type == r.Type })
			p.Rlimits = append(p.Rlimits, r)
		}
		return nil
	}
}

// rlimits are the resources of setrlimit(2).
var rlimits = []string{
	"AS", "CORE", "CPU", "DATA", "FSIZE", "LOCKS", "MEMLOCK", "MSGQUEUE", "NICE", "NOFILE", "NPROC", "RSS", "RTPRIO",
	"RTTIME", "SIGPENDING", "STACK",
}

// ParseRlimit reads "nofile=1024:2048", soft and hard limit in the units of setrlimit(2), or "nofile=1024" for both;
// "RLIMIT_NOFILE" is the same name, and a limit may be "unlimited".
func ParseRlimit(s string) (specs.POSIXRlimit, error) {
	wrong := func(why string) (specs.POSIXRlimit, error) {
		return specs.POSIXRlimit{}, fmt.Errorf("resource limit %q: %s: %w", s, why, errdefs.ErrInvalidArgument)
	}
	name, value, ok := strings.Cut(s, "=")
	if !ok {
		return wrong("expected NAME=SOFT:HARD")
	}
	name = strings.TrimPrefix(strings.ToUpper(name), "RLIMIT_")
	if !slices.Contains(rlimits, name) {
		return wrong("no such resource")
	}
	soft, hard, two := strings.Cut(value, ":")
	if !two {
		hard = soft
	}
	r := specs.POSIXRlimit{Type: "RLIMIT_" + name}
	for _, l := range []struct {
		text string
		to   *uint64
	}{{soft, &r.Soft}, {hard, &r.Hard}} {
		if l.text == "unlimited" || l.text == "-1" {
			*l.to = math.MaxUint64 // RLIM_INFINITY
			continue
		}
		n, err := strconv.ParseUint(l.text, 10, 64)
		if err != nil {
			return wrong("a limit is a number or \"unlimited\"")
		}
		*l.to = n
	}
	if r.Soft > r.Hard {
		return wrong("the soft limit is above the hard one")
	}
	return r, nil
}

// Process gives the process of an exec in a container: everything as in base, the container's own process, but args,
// and a terminal or none. It shares no memory with base. The size of a terminal is not known yet. To change more of
// it, Apply options to a spec that holds it: &specs.Spec{Process: p}.
func Process(base *specs.Process, args []string, tty bool) *specs.Process {
	p := specs.Process{Cwd: "/"}
	if base != nil {
		p = *base
	}
	p.Args = slices.Clone(args)
	p.CommandLine = ""
	p.ConsoleSize = nil
	p.Env = slices.Clone(p.Env)
	p.Rlimits = slices.Clone(p.Rlimits)
	p.User.Umask = clone(p.User.Umask)
	p.User.AdditionalGids = slices.Clone(p.User.AdditionalGids)
	p.OOMScoreAdj = clone(p.OOMScoreAdj)
	p.IOPriority = clone(p.IOPriority)
	p.ExecCPUAffinity = clone(p.ExecCPUAffinity)
	if p.Scheduler = clone(p.Scheduler); p.Scheduler != nil {
		p.Scheduler.Flags = slices.Clone(p.Scheduler.Flags)
	}
	if p.Capabilities = clone(p.Capabilities); p.Capabilities != nil {
		for _, set := range sets(p.Capabilities) {
			*set = slices.Clone(*set)
		}
	}
	if p.Terminal = tty; tty {
		terminal(&p)
	}
	return &p
}

// clone copies what p points to, which must hold no pointers of its own that matter.
func clone[T any](p *T) *T {
	if p == nil {
		return nil
	}
	c := *p
	return &c
}
