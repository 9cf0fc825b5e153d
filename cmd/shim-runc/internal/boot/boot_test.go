package boot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/cmd/shim-runc/internal/engine"
	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/version"
)

func init() { engine.InitHook() }

var (
	binary string // shim-runc
	rootfs string // of busybox
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "shim-boot-test-")
	if err == nil {
		defer func() { _ = os.RemoveAll(dir) }()
		binary, err = shimbin.Build(dir, shimbin.Race)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	rootfs = filepath.Join(dir, "rootfs")
	code := m.Run()
	for _, l := range shimbin.Leftovers(dir) {
		fmt.Fprintln(os.Stderr, "left behind:", l)
		code = 1
	}
	return code
}

func TestCommandLine(t *testing.T) {
	for _, c := range []struct {
		args   string
		status int
		says   string
	}{
		{"", 2, "no verb"},
		{"-namespace n -id i dance", 2, `unknown verb "dance"`},
		{"-namespace n -id i serve now", 2, "one verb"},
		{"start", 2, "-namespace and -id"},
		{"-namespace n start", 2, "-namespace and -id"},
		{"-namespace n -id ../i start", 2, "not a name"},
		{"-namespace .. -id i delete", 2, "not a name"},
		{"-colour red", 2, "colour"},
		{"-help", 0, "usage"},
		{"-namespace n -id i -bundle /no/such serve", 1, "/no/such"},
	} {
		var out, errs bytes.Buffer
		if got := Main(strings.Fields(c.args), strings.NewReader(""), &out, &errs); got != c.status || !strings.Contains(errs.String(), c.says) {
			t.Errorf("%q: status %d, %q", c.args, got, errs.String())
		}
	}
	for _, flag := range []string{"-v", "-version", "--version"} {
		var out bytes.Buffer
		if got := Main([]string{flag}, strings.NewReader(""), &out, io.Discard); got != 0 || !strings.Contains(out.String(), version.Version) || version.Revision == "" {
			t.Errorf("%s: status %d, %q", flag, got, out.String())
		}
	}
}

func TestInfo(t *testing.T) {
	opts, err := typeurl.MarshalAnyToProto(&options.Options{SystemdCgroup: true})
	if err != nil {
		t.Fatal(err)
	}
	in, err := proto.Marshal(opts)
	if err != nil {
		t.Fatal(err)
	}
	for _, in := range [][]byte{nil, in} {
		var out, errs bytes.Buffer
		if got := Main([]string{"-info"}, bytes.NewReader(in), &out, &errs); got != 0 {
			t.Fatalf("status %d, %s", got, errs.String())
		}
		var about types.RuntimeInfo
		if err := proto.Unmarshal(out.Bytes(), &about); err != nil {
			t.Fatal(err)
		}
		var f features.Features
		if err := json.Unmarshal(about.Features.Value, &f); err != nil || f.OCIVersionMin != "1.0.0" || !*f.Linux.Cgroup.V2 || len(f.Linux.Namespaces) < 6 {
			t.Errorf("features: %+v, %v", f, err)
		}
		if about.Name != "io.containerd.runc.v2" || about.Version.Version == "" || (about.Options != nil) != (in != nil) {
			t.Errorf("info: %v", &about)
		}
	}
	if got := Main([]string{"-info"}, strings.NewReader("\xff"), io.Discard, io.Discard); got != 1 {
		t.Errorf("malformed options: status %d", got)
	}
}

