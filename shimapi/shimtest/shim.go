package shimtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	sandbox "github.com/containerd/containerd/api/runtime/sandbox/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/shimapi"
)

// shim is one running shim with its bundle.
type shim struct {
	*shimapi.Client
	*suite
	t       testing.TB
	form    form
	id, ns  string
	bundle  string
	printed string // by start
	params  shimapi.BootstrapParams
	pid     int // of the shim
	log     *bytes.Buffer
	logged  chan struct{}
	logFIFO *os.File
	events  *recorder
	child   *exec.Cmd // in the form serve
	dead    bool      // killed by the case, which has cleaned up
}

// expect judges one expectation.
func (sh *shim) expect(key string, ok bool, format string, args ...any) {
	sh.t.Helper()
	sh.suite.expect(sh.t, key, ok, format, args...)
}

// must ends the case for what is no expectation but a condition of the rest.
func (sh *shim) must(what string, err error) {
	sh.t.Helper()
	if err != nil {
		sh.t.Fatalf("%s: %v", what, err)
	}
}

// with boots a shim, runs fn, ends the shim and looks for what it left.
func (s *suite) with(t *testing.T, f form, fn func(*shim)) {
	s.mu.Lock()
	s.n++
	id := fmt.Sprintf("c%d", s.n)
	s.mu.Unlock()
	sh := &shim{
		suite: s, t: t, form: f, id: id, ns: fmt.Sprintf("shimtest-%d", os.Getpid()), bundle: filepath.Join(s.dir, id),
		log: &bytes.Buffer{}, logged: make(chan struct{}),
	}
	sh.makeBundle()
	sh.openLog()
	var err error
	sh.events, err = newRecorder(filepath.Join(s.dir, id+".ttrpc"), sh.ns)
	sh.must("event socket", err)
	t.Cleanup(func() {
		sh.end()
		sh.events.close()
		_ = sh.logFIFO.Close()
		<-sh.logged
		if t.Failed() {
			t.Logf("log of the shim:\n%s", sh.log)
		}
	})
	sh.boot()
	fn(sh)
}

// openLog reads the shim's log, as a daemon does.
func (sh *shim) openLog() {
	sh.t.Helper()
	// O_RDWR: it never ends while the shim has not opened it yet.
	f, err := os.OpenFile(filepath.Join(sh.bundle, shimapi.LogFIFO), os.O_RDWR|unix.O_NONBLOCK, 0)
	sh.must("log", err)
	sh.logFIFO = f
	go func() {
		defer close(sh.logged)
		_, _ = io.Copy(sh.log, f) // until the test closes it
	}()
}

// socketPath is what the address names.
func (sh *shim) socketPath() string { return strings.TrimPrefix(sh.params.Address, "unix://") }

// verb runs the shim's binary as a daemon does, and gives what it printed.
func (sh *shim) verb(verb string) ([]byte, error) {
	ctx, cancel := within()
	defer cancel()
	args := []string{"-namespace", sh.ns, "-address", filepath.Join(sh.dir, "daemon.sock"), "-publish-binary", "/bin/false", "-id", sh.id}
	if verb == shimapi.VerbDelete {
		args = append(args, "-bundle", sh.bundle)
	}
	cmd := exec.CommandContext(ctx, sh.cfg.Binary, append(args, verb)...)
	cmd.Dir = sh.bundle
	cmd.Env = append(os.Environ(),
		shimapi.EnvTTRPCAddress+"="+filepath.Join(sh.dir, sh.id+".ttrpc"), shimapi.EnvGRPCAddress+"="+filepath.Join(sh.dir, "daemon.sock"),
		shimapi.EnvNamespace+"="+sh.ns, "GOMAXPROCS=2")
	cmd.Env = append(cmd.Env, sh.form.env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = 100 * time.Millisecond // what the verb leaves running may hold its output
	if err := cmd.Run(); err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return nil, fmt.Errorf("%s: %w: %s", verb, err, errs.String())
	}
	return out.Bytes(), nil
}

func (sh *shim) boot() {
	sh.t.Helper()
	if sh.form.serve {
		sh.bootServe()
	} else {
		out, err := sh.verb(shimapi.VerbStart)
		sh.must("start", err)
		sh.printed = string(out)
		sh.params, err = shimapi.ParseBootstrap(out)
		sh.must("start", err)
	}
	ctx, cancel := within()
	defer cancel()
	var err error
	sh.Client, err = shimapi.Dial(ctx, sh.params)
	sh.must("connect", err)
	conn, err := sh.Connect(ctx, &task.ConnectRequest{ID: sh.id})
	sh.must("Connect", err)
	sh.pid = int(conn.ShimPid)
	if sh.pid <= 1 || !alive(sh.pid) {
		sh.t.Fatalf("Connect says that the shim is process %d", sh.pid)
	}
	if sh.form.serve {
		sh.must("events", sh.events.follow(sh.Client))
	}
}

