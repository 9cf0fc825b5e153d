package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/managerd/managerd/test/harness"
)

// program is a daemon's process below the directory of a harness.Daemon.
type program interface {
	Spawn() error
	Stop() error
	PID() int
}

// side is one of the two that are compared: a daemon, and this program as its client.
type side struct {
	name    string
	home    *harness.Daemon // its directory, socket and namespace; what it left behind
	program program
	cpu     cgroup
	begun   bool // there may be containers
	up      bool
	phases  bool // ask the shims how long the parts of their work took
	client
}

// newSides prepares managerd and what it is measured against; nothing runs yet. What is given is to be closed, also
// when there is an error.
func newSides(o options) ([]*side, error) {
	ours, err := newManagerd("managerd", o.bin)
	if err != nil {
		return nil, err
	}
	sides := []*side{ours}
	if o.debug != "" {
		config := filepath.Join(ours.home.Dir, "config.toml")
		text := fmt.Sprintf("version = 3\n[debug]\naddress = %q\n", o.debug)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			return sides, err
		}
		ours.home.Args = append(ours.home.Args, "--config", config)
	}
	var theirs *side
	switch {
	case o.alone:
		ours.phases = true
		return sides, nil
	case o.against != "":
		theirs, err = newManagerd("other build", o.against)
	default:
		theirs, err = newContainerd()
	}
	if theirs != nil {
		sides = append(sides, theirs)
	}
	return sides, err
}

func newManagerd(name, bin string) (*side, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	home, err := harness.New(bin)
	if err != nil {
		return nil, err
	}
	home.Args = []string{"--log-level", "info"} // as a daemon runs that nobody looks into
	return newSide(name, home, home)
}

func newSide(name string, home *harness.Daemon, p program) (*side, error) {
	s := &side{name: name, home: home, program: p}
	var err error
	s.conn, err = grpc.NewClient("unix://"+home.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	s.client.home = home
	return s, err
}

// begin starts the daemon in a cgroup of its own, which counts its CPU time and that of all it starts, and gives it the
// image.
func (s *side) begin(ctx context.Context) error {
	var err error
	if s.cpu, err = newCgroup(s.home.Namespace); err != nil {
		return err
	}
	s.begun = true
	if _, err := s.start(ctx); err != nil {
		return err
	}
	return s.client.prepare(ctx)
}

// start starts the daemon and says how long it took until it answered.
func (s *side) start(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	if err := s.program.Spawn(); err != nil {
		return 0, fmt.Errorf("cannot start %s: %w", s.name, err)
	}
	s.up = true
	if err := s.cpu.enter(s.program.PID()); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, harness.Starting)
	defer cancel()
	for {
		_, err := versionapi.NewVersionClient(s.conn).Version(ctx, &emptypb.Empty{})
		if err == nil {
			return time.Since(began), nil
		}
		if ctx.Err() != nil {
			log, _ := os.ReadFile(s.home.Log())
			return 0, fmt.Errorf("%s does not serve: %w\n%s", s.name, err, log[max(0, len(log)-4000):])
		}
		s.conn.ResetConnectBackoff() // or a client would sleep longer than a daemon takes to start
		time.Sleep(500 * time.Microsecond)
	}
}

func (s *side) stop() error {
	s.up = false
	return s.program.Stop()
}

// close removes every container, ends the daemon, and removes what it was given. The error says what is left behind.
func (s *side) close() error {
	var errs []error
	if s.begun {
		// Whatever ended the measuring, also a signal, also between a stop and a start: this is the cleaning up.
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if !s.up {
			_, err := s.start(ctx)
			errs = append(errs, err)
		}
		errs = append(errs, s.home.Clear(ctx), s.stop())
	}
	errs = append(errs, s.conn.Close(), s.cpu.remove())
	if err := s.home.Close(); err != nil {
		errs = append(errs, err, s.home.Raze())
	}
	if c, ok := s.program.(*containerd); ok {
		c.forget()
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cannot clean up after %s: %w", s.name, err)
	}
	return nil
}

// containerd is Debian's, run privately: everything but the sockets of its shims, which have a fixed place, is below the
// directory.
type containerd struct {
	home *harness.Daemon
	cmd  *exec.Cmd
	made []string // directories with fixed names that were not there before
}

func newContainerd() (*side, error) {
	for _, p := range []string{"containerd", "containerd-shim-runc-v2", "runc"} {
		if _, err := exec.LookPath(p); err != nil {
			return nil, fmt.Errorf("%w (Debian: apt-get install containerd runc)", err)
		}
	}
	home, err := harness.New("")
	if err != nil {
		return nil, err
	}
	c := &containerd{home: home}
	for _, dir := range []string{"/run/containerd", "/run/containerd/s"} {
		if _, err := os.Stat(dir); os.IsNotExist(err) {
			c.made = append([]string{dir}, c.made...)
		}
	}
	s, err := newSide("containerd", home, c)
	if err != nil {
		return s, err
	}
	s.options = runcRoot(filepath.Join(home.Dir, "runc"))
	// What needs a kernel module, a device or a file of the machine's is of no use here.
	config := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.tracing"]
[grpc]
  address = %q
[ttrpc]
  address = %q
[plugins."io.containerd.internal.v1.opt"]
  path = %q
`, home.Root(), home.State(), home.Socket(), home.Socket()+".ttrpc", filepath.Join(home.Dir, "opt"))
	return s, os.WriteFile(c.config(), []byte(config), 0o600)
}

func (c *containerd) config() string { return filepath.Join(c.home.Dir, "config.toml") }

// Spawn starts containerd and does not wait until it serves.
func (c *containerd) Spawn() error {
	log, err := os.OpenFile(c.home.Log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	c.cmd = exec.Command("containerd", "--config", c.config(), "--log-level", "info")
	c.cmd.Stdout, c.cmd.Stderr = log, log
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return c.cmd.Start()
}

// PID is containerd's.
func (c *containerd) PID() int { return c.cmd.Process.Pid }

// Stop ends containerd with SIGTERM and waits for it.
func (c *containerd) Stop() error {
	overdue := time.AfterFunc(harness.Starting, func() { _ = c.cmd.Process.Kill() })
	defer overdue.Stop()
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return c.cmd.Wait()
}

// forget removes the directories that containerd and its shims made outside, unless they hold something of others.
func (c *containerd) forget() {
	for _, dir := range c.made {
		_ = os.Remove(dir)
	}
}

// versions says what a side is made of.
func (s *side) versions(ctx context.Context) string {
	v, err := versionapi.NewVersionClient(s.conn).Version(ctx, &emptypb.Empty{})
	if err != nil {
		return s.name
	}
	said := s.name + " " + v.Version
	if _, ok := s.program.(*containerd); ok {
		if out, err := exec.Command("runc", "--version").Output(); err == nil {
			first, _, _ := strings.Cut(string(out), "\n")
			said += " + " + strings.Replace(first, "version ", "", 1)
		}
	}
	return said
}