// TestInfoExternal: the runtime that the options name is described, in both forms of the options; one that cannot say what it
// has is named at least, and one that is missing is an error.
func TestInfoExternal(t *testing.T) {
	ask := func(t *testing.T, opts any) (*types.RuntimeInfo, int, string) {
		t.Helper()
		any, err := typeurl.MarshalAnyToProto(opts)
		if err != nil {
			t.Fatal(err)
		}
		in, err := proto.Marshal(any)
		if err != nil {
			t.Fatal(err)
		}
		var out, errs bytes.Buffer
		status := Main([]string{"-info"}, bytes.NewReader(in), &out, &errs)
		var about types.RuntimeInfo
		if err := proto.Unmarshal(out.Bytes(), &about); err != nil {
			t.Fatal(err)
		}
		return &about, status, errs.String()
	}
	dir := t.TempDir()
	says := func(name, features string) string {
		path := filepath.Join(dir, name)
		script := "#!/bin/sh\ncase $1 in --version) printf '" + name + " version 9.8\\ncommit: x\\n' ;; features) " + features + " ;; *) exit 1 ;; esac\n"
		if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	full, poor := says("full", `echo '{"ociVersionMin":"0.9.9"}'`), says("poor", "exit 1")
	for _, opts := range []any{&options.Options{BinaryName: full}, &runtimeoptions.Options{ConfigBody: []byte("BinaryName = \"" + full + "\"")}} {
		about, status, errs := ask(t, opts)
		var f features.Features
		if status != 0 || json.Unmarshal(about.Features.GetValue(), &f) != nil || f.OCIVersionMin != "0.9.9" {
			t.Errorf("%T: status %d, %s, features %+v", opts, status, errs, f)
		}
		if a := about.Annotations; a[annotationRuntime] != full || a[annotationRuntimeVersion] != "full version 9.8" || a[shimapi.AnnotationServe] != "true" {
			t.Errorf("%T: annotations %v", opts, a)
		}
	}
	if about, status, errs := ask(t, &options.Options{BinaryName: poor}); status != 0 || about.Features != nil || about.Annotations[annotationRuntime] != poor {
		t.Errorf("one that does not know its features: status %d, %s, %v", status, errs, about)
	}
	if _, status, errs := ask(t, &options.Options{BinaryName: "/no/such/runtime"}); status != 1 || !strings.Contains(errs, "/no/such/runtime") || !strings.Contains(errs, "BinaryName") {
		t.Errorf("one that is missing: status %d, %q", status, errs)
	}
	for _, name := range []string{"crun", "runc"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatalf("%v (Debian: apt-get install %s)", err, name)
		}
		if about, status, errs := ask(t, &options.Options{BinaryName: path}); status != 0 || !strings.Contains(about.Annotations[annotationRuntimeVersion], name) {
			t.Errorf("%s: status %d, %s, %v", name, status, errs, about)
		}
	}
}

// bundle is a bundle that containerd's verbs work on.
type bundle struct {
	t       *testing.T
	id, dir string
}

func newBundle(t *testing.T, id string, args ...string) *bundle {
	t.Helper()
	if _, err := os.Stat(rootfs); err != nil {
		shimbin.Rootfs(t, rootfs)
	}
	b := &bundle{t, id, filepath.Join(t.TempDir(), id)}
	spec := shimbin.Spec(id, args...)
	spec.Root.Path = rootfs
	shimbin.Bundle(t, b.dir, spec)
	return b
}

// run runs a verb as containerd does.
func (b *bundle) run(verb string, env ...string) []byte {
	b.t.Helper()
	cmd := exec.Command(binary, "-namespace", "boot", "-id", b.id, "-address", b.dir, "-bundle", b.dir, verb)
	cmd.Dir, cmd.Env = b.dir, append(os.Environ(), env...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		b.t.Fatalf("%s: %v\n%s", verb, err, errs.String())
	}
	return out
}

// started runs "start" and connects.
func (b *bundle) started(env ...string) (*shimapi.Client, shimapi.BootstrapParams) {
	b.t.Helper()
	p, err := shimapi.ParseBootstrap(b.run("start", env...))
	if err != nil {
		b.t.Fatal(err)
	}
	c, err := shimapi.Dial(context.Background(), p)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = c.Close() })
	return c, p
}

func (b *bundle) cleanup() *task.DeleteResponse {
	b.t.Helper()
	resp := &task.DeleteResponse{}
	if err := proto.Unmarshal(b.run("delete"), resp); err != nil {
		b.t.Fatal(err)
	}
	return resp
}

// gone waits for the process that c is connected to.
func gone(t *testing.T, c *shimapi.Client, p shimapi.BootstrapParams) {
	t.Helper()
	select {
	case <-c.Gone():
	case <-time.After(20 * time.Second):
		t.Fatal("the shim lives on")
	}
	if _, err := os.Stat(strings.TrimPrefix(p.Address, "unix://")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket is left: %v", err)
	}
}