// bootServe hands the listening socket over.
func (sh *shim) bootServe() {
	sh.t.Helper()
	path := filepath.Join(sh.dir, sh.id+".sock")
	l, err := shimapi.Listen(path)
	sh.must("listen", err)
	socket, err := l.File()
	_ = l.Close()
	sh.must("listen", err)
	defer func() { _ = socket.Close() }()
	args := []string{"-namespace", sh.ns, "-id", sh.id, "-bundle", sh.bundle}
	if sh.form.sandbox {
		args = append(args, "-sandbox")
	}
	sh.child = exec.Command(sh.cfg.Binary, append(args, shimapi.VerbServe)...)
	sh.child.Dir = sh.bundle
	sh.child.ExtraFiles = []*os.File{socket}
	sh.child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	sh.must("serve", sh.child.Start())
	go func() { _ = sh.child.Wait() }()
	sh.params = shimapi.BootstrapParams{Version: 3, Address: "unix://" + path, Protocol: "ttrpc"}
}

// end takes everything down from whatever state the case left, and looks for what stays.
func (sh *shim) end() {
	sh.t.Helper()
	if !sh.dead && sh.Client != nil {
		ctx, cancel := within()
		defer cancel()
		if sh.form.sandbox {
			_, _ = sh.Sandbox().ShutdownSandbox(ctx, &sandbox.ShutdownSandboxRequest{SandboxID: sh.id})
		}
		_, _ = sh.Kill(ctx, &task.KillRequest{ID: sh.id, Signal: 9, All: true})
		if _, err := sh.Delete(ctx, &task.DeleteRequest{ID: sh.id}); err != nil {
			_, _ = sh.Wait(ctx, &task.WaitRequest{ID: sh.id})
			_, _ = sh.Delete(ctx, &task.DeleteRequest{ID: sh.id})
		}
		_, _ = sh.Shutdown(ctx, &task.ShutdownRequest{ID: sh.id})
		_ = sh.Close()
		gone := eventually(func() bool { return !alive(sh.pid) })
		sh.expect("left/shim", gone, "shim %d lives after Shutdown", sh.pid)
		if !gone {
			_ = unix.Kill(sh.pid, unix.SIGKILL)
		}
	}
	if sh.form.serve {
		_ = os.Remove(sh.socketPath()) // whoever made it removes it
	} else if sh.params.Address != "" {
		key := "left/socket"
		if sh.dead {
			key = "delete verb/socket"
		}
		if !sh.settles(sh.t, key, func() bool { _, err := os.Stat(sh.socketPath()); return errors.Is(err, os.ErrNotExist) }, "socket %s is left", sh.socketPath()) {
			_ = os.Remove(sh.socketPath())
		}
	}
	sh.expect("left/mounts", len(mountsBelow(sh.bundle)) == 0, "left: %v", mountsBelow(sh.bundle))
	sh.expect("left/cgroups", len(cgroupDirs(sh.id)) == 0, "left: %v", cgroupDirs(sh.id))
	if left := processesOf(sh.bundle); len(left) > 0 {
		sh.expect("left/processes", false, "left: %v", left)
		for _, pid := range left {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// deleteVerb runs containerd's verb "delete".
func (sh *shim) deleteVerb() *task.DeleteResponse {
	sh.t.Helper()
	out, err := sh.verb(shimapi.VerbDelete)
	sh.must("delete", err)
	resp := &task.DeleteResponse{}
	sh.must("output of delete", proto.Unmarshal(out, resp))
	return resp
}

// killShim kills the shim and waits for its end.
func (sh *shim) killShim() {
	sh.t.Helper()
	sh.must("kill the shim", unix.Kill(sh.pid, unix.SIGKILL))
	if !eventually(func() bool { return !alive(sh.pid) }) {
		sh.t.Fatal("a killed shim lives on")
	}
	_ = sh.Close()
	sh.dead = true
}

// alive tells a process from none, and from a zombie that nobody has waited for yet.
func alive(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(data), ") Z ")
}

// processesOf lists the processes that name dir on their command line or work in it.
func processesOf(dir string) (found []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		var pid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &pid); err != nil || pid == os.Getpid() || !alive(pid) {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		cwd, _ := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
		if strings.Contains(string(cmdline), dir+"\x00") || cwd == dir || strings.HasPrefix(cwd, dir+"/") {
			found = append(found, pid)
		}
	}
	return found
}

// request runs one call with a deadline.
func request[Req, Resp any](call func(context.Context, Req) (Resp, error), r Req) (Resp, error) {
	ctx, cancel := within()
	defer cancel()
	return call(ctx, r)
}
