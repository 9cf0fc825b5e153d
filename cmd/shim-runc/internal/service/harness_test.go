package service_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logger/loggertest"
	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/test/hungfs"
)

var (
	binary string // shim-runc
	lower  string // a rootfs of busybox that every container bind-mounts
)

// makeLower makes lower, for the first test that needs it.
var makeLower sync.Once

// tempPrefix begins the name of every directory of this very run: another may be under way beside it.
var tempPrefix = fmt.Sprintf("shim-service-test-%d-", os.Getpid())

func TestMain(m *testing.M) {
	loggertest.Run()
	hungfs.Run()
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", tempPrefix)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := os.Chmod(dir, 0o711); err != nil { // the init of a user namespace executes the shim's program, too
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if binary, err = shimbin.Build(dir, shimbin.Race); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	lower = filepath.Join(dir, "lower")
	code := m.Run()
	if left := shimbin.Leftovers(os.TempDir()); len(left) > 0 && code == 0 {
		for _, l := range left {
			if strings.Contains(l, tempPrefix) || strings.HasPrefix(l, "cgroup") {
				fmt.Fprintln(os.Stderr, "left behind:", l)
				code = 1
			}
		}
	}
	return code
}

// fixture is one shim under "serve", with a client.
type fixture struct {
	*shimapi.Client
	t       testing.TB
	id, dir string
	cmd     *exec.Cmd
	done    chan struct{} // the shim has ended
	log     chan string
	heard   func(log string) // is given what the shim logged, after its end; or nil
}

var ctx = context.Background()

// serve makes a bundle for spec (a *specs.Spec, or anything that is not one) and starts a shim on it. The test's end
// removes it all, and fails when the shim does not end.
func serve(t testing.TB, id string, spec any) *fixture {
	t.Helper()
	makeLower.Do(func() { shimbin.Rootfs(t, lower) })
	dir, err := os.MkdirTemp("", tempPrefix)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{t: t, id: id, dir: filepath.Join(dir, "b")}
	shimbin.Bundle(t, f.dir, spec)
	f.spawn(shimapi.VerbServe)
	t.Cleanup(func() {
		f.end()
		_ = os.RemoveAll(dir)
	})
	return f
}

// spawn starts the shim's program and connects to it.
func (f *fixture) spawn(verb string, extra ...*os.File) {
	t := f.t
	t.Helper()
	l, err := shimapi.Listen(f.socket())
	if err != nil {
		t.Fatal(err)
	}
	fd, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(f.dir, shimapi.LogFIFO), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.cmd = exec.Command(binary, "-namespace", "test", "-id", f.id, "-bundle", f.dir, "-debug", verb)
	f.cmd.Dir = f.dir
	f.cmd.ExtraFiles = append([]*os.File{fd}, extra...)
	f.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var stderr strings.Builder
	f.cmd.Stderr = &stderr
	if err := f.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = fd.Close()
	_ = l.Close()
	cmd, done, text := f.cmd, make(chan struct{}), make(chan string, 1)
	f.done, f.log = done, text
	go func() {
		_ = cmd.Wait()
		close(done)
		data, _ := io.ReadAll(log) // the shim was the last writer
		_ = log.Close()
		text <- string(data) + stderr.String()
	}()
	if f.Client, err = shimapi.Dial(ctx, shimapi.BootstrapParams{Version: 3, Address: f.socket()}); err != nil {
		t.Fatal(err)
	}
}

// succeed kills the shim and starts its successor, for which nobody has kept anything.
func (f *fixture) succeed() {
	f.t.Helper()
	f.die()
	f.adopt()
}

// die kills the shim.
func (f *fixture) die() {
	f.t.Helper()
	_ = f.cmd.Process.Kill()
	<-f.done
	<-f.log
	_ = f.Close()
	if err := os.Remove(f.socket()); err != nil {
		f.t.Fatal(err)
	}
}

// adopt starts the successor of a shim that is dead.
func (f *fixture) adopt() {
	f.t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		f.t.Fatal(err)
	}
	_ = unix.Close(pair[1])
	handover := os.NewFile(uintptr(pair[0]), "handover")
	f.spawn(shimapi.VerbAdopt, handover)
	_ = handover.Close()
}

func (f *fixture) socket() string { return filepath.Join(filepath.Dir(f.dir), "s") }

// end converges from every state: kill, delete, shut down.
func (f *fixture) end() {
	f.t.Helper()
	c, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	_, _ = f.Kill(c, &task.KillRequest{ID: f.id, Signal: 9, All: true})
	_, _ = f.Wait(c, &task.WaitRequest{ID: f.id})
	_, _ = f.Delete(c, &task.DeleteRequest{ID: f.id})
	_, _ = f.Shutdown(c, &task.ShutdownRequest{ID: f.id})
	_ = f.Close()
	select {
	case <-f.done:
	case <-time.After(20 * time.Second):
		f.t.Errorf("the shim of %s does not end", f.id)
		_ = f.cmd.Process.Signal(syscall.SIGQUIT)
		_ = f.cmd.Process.Kill()
	}
	log := <-f.log
	if f.heard != nil {
		f.heard(log)
	}
	if f.t.Failed() || strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic:") {
		f.t.Errorf("the shim's log:\n%s", log)
	}
}

