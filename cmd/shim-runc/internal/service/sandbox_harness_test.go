package service_test

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	"github.com/managerd/managerd/shimapi"
)

// box is a shim that keeps a sandbox, with a client.
type box struct {
	*shimapi.Client
	t       *testing.T
	id, dir string
	cmd     *exec.Cmd
	done    chan struct{}
	said    strings.Builder
}

// serveBox starts a shim for a sandbox of spec (nil: there is none). The test's end takes it all away.
func serveBox(t *testing.T, id string, spec any) *box {
	t.Helper()
	makeLower.Do(func() { shimbin.Rootfs(t, lower) })
	dir, err := os.MkdirTemp("", tempPrefix)
	if err != nil {
		t.Fatal(err)
	}
	b := &box{t: t, id: id, dir: filepath.Join(dir, "b")}
	shimbin.Bundle(t, b.dir, spec)
	if spec == nil {
		if err := os.Remove(filepath.Join(b.dir, shimapi.ConfigFile)); err != nil {
			t.Fatal(err)
		}
	}
	b.spawn(shimapi.VerbServe)
	t.Cleanup(func() {
		c, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		if _, err := b.Sandbox().ShutdownSandbox(c, &api.ShutdownSandboxRequest{SandboxID: id}); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		b.awaitEnd()
		if t.Failed() || strings.Contains(b.said.String(), "DATA RACE") || strings.Contains(b.said.String(), "panic:") {
			t.Errorf("the shim's log:\n%s", b.said.String())
		}
		for _, left := range mountsIn(dir) {
			t.Errorf("left behind: %s", left)
		}
		_ = os.RemoveAll(dir)
	})
	return b
}

// spawn starts the shim, or a successor.
func (b *box) spawn(verb string) {
	b.t.Helper()
	socket := filepath.Join(filepath.Dir(b.dir), "s")
	l, err := shimapi.Listen(socket)
	if err != nil {
		b.t.Fatal(err)
	}
	fd, err := l.File()
	if err != nil {
		b.t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(b.dir, shimapi.LogFIFO), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		b.t.Fatal(err)
	}
	cmd := exec.Command(binary, "-namespace", "test", "-id", b.id, "-bundle", b.dir, "-sandbox", verb)
	cmd.Dir, cmd.ExtraFiles, cmd.SysProcAttr = b.dir, []*os.File{fd}, &syscall.SysProcAttr{Setsid: true}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	_, _ = fd.Close(), l.Close()
	done := make(chan struct{})
	b.cmd, b.done = cmd, done
	go func() {
		defer close(done)
		_ = cmd.Wait()
		data, _ := io.ReadAll(log)
		_ = log.Close()
		b.said.WriteString(string(data) + stderr.String())
	}()
	if b.Client, err = shimapi.Dial(ctx, shimapi.BootstrapParams{Version: 3, Address: socket}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *box) awaitEnd() {
	b.t.Helper()
	_ = b.Close()
	select {
	case <-b.done:
	case <-time.After(30 * time.Second):
		_ = b.cmd.Process.Kill()
		<-b.done
		b.t.Errorf("the shim of sandbox %s does not end", b.id)
	}
}

// succeed kills the shim, and starts another.
func (b *box) succeed() {
	b.t.Helper()
	_ = b.cmd.Process.Kill()
	b.awaitEnd()
	b.spawn(shimapi.VerbAdopt)
}

func (b *box) createBox(mod func(*api.CreateSandboxRequest)) error {
	r := &api.CreateSandboxRequest{SandboxID: b.id, BundlePath: b.dir}
	if mod != nil {
		mod(r)
	}
	_, err := b.Sandbox().CreateSandbox(ctx, r)
	return err
}

// startBox creates and starts, and gives the spec that members are to use.
func (b *box) startBox() *specs.Spec {
	b.t.Helper()
	if err := b.createBox(nil); err != nil {
		b.t.Fatal(err)
	}
	r, err := b.Sandbox().StartSandbox(ctx, &api.StartSandboxRequest{SandboxID: b.id})
	if err != nil {
		b.t.Fatal(err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(r.Spec.Value, &spec); err != nil {
		b.t.Fatal(err)
	}
	return &spec
}

func (b *box) status() *api.SandboxStatusResponse {
	b.t.Helper()
	r, err := b.Sandbox().SandboxStatus(ctx, &api.SandboxStatusRequest{SandboxID: b.id, Verbose: true})
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

// waitBox waits for the sandbox's end.
func (b *box) waitBox() (uint32, error) {
	c, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	r, err := b.Sandbox().WaitSandbox(c, &api.WaitSandboxRequest{SandboxID: b.id})
	return r.GetExitStatus(), err
}

func (b *box) stop(timeout uint32) {
	b.t.Helper()
	if _, err := b.Sandbox().StopSandbox(ctx, &api.StopSandboxRequest{SandboxID: b.id, TimeoutSecs: timeout}); err != nil {
		b.t.Fatal(err)
	}
}

// joined makes a container's spec one of a member's.
func joined(of *specs.Spec) func(*specs.Spec) {
	return func(s *specs.Spec) {
		shared := map[specs.LinuxNamespaceType]bool{}
		for _, ns := range of.Linux.Namespaces {
			shared[ns.Type] = true
		}
		all := of.Linux.Namespaces
		for _, ns := range s.Linux.Namespaces {
			if !shared[ns.Type] {
				all = append(all, ns)
			}
		}
		s.Linux.Namespaces = all
		s.Mounts = append(s.Mounts, of.Mounts...)
	}
}

// boxSpec is a sandbox with namespaces of these types.
func boxSpec(kinds ...specs.LinuxNamespaceType) *specs.Spec {
	s := &specs.Spec{Version: specs.Version, Linux: &specs.Linux{}}
	for _, k := range kinds {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: k})
	}
	return s
}

// mountsIn lists what is mounted below dir.
func mountsIn(dir string) (out []string) {
	for _, left := range shimbin.Leftovers(dir) {
		if strings.HasPrefix(left, "mount ") {
			out = append(out, left)
		}
	}
	return out
}

// eventually waits for what nobody tells.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 30 s", what)
		}
	}
}
