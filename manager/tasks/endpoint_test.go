package tasks

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	sandbox "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/shims"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/shimfake"
)

// at is runtime options that name an endpoint.
func at(t *testing.T, address string, version uint32) *anypb.Any {
	t.Helper()
	//lint:ignore SA1019 clients send it all the same
	o, err := anypb.New(&options.Options{TaskApiAddress: address, TaskApiVersion: version})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// served is a shim that keeps a sandbox and serves the task API, of nobody that the daemon knows.
type served struct {
	t      *testing.T
	bundle string
	socket string
	cmd    *exec.Cmd
	client *shimapi.Client
}

func serveEndpoint(t *testing.T) *served {
	t.Helper()
	dir := t.TempDir()
	e := &served{t: t, bundle: filepath.Join(dir, "box"), socket: filepath.Join(dir, "endpoint.sock")}
	if err := os.Mkdir(e.bundle, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(e.bundle, shimapi.LogFIFO), 0o600); err != nil {
		t.Fatal(err)
	}
	e.spawn(shimapi.VerbServe)
	t.Cleanup(func() {
		if _, err := e.client.Sandbox().ShutdownSandbox(in("ns"), &sandbox.ShutdownSandboxRequest{SandboxID: "box"}); err != nil {
			t.Error(err)
			_ = e.cmd.Process.Kill()
		}
		_ = e.client.Close()
		if err := e.cmd.Wait(); err != nil {
			t.Errorf("the endpoint: %v", err)
		}
	})
	if _, err := e.client.Sandbox().CreateSandbox(in("ns"), &sandbox.CreateSandboxRequest{SandboxID: "box", BundlePath: e.bundle}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.client.Sandbox().StartSandbox(in("ns"), &sandbox.StartSandboxRequest{SandboxID: "box"}); err != nil {
		t.Fatal(err)
	}
	return e
}

func (e *served) spawn(verb string) {
	e.t.Helper()
	l, err := shimapi.Listen(e.socket)
	if err != nil {
		e.t.Fatal(err)
	}
	socket, err := l.File()
	_ = l.Close()
	if err != nil {
		e.t.Fatal(err)
	}
	defer func() { _ = socket.Close() }()
	e.cmd = exec.Command(shimRunc(e.t), "-namespace", "ns", "-id", "box", "-bundle", e.bundle, "-sandbox", verb)
	e.cmd.Dir = e.bundle
	e.cmd.ExtraFiles = []*os.File{socket}
	e.cmd.Stderr = os.Stderr
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	if e.client, err = shimapi.Dial(in("ns"), shimapi.BootstrapParams{Version: 3, Address: e.socket}); err != nil {
		e.t.Fatal(err)
	}
}

// TestEndpoint: tasks are made at a task API that somebody serves already. It outlives the daemon, the deletion of one of them,
// a Create that fails, and its own replacement.
func TestEndpoint(t *testing.T) {
	e := serveEndpoint(t) // it ends behind the world
	r := realWorld(t)
	for _, id := range []string{"one", "two"} {
		r.run(CreateRequest{ID: id, Options: at(t, "ttrpc+unix://"+e.socket, 3)}, "exec /busybox sleep 1000")
	}
	if left, err := filepath.Glob(filepath.Join(r.state, "s", "*")); err != nil || len(left) > 0 {
		t.Errorf("a shim was spawned: %v, %v", left, err)
	}
	status := func(id string) tasktypes.Status {
		t.Helper()
		st, err := r.Get(in("ns"), id, "")
		if err != nil {
			t.Fatalf("%s: %v", id, err)
		}
		return st.Status
	}
	r.restart()
	for _, id := range []string{"one", "two"} {
		if s := status(id); s != tasktypes.Status_RUNNING {
			t.Errorf("behind a restart of the daemon %s is %s", id, s)
		}
	}
	r.exec("one", "x", "exit 3")
	if code, _, err := r.Wait(in("ns"), "one", "x"); err != nil || code != 3 {
		t.Errorf("exec: %d, %v", code, err)
	}
	if err := r.Kill(in("ns"), "one", "", 9, true); err != nil {
		t.Fatal(err)
	}
	if code, _, err := r.Wait(in("ns"), "one", ""); err != nil || code != 137 {
		t.Errorf("wait: %d, %v", code, err)
	}
	if d, err := r.Delete(in("ns"), "one"); err != nil || d.ExitStatus != 137 {
		t.Errorf("delete: %v, %v", d, err)
	}
	r.add("bad", []byte(`{"ociVersion": "1.2.0", "linux": {}}`), shims.DefaultRuntime)
	if _, err := r.Create(in("ns"), CreateRequest{ID: "bad", TaskAPI: e.socket, TaskAPIVersion: 3}); err == nil {
		t.Error("a container without a process was made")
	}
	if _, err := r.bundles.Load("ns", "bad"); !errdefs.IsNotFound(err) {
		t.Errorf("a bundle is left: %v", err)
	}
	_ = e.cmd.Process.Kill()
	_ = e.cmd.Wait()
	_ = e.client.Close()
	e.spawn(shimapi.VerbAdopt)
	eventually(t, "the task is found at the successor", func() bool {
		_, s, err := r.living(in("ns"), "two")
		if err != nil {
			return false
		}
		select {
		case <-s.Gone():
			return false
		default:
			return status("two") == tasktypes.Status_RUNNING
		}
	})
	r.run(CreateRequest{ID: "three", TaskAPI: "unix://" + e.socket, TaskAPIVersion: 2}, "exit 7")
	if code, _, err := r.Wait(in("ns"), "three", ""); err != nil || code != 7 {
		t.Errorf("wait: %d, %v", code, err)
	}
}

// TestEndpointDies: the end of an endpoint is told, and its task can be deleted; a daemon that starts behind it says the same.
func TestEndpointDies(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		t.Run(map[bool]string{false: "while the daemon runs", true: "while none does"}[restarted], func(t *testing.T) {
			w := fakes(t)
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, shimapi.ConfigFile), []byte(`{"process": {"args": ["sleep"]}}`), 0o600); err != nil {
				t.Fatal(err)
			}
			l, err := net.Listen("unix", filepath.Join(dir, "endpoint.sock"))
			if err != nil {
				t.Fatal(err)
			}
			fake, err := shimfake.New(shimfake.Config{Namespace: "ns", ID: "task", Bundle: dir}, l)
			if err != nil {
				t.Fatal(err)
			}
			bundle := filepath.Join(w.state, "io.containerd.runtime.v2.task", "ns", "task")
			w.add("task", args("sleep"), "io.containerd.none.v1") // no runtime is needed
			if _, err := w.Create(in("ns"), CreateRequest{ID: "task", Options: at(t, "unix://"+dir+"/endpoint.sock", 2)}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Start(in("ns"), "task", ""); err != nil {
				t.Fatal(err)
			}
			events := w.record()
			if restarted {
				w.stop()
				fake.Crash()
				<-w.begin()
				events = w.record()
			} else {
				fake.Crash()
			}
			for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
				st, err := w.Get(in("ns"), "task", "")
				if err == nil && st.Status == tasktypes.Status_UNKNOWN && st.ExitStatus == unknownExit {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("its death is not told: %v, %v", st, err)
				}
			}
			if _, _, err := w.Wait(in("ns"), "task", ""); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "its shim is dead") {
				t.Errorf("wait: %v", err)
			}
			if d, err := w.Delete(in("ns"), "task"); err != nil || d.ExitStatus != unknownExit {
				t.Errorf("delete: %v, %v", d, err)
			}
			events.await(t, "task", "exit task=255", "delete")
			if _, err := os.Stat(bundle); !os.IsNotExist(err) {
				t.Errorf("the bundle is left: %v", err)
			}
		})
	}
}