// fifos makes the client's FIFOs of a process.
func (f *fixture) fifos(name string) (in, out, errs string) {
	f.t.Helper()
	var paths []string
	for _, stream := range []string{"in", "out", "err"} {
		p := filepath.Join(filepath.Dir(f.dir), name+"."+stream)
		if err := unix.Mkfifo(p, 0o600); err != nil {
			f.t.Fatal(err)
		}
		paths = append(paths, p)
	}
	return paths[0], paths[1], paths[2]
}

// read reads a FIFO to its end.
func read(t testing.TB, path string) <-chan string {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	// The other side holds it open for writing before the request that named it is answered: no early end of file.
	got := make(chan string, 1)
	go func() {
		data, _ := io.ReadAll(file)
		_ = file.Close()
		got <- string(data)
	}()
	return got
}

func bind() []*types.Mount {
	return []*types.Mount{{Type: "bind", Source: lower, Options: []string{"rbind", "ro"}}}
}

// create creates the container, its output discarded unless mod says otherwise.
func (f *fixture) create(mod func(*task.CreateTaskRequest)) *task.CreateTaskResponse {
	f.t.Helper()
	r := &task.CreateTaskRequest{ID: f.id, Bundle: f.dir, Rootfs: bind()}
	if mod != nil {
		mod(r)
	}
	resp, err := f.Create(ctx, r)
	if err != nil {
		f.t.Fatal(err)
	}
	return resp
}

func (f *fixture) start(execID string) uint32 {
	f.t.Helper()
	resp, err := f.Start(ctx, &task.StartRequest{ID: f.id, ExecID: execID})
	if err != nil {
		f.t.Fatal(err)
	}
	return resp.Pid
}

func (f *fixture) wait(execID string) *task.WaitResponse {
	f.t.Helper()
	c, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	resp, err := f.Wait(c, &task.WaitRequest{ID: f.id, ExecID: execID})
	if err != nil {
		f.t.Fatal(err)
	}
	return resp
}

func (f *fixture) kill(execID string, sig syscall.Signal) {
	f.t.Helper()
	if _, err := f.Kill(ctx, &task.KillRequest{ID: f.id, ExecID: execID, Signal: uint32(sig)}); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) remove(execID string) *task.DeleteResponse {
	f.t.Helper()
	resp, err := f.Delete(ctx, &task.DeleteRequest{ID: f.id, ExecID: execID})
	if err != nil {
		f.t.Fatal(err)
	}
	return resp
}

// exec adds an exec; it is not started.
func (f *fixture) exec(execID string, mod func(*task.ExecProcessRequest), args ...string) error {
	f.t.Helper()
	spec, err := json.Marshal(&specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}})
	if err != nil {
		f.t.Fatal(err)
	}
	r := &task.ExecProcessRequest{ID: f.id, ExecID: execID, Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: spec}}
	if mod != nil {
		mod(r)
	}
	_, err = f.Exec(ctx, r)
	return err
}

// runExec runs one to its end, deletes it, and gives its exit status.
func (f *fixture) runExec(execID string, mod func(*task.ExecProcessRequest), args ...string) uint32 {
	f.t.Helper()
	if err := f.exec(execID, mod, args...); err != nil {
		f.t.Fatal(err)
	}
	f.start(execID)
	status := f.wait(execID).ExitStatus
	f.remove(execID)
	return status
}

// capture runs an exec and gives what it wrote.
func (f *fixture) capture(execID string, args ...string) string {
	f.t.Helper()
	_, out, _ := f.fifos(execID)
	if err := f.exec(execID, func(r *task.ExecProcessRequest) { r.Stdout = out }, args...); err != nil {
		f.t.Fatal(err)
	}
	f.start(execID)
	got := read(f.t, out)
	f.wait(execID)
	f.remove(execID)
	return <-got
}

func (f *fixture) state(execID string) *task.StateResponse {
	f.t.Helper()
	s, err := f.State(ctx, &task.StateRequest{ID: f.id, ExecID: execID})
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

func (f *fixture) describe() *shim.DescribeResponse {
	f.t.Helper()
	d, err := f.Shim().Describe(ctx, &shim.DescribeRequest{})
	if err != nil {
		f.t.Fatal(err)
	}
	return d
}

// running is a container that sleeps.
func running(t testing.TB, id string, mod func(*specs.Spec)) *fixture {
	t.Helper()
	spec := shimbin.Spec(id, "sleep", "1000")
	if mod != nil {
		mod(spec)
	}
	f := serve(t, id, spec)
	f.create(nil)
	f.start("")
	return f
}