func TestStart(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		env     string
		version int
	}{{"X=1", 2}, {"MAX_SHIM_VERSION=2", 2}, {"MAX_SHIM_VERSION=3", 3}} {
		id := fmt.Sprintf("start-%d", c.version) + strings.TrimRight(c.env, "=123")
		b := newBundle(t, id, "sh", "-c", "exit 5")
		client, p := b.started(c.env)
		if p.Version != c.version {
			t.Errorf("%s: version %d", c.env, p.Version)
		}
		for _, name := range []string{shimapi.BootstrapFile, shimapi.AddressFile} {
			data, err := os.ReadFile(filepath.Join(b.dir, name))
			if kept, perr := shimapi.ParseBootstrap(data); err != nil || perr != nil || kept.Address != p.Address {
				t.Errorf("%s: %q, %v, %v", name, data, err, perr)
			}
		}
		if _, err := client.Create(ctx, &task.CreateTaskRequest{ID: id, Bundle: b.dir}); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Start(ctx, &task.StartRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
		w, err := client.Wait(ctx, &task.WaitRequest{ID: id})
		if err != nil || w.ExitStatus != 5 {
			t.Errorf("wait: %v, %v", w, err)
		}
		conn, err := client.Connect(ctx, &task.ConnectRequest{ID: id})
		if err != nil || conn.ShimPid == 0 {
			t.Errorf("connect: %v, %v", conn, err)
		}
		if sid, err := unix.Getsid(int(conn.ShimPid)); err != nil || sid != int(conn.ShimPid) {
			t.Errorf("session of the shim is %d, its pid %d: %v", sid, conn.ShimPid, err)
		}
		if _, err := client.Delete(ctx, &task.DeleteRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Shutdown(ctx, &task.ShutdownRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
		gone(t, client, p)
	}
}

// TestStartBootstrap: a daemon that sends BootstrapParams is answered with a BootstrapResult, its socket directory and event
// socket are used, and one that sends options, in either form, as before.
func TestStartBootstrap(t *testing.T) {
	dir, err := os.MkdirTemp("", "boot") // short: a socket's name has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	sockets, address := filepath.Join(dir, "s"), filepath.Join(dir, "events")
	start := func(id string, in proto.Message, env ...string) []byte {
		t.Helper()
		b := newBundle(t, id, "true")
		data, err := proto.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(binary, "-namespace", "boot", "-id", id, "-address", b.dir, "-bundle", b.dir, "start")
		cmd.Dir, cmd.Env, cmd.Stdin = b.dir, append(os.Environ(), env...), bytes.NewReader(data)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v: %s", err, err.(*exec.ExitError).Stderr)
		}
		t.Cleanup(func() { b.cleanup() })
		return out
	}
	shimOf := func(address string) *task.ConnectResponse {
		t.Helper()
		c, err := shimapi.Dial(context.Background(), shimapi.BootstrapParams{Version: 3, Address: address, Protocol: "ttrpc"})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		resp, err := c.Connect(context.Background(), &task.ConnectRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	params := func(id, ns string) *bootstrap.BootstrapParams {
		return &bootstrap.BootstrapParams{
			InstanceID: id, Namespace: ns, LogLevel: bootstrap.LogLevel_LOG_LEVEL_TRACE, SocketDir: &sockets,
			ContainerdTtrpcAddress: "unix://" + address,
		}
	}
	var result bootstrap.BootstrapResult
	if err := proto.Unmarshal(start("params", params("params", "boot")), &result); err != nil {
		t.Fatal(err)
	}
	if result.Version != 3 || result.Protocol != "ttrpc" || !strings.HasPrefix(result.Address, "unix://"+sockets+"/") {
		t.Errorf("result: %v", &result)
	}
	pid := shimOf(result.Address).ShimPid
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err != nil || !strings.Contains(string(env), shimapi.EnvTTRPCAddress+"="+address+"\x00") {
		t.Errorf("environment of the shim: %q, %v", env, err)
	}
	if argv, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err != nil || !strings.Contains(string(argv), "-debug") {
		t.Errorf("command line of the shim: %q, %v", argv, err)
	}
	opts := func(v any) proto.Message {
		t.Helper()
		any, err := typeurl.MarshalAnyToProto(v)
		if err != nil {
			t.Fatal(err)
		}
		return any
	}
	for id, in := range map[string]proto.Message{
		"options": opts(&options.Options{SystemdCgroup: true}), "toml": opts(&runtimeoptions.Options{TypeUrl: "x", ConfigPath: "/y"}),
		"others": params("params", "boot"), // of another container: not for this verb
	} {
		p, err := shimapi.ParseBootstrap(start(id, in, "MAX_SHIM_VERSION=3"))
		if err != nil || p.Version != 3 || !strings.HasPrefix(p.Address, "unix://"+socketState) {
			t.Errorf("%s: %+v, %v", id, p, err)
		}
	}
}

// TestDeleteLive: a shim that lives when the daemon cleans up after it ends with its container.
func TestDeleteLive(t *testing.T) {
	ctx := context.Background()
	b := newBundle(t, "live", "sleep", "1000")
	client, p := b.started()
	if _, err := client.Create(ctx, &task.CreateTaskRequest{ID: "live", Bundle: b.dir}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Start(ctx, &task.StartRequest{ID: "live"}); err != nil {
		t.Fatal(err)
	}
	if resp := b.cleanup(); resp.ExitStatus != 137 || resp.Pid == 0 {
		t.Errorf("delete: %v", resp)
	}
	gone(t, client, p)
	if resp := b.cleanup(); resp.ExitStatus != 137 { // a second time is no error
		t.Errorf("second delete: %v", resp)
	}
}

// TestDeleteDead: what a killed shim leaves is taken away, and the exit that its ledger knows is told.
func TestDeleteDead(t *testing.T) {
	ctx := context.Background()
	for _, exited := range []bool{false, true} {
		id := fmt.Sprint("dead-", exited)
		b := newBundle(t, id, "sh", "-c", map[bool]string{true: "exit 6", false: "sleep 1000"}[exited])
		client, p := b.started()
		if _, err := client.Create(ctx, &task.CreateTaskRequest{ID: id, Bundle: b.dir}); err != nil {
			t.Fatal(err)
		}
		started, err := client.Start(ctx, &task.StartRequest{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		want := uint32(137)
		if exited {
			want = 6
			if _, err := client.Wait(ctx, &task.WaitRequest{ID: id}); err != nil {
				t.Fatal(err)
			}
		}
		conn, err := client.Connect(ctx, &task.ConnectRequest{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Kill(int(conn.ShimPid), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-client.Gone()
		if !exited {
			if err := unix.Kill(int(started.Pid), 0); err != nil {
				t.Errorf("the container did not outlive its shim: %v", err)
			}
		}
		if resp := b.cleanup(); resp.ExitStatus != want || resp.Pid != started.Pid {
			t.Errorf("exited %v: delete: %v", exited, resp)
		}
		gone(t, client, p)
		if err := unix.Kill(int(started.Pid), 0); err == nil && alive(int(started.Pid)) {
			t.Errorf("process %d lives on", started.Pid)
		}
	}
}

// alive tells a process from a zombie that nobody has waited for yet.
func alive(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(data), ") Z ")
}

// TestListener: descriptor 3 must be a socket that listens.
func TestListener(t *testing.T) {
	b := newBundle(t, "fd3", "true")
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = null.Close() }()
	cmd := exec.Command(binary, "-namespace", "boot", "-id", "fd3", "-bundle", b.dir, "serve")
	cmd.ExtraFiles = []*os.File{null}
	log, err := os.OpenFile(filepath.Join(b.dir, shimapi.LogFIFO), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	if err := cmd.Run(); err == nil {
		t.Error("served on /dev/null")
	}
	said, _ := io.ReadAll(log)
	if !strings.Contains(string(said), "descriptor 3") {
		t.Errorf("the log says %q", said)
	}
}