// TestEndpointRefused: an endpoint that is none is refused, and nothing is left.
func TestEndpointRefused(t *testing.T) {
	w := fakes(t)
	for _, c := range []struct {
		address string
		version uint32
		code    func(error) bool
		says    string
	}{
		{"unix:///nowhere", 3, errdefs.IsUnavailable, "nobody serves a task API at unix:///nowhere"},
		{"unix:///nowhere", 0, errdefs.IsInvalidArgument, "the version must be 2 or 3"},
		{"unix:///nowhere", 4, errdefs.IsInvalidArgument, "the version must be 2 or 3"},
		{"nowhere", 3, errdefs.IsInvalidArgument, "write unix:///path"},
		{"unix:///a\nb", 3, errdefs.IsInvalidArgument, "cannot be printed"},
		{"ttrpc+vsock://3", 3, errdefs.IsInvalidArgument, "vsock://CID:PORT"},
		{"hvsock:///path:1024", 3, errdefs.IsNotImplemented, "hvsock is not supported"},
		{"grpc+unix:///nowhere", 3, errdefs.IsNotImplemented, "grpc+unix is not supported"},
	} {
		w.add("task", args("sleep"), shims.DefaultRuntime)
		_, err := w.Create(in("ns"), CreateRequest{ID: "task", Options: at(t, c.address, c.version)})
		if !c.code(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s, %d: %v", c.address, c.version, err)
		}
		if _, err := w.bundles.Load("ns", "task"); !errdefs.IsNotFound(err) {
			t.Errorf("%s, %d: a bundle is left: %v", c.address, c.version, err)
		}
	}
}
