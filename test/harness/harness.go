// Package harness runs a private managerd for tests, the demo and the benchmarks: everything below one directory, killed
// and started again at will, with Debian's ctr as its client. At the end it looks for what was left behind: processes,
// mounts, cgroups.
package harness

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/managerd/managerd/manager/namespaces"
)

// BinDirEnv names the directory with the three programs, built already (see Makefile).
const BinDirEnv = "MANAGERD_BIN_DIR"

// Starting is how long a daemon may take to serve on a busy machine.
const Starting = 30 * time.Second

// Programs gives the directory with managerd, shim-runc and mctl: what BinDirEnv names, else they are built into dir.
func Programs(dir string) (string, error) {
	if bin := os.Getenv(BinDirEnv); bin != "" {
		return bin, nil
	}
	for _, p := range []struct{ name, tags, cgo string }{
		{"managerd", "", "0"}, {"shim-runc", "seccomp no_grpc netgo osusergo", "1"}, {"mctl", "", "0"},
	} {
		cmd := exec.Command("go", "build", "-tags", p.tags, "-o", filepath.Join(dir, p.name), "github.com/managerd/managerd/cmd/"+p.name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+p.cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("cannot build %s: %w\n%s", p.name, err, out)
		}
	}
	return dir, nil
}

// Daemon is a private managerd. Its methods may be used by one goroutine at a time; those of the client side by many.
type Daemon struct {
	Bin       string // directory of the programs
	Dir       string // holds everything: root, state, socket, log
	Namespace string // of the commands that Ctr runs, and of Context; nobody else on the machine has it
	Args      []string
	Env       []string
	Client    string // the ctr of Command; "" for Debian's

	cmd   *exec.Cmd
	exit  chan error
	conn  *grpc.ClientConn
	store *FDStore // nil: there is no service manager
}

var serial atomic.Int64

// New prepares a daemon below a new temporary directory; nothing runs yet.
func New(bin string) (*Daemon, error) {
	dir, err := os.MkdirTemp("", "managerd-")
	if err != nil {
		return nil, err
	}
	return &Daemon{Bin: bin, Dir: dir, Namespace: fmt.Sprintf("md%d-%d", os.Getpid(), serial.Add(1))}, nil
}

// Root is the daemon's root directory.
func (d *Daemon) Root() string { return filepath.Join(d.Dir, "root") }

// State is the daemon's state directory.
func (d *Daemon) State() string { return filepath.Join(d.Dir, "state") }

// Socket is where it serves gRPC.
func (d *Daemon) Socket() string { return filepath.Join(d.Dir, "m.sock") }

// Log is the file with all that the daemons of this directory logged.
func (d *Daemon) Log() string { return filepath.Join(d.Dir, "managerd.log") }

// Start starts managerd and waits until it serves.
func (d *Daemon) Start() error {
	if err := d.Spawn(); err != nil {
		return err
	}
	return d.Ready(Starting)
}

// Spawn starts managerd and does not wait.
func (d *Daemon) Spawn() error {
	log, err := os.OpenFile(d.Log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	args := append([]string{"--root", d.Root(), "--state", d.State(), "--address", d.Socket(), "--log-level", "debug"}, d.Args...)
	d.cmd = exec.Command(filepath.Join(d.Bin, "managerd"), args...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.Env = append(os.Environ(), d.Env...)
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	start := d.cmd.Start
	if d.store != nil {
		start = func() error { return d.store.start(d.cmd) }
	}
	if err := start(); err != nil {
		return err
	}
	d.exit = make(chan error, 1)
	go func(cmd *exec.Cmd, exit chan error) { exit <- cmd.Wait() }(d.cmd, d.exit)
	return nil
}

// Ready waits until the daemon serves.
func (d *Daemon) Ready(within time.Duration) error {
	conn, err := d.Conn()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	for {
		_, err = grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		if err == nil {
			return nil
		}
		select {
		case werr := <-d.exit:
			d.exit <- werr
			log, _ := os.ReadFile(d.Log())
			return fmt.Errorf("managerd ended: %w\n%s", werr, tail(log))
		case <-ctx.Done():
			log, _ := os.ReadFile(d.Log())
			return fmt.Errorf("managerd does not serve: %w\n%s", err, tail(log))
		case <-time.After(2 * time.Millisecond):
			conn.ResetConnectBackoff()
		}
	}
}

func tail(b []byte) []byte { return b[max(0, len(b)-8000):] }

// Conn is a gRPC connection that outlives restarts of the daemon.
func (d *Daemon) Conn() (*grpc.ClientConn, error) {
	if d.conn != nil {
		return d.conn, nil
	}
	conn, err := grpc.NewClient("unix://"+d.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		return nil, err
	}
	d.conn = conn
	return conn, nil
}

// Context carries the daemon's namespace.
func (d *Daemon) Context(ctx context.Context) context.Context {
	return namespaces.With(ctx, d.Namespace)
}

// PID is managerd's.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Kill ends managerd with SIGKILL and waits for it.
func (d *Daemon) Kill() error { return d.end(syscall.SIGKILL) }

// Stop ends managerd with SIGTERM and waits for it. An exit status other than 0 is an error.
func (d *Daemon) Stop() error {
	if err := d.end(syscall.SIGTERM); err != nil {
		log, _ := os.ReadFile(d.Log())
		return fmt.Errorf("managerd did not stop well: %w\n%s", err, tail(log))
	}
	return nil
}

func (d *Daemon) end(sig syscall.Signal) error {
	if d.cmd == nil {
		return nil
	}
	_ = d.cmd.Process.Signal(sig)
	var err error
	select {
	case err = <-d.exit:
	case <-time.After(Starting):
		_ = d.cmd.Process.Kill()
		err = errors.Join(errors.New("it did not end"), <-d.exit)
	}
	d.cmd = nil
	if sig == syscall.SIGKILL {
		return nil
	}
	return err
}

// Command is a command line of ctr for this daemon.
func (d *Daemon) Command(args ...string) *exec.Cmd {
	return exec.Command(cmp.Or(d.Client, "ctr"), append([]string{"-a", d.Socket(), "-n", d.Namespace}, args...)...)
}

// Mctl is a command line of our own client.
func (d *Daemon) Mctl(args ...string) *exec.Cmd {
	return exec.Command(filepath.Join(d.Bin, "mctl"), append([]string{"-a", d.Socket(), "-n", d.Namespace}, args...)...)
}

// Output runs a command and gives what it wrote to standard output. The error carries what it wrote to standard error,
// and wraps exec.ExitError.
func Output(cmd *exec.Cmd) (string, error) {
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, errs.String())
	}
	return out.String(), nil
}

// Status is the exit status in the error of Output, 0 for nil, -1 for another error.
func Status(err error) int {
	var e *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e.ExitCode()
	}
	return -1
}

// Close ends the daemon and removes its directory, unless something is left behind: the error then says what.
func (d *Daemon) Close() error {
	errs := []error{d.Stop()}
	if d.store != nil {
		d.store.close()
	}
	if d.conn != nil {
		_ = d.conn.Close()
	}
	if left := d.Left(); len(left) > 0 {
		return errors.Join(append(errs, fmt.Errorf("left behind:\n%s", strings.Join(left, "\n")))...)
	}
	return errors.Join(append(errs, removeCgroups(d.Namespace), os.RemoveAll(d.Dir))...)
}

// Test gives a running daemon to a test, which fails if anything is left behind at its end.
func Test(t testing.TB, bin string) *Daemon {
	t.Helper()
	d, err := New(bin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(d.Log())
			t.Logf("the end of the daemon's log:\n%s", tail(log))
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	return d
}
