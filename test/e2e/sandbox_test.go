package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	events "github.com/containerd/containerd/api/services/events/v1"
	api "github.com/containerd/containerd/api/services/sandbox/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
)

// sandboxes are the two services, as a client sees them.
type sandboxes struct {
	api.StoreClient
	c   api.ControllerClient
	ctx context.Context
}

func (u *user) sandboxes() sandboxes {
	u.t.Helper()
	conn, err := u.Conn()
	if err != nil {
		u.t.Fatal(err)
	}
	return sandboxes{api.NewStoreClient(conn), api.NewControllerClient(conn), u.Context(context.Background())}
}

// topics collects the events of sandboxes.
func (u *user) topics() func() []string {
	u.t.Helper()
	conn, err := u.Conn()
	if err != nil {
		u.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(u.Context(context.Background()))
	u.t.Cleanup(cancel)
	stream, err := events.NewEventsClient(conn).Subscribe(ctx, &events.SubscribeRequest{Filters: []string{`topic~="^/sandboxes/"`}})
	if err != nil {
		u.t.Fatal(err)
	}
	got := make(chan string, 100)
	go func() {
		defer close(got)
		for e, err := stream.Recv(); err == nil; e, err = stream.Recv() {
			what := e.Topic
			if e.Topic == "/sandboxes/exit" {
				var x eventsapi.SandboxExit
				if e.Event.UnmarshalTo(&x) == nil {
					what += fmt.Sprintf(" %s %d", x.SandboxID, x.ExitStatus)
				}
			}
			got <- what
		}
	}()
	var all []string
	return func() []string {
		for {
			select {
			case e, ok := <-got:
				if !ok {
					return all
				}
				all = append(all, e)
			default:
				return all
			}
		}
	}
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 60 s", what)
		}
	}
}

// sandboxShim is the process of a sandbox's shim.
func (u *user) sandboxShim(id string) int {
	u.t.Helper()
	dir := filepath.Join(u.State(), "io.containerd.sandbox.controller.v1.shim", u.Namespace, id)
	for _, pid := range u.Shims() {
		if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err == nil && cwd == dir {
			return pid
		}
	}
	return 0
}

// TestSandbox: a sandbox and two members by mctl, through the death of its shim, of the daemon, and of both; what the events
// tell is told once.
func TestSandbox(t *testing.T) {
	u := newUser(t)
	defer u.clear()
	if got := u.mctl("sandboxes", "run", "--hostname", "pod", "--shm-size", "1MiB", "--sysctl", "net.ipv4.ip_forward=1", "--label", "app=web", "p1"); got != "p1\n" {
		t.Errorf("run: %q", got)
	}
	member := func(id string) {
		u.mctl("run", "-d", "--sandbox", "p1", "-m", "64MiB", ref, id, "sleep", "1000")
	}
	look := func(id string) string {
		return u.mctl("tasks", "exec", "--exec-id", "look", id, "sh", "-c", "hostname; for n in net ipc uts; do readlink /proc/self/ns/$n; done; cat /dev/shm/x")
	}
	member("one")
	u.mctl("tasks", "exec", "--exec-id", "w", "one", "sh", "-c", "echo shared > /dev/shm/x")
	first := look("one")
	if !strings.HasPrefix(first, "pod\n") || !strings.HasSuffix(first, "\nshared\n") {
		t.Errorf("a member sees %q", first)
	}
	for i, kill := range []func(){
		func() { kill9(t, u.sandboxShim("p1")) },
		func() { _ = u.Kill(); u.start() },
		func() { pid := u.sandboxShim("p1"); _ = u.Kill(); kill9(t, pid); u.start() },
	} {
		before := u.sandboxShim("p1")
		kill()
		u.mctl("sandboxes", "ping", "p1")
		if i != 1 {
			await(t, "a successor", func() bool { pid := u.sandboxShim("p1"); return pid != 0 && pid != before })
		}
		if id := fmt.Sprintf("more%d", i); true {
			member(id)
			if got := look(id); got != first {
				t.Errorf("after death %d a new member sees %q, the old one %q", i, got, first)
			}
		}
	}
	var rows []struct {
		ID, State, Runtime string
		Labels             map[string]string
	}
	if err := json.Unmarshal([]byte(u.mctl("-o", "json", "sandboxes", "ls", "labels.app==web")), &rows); err != nil || len(rows) != 1 ||
		rows[0].ID != "p1" || rows[0].State != "ready" || rows[0].Labels["app"] != "web" {
		t.Errorf("ls: %+v, %v", rows, err)
	}
	if got := u.mctl("sandboxes", "ls", "-q", "labels.app==db"); got != "" {
		t.Errorf("ls of others: %q", got)
	}
	var info struct {
		State, Address string
		Spec           specs.Spec
	}
	if err := json.Unmarshal([]byte(u.mctl("sandboxes", "info", "p1")), &info); err != nil || info.State != "SANDBOX_READY" ||
		!strings.HasPrefix(info.Address, "ttrpc+unix://") || len(info.Spec.Linux.Namespaces) != 3 || info.Spec.Linux.Namespaces[0].Path == "" {
		t.Errorf("info: %+v, %v", info, err)
	}
	if got := u.mctl("sandboxes", "metrics", "p1"); !strings.Contains(got, "pids.current") {
		t.Errorf("metrics: %q", got)
	}
	if got := u.failing(1, u.Mctl("sandboxes", "rm", "p1")); !strings.Contains(got, "more0, more1, more2, one") {
		t.Errorf("rm with members: %q", got)
	}
	conn, err := u.Conn()
	if err != nil {
		t.Fatal(err)
	}
	all, err := containersapi.NewContainersClient(conn).List(u.Context(context.Background()), &containersapi.ListContainersRequest{Filters: []string{"sandbox==p1"}})
	if err != nil || len(all.Containers) != 4 || all.Containers[0].Sandbox != "p1" {
		t.Errorf("containers of the sandbox: %v, %v", all, err)
	}
	// Stopped with members still in: they run on.
	u.mctl("sandboxes", "stop", "p1")
	u.mctl("sandboxes", "wait", "p1")
	if got := look("one"); got != first {
		t.Errorf("after the stop a member sees %q", got)
	}
	if got := u.failing(1, u.Mctl("sandboxes", "ping", "p1")); !strings.Contains(got, "notready") {
		t.Errorf("ping: %q", got)
	}
	_ = u.Kill()
	u.start()
	u.mctl("sandboxes", "wait", "p1") // is known after all that
	members := []string{"one", "more0", "more1", "more2"}
	u.mctl(append([]string{"tasks", "rm", "-f"}, members...)...)
	u.mctl(append([]string{"containers", "rm"}, members...)...)
	u.mctl("sandboxes", "rm", "p1")
	if got := u.failing(1, u.Mctl("sandboxes", "info", "p1")); !strings.Contains(got, "p1") || !strings.Contains(got, "mctl sandboxes ls") {
		t.Errorf("info of what is gone: %q", got)
	}
	var topics []string
	for _, line := range strings.Split(u.mctl("-o", "json", "events", "--since", "1h", "--no-follow", `topic~="^/sandboxes/"`), "\n") {
		var e struct{ Topic string }
		if line != "" && json.Unmarshal([]byte(line), &e) == nil {
			topics = append(topics, e.Topic)
		}
	}
	if got := strings.Join(topics, " "); got != "/sandboxes/create /sandboxes/start /sandboxes/exit" {
		t.Errorf("events: %q", got)
	}
}

func kill9(t *testing.T, pid int) {
	t.Helper()
	if pid == 0 {
		t.Fatal("no shim")
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// clear takes away all that the test has made, if the daemon serves still.
func (u *user) clear() {
	u.t.Helper()
	if err := u.Clear(context.Background()); err != nil {
		u.t.Error(err)
	}
}

func (u *user) start() {
	u.t.Helper()
	if err := u.Start(); err != nil {
		u.t.Fatal(err)
	}
}

// TestSandboxWait: whoever waits for a sandbox is told how its init ended, although its shim was killed meanwhile.
func TestSandboxWait(t *testing.T) {
	u := newUser(t)
	defer u.clear()
	told := u.topics()
	u.mctl("sandboxes", "run", "--pid", "p2")
	u.mctl("run", "-d", "--sandbox", "p2", ref, "in", "sleep", "1000")
	s := u.sandboxes()
	ended := make(chan string, 1)
	go func() {
		w, err := s.c.Wait(s.ctx, &api.ControllerWaitRequest{SandboxID: "p2", Sandboxer: "shim"})
		ended <- fmt.Sprint(w.GetExitStatus(), err)
	}()
	before := u.sandboxShim("p2")
	kill9(t, before)
	await(t, "a successor", func() bool { pid := u.sandboxShim("p2"); return pid != 0 && pid != before })
	st, err := s.c.Status(s.ctx, &api.ControllerStatusRequest{SandboxID: "p2", Sandboxer: "shim"})
	if err != nil || st.Pid == 0 {
		t.Fatalf("%v, %v", st, err)
	}
	kill9(t, int(st.Pid))
	if got := <-ended; got != "137 <nil>" {
		t.Errorf("wait: %s", got)
	}
	await(t, "the exit is told", func() bool {
		all := told()
		return len(all) > 0 && all[len(all)-1] == "/sandboxes/exit p2 137"
	})
	if got := strings.Join(told(), ", "); got != "/sandboxes/create, /sandboxes/start, /sandboxes/exit p2 137" {
		t.Errorf("events: %s", got)
	}
	u.failing(137, u.Mctl("tasks", "wait", "in")) // it ended with the init
}

// TestSandboxAPI: the store and the controller, by their own rules.
func TestSandboxAPI(t *testing.T) {
	u := newUser(t)
	defer u.clear()
	s := u.sandboxes()
	spec := func(text string) *anypb.Any {
		return &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: []byte(text)}
	}
	code := func(what string, err error, want codes.Code, says string) {
		t.Helper()
		if status.Code(err) != want || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %v with %q", what, err, want, says)
		}
	}
	_, err := s.Create(s.ctx, &api.StoreCreateRequest{})
	code("create of nothing", err, codes.InvalidArgument, "sandbox")
	_, err = s.Create(s.ctx, &api.StoreCreateRequest{Sandbox: &types.Sandbox{SandboxID: "a/b"}})
	code("create of a bad name", err, codes.InvalidArgument, "a/b")
	_, err = s.Create(context.Background(), &api.StoreCreateRequest{Sandbox: &types.Sandbox{SandboxID: "x"}})
	code("create in no namespace", err, codes.FailedPrecondition, "namespace")
	made, err := s.Create(s.ctx, &api.StoreCreateRequest{Sandbox: &types.Sandbox{
		SandboxID: "x", Labels: map[string]string{"a": "1", "b": "2"}, Spec: spec(`{"hostname":"x"}`), Sandboxer: "shim",
		Extensions: map[string]*anypb.Any{"e": {TypeUrl: "t", Value: []byte("v")}}, Runtime: &types.Sandbox_Runtime{Name: "io.containerd.runc.v2"},
	}})
	if err != nil || made.Sandbox.CreatedAt.AsTime().IsZero() {
		t.Fatalf("%v, %v", made, err)
	}
	_, err = s.Create(s.ctx, &api.StoreCreateRequest{Sandbox: &types.Sandbox{SandboxID: "x"}})
	code("create again", err, codes.AlreadyExists, "x")
	up, err := s.Update(s.ctx, &api.StoreUpdateRequest{
		Sandbox: &types.Sandbox{SandboxID: "x", Labels: map[string]string{"a": "3"}}, Fields: []string{"labels.a", "labels.b"},
	})
	if err != nil || len(up.Sandbox.Labels) != 1 || up.Sandbox.Labels["a"] != "3" || len(up.Sandbox.Extensions) != 1 || !up.Sandbox.UpdatedAt.AsTime().After(up.Sandbox.CreatedAt.AsTime()) {
		t.Errorf("update: %v, %v", up, err)
	}
	for _, field := range []string{"created_at", "sandboxer", "nonsense"} {
		_, err = s.Update(s.ctx, &api.StoreUpdateRequest{Sandbox: &types.Sandbox{SandboxID: "x"}, Fields: []string{field}})
		code("update of "+field, err, codes.InvalidArgument, field)
	}
	_, err = s.Update(s.ctx, &api.StoreUpdateRequest{Sandbox: &types.Sandbox{SandboxID: "nobody"}})
	code("update of another", err, codes.NotFound, "nobody")
	other := u.Context(context.Background())
	for filter, n := range map[string]int{"id==x": 1, "labels.a==3": 1, "labels.a==1": 0, "runtime.name==io.containerd.runc.v2": 1, "sandboxer!=shim": 0} {
		l, err := s.List(other, &api.StoreListRequest{Filters: []string{filter}})
		if err != nil || len(l.List) != n {
			t.Errorf("list %s: %v, %v", filter, l, err)
		}
	}
	_, err = s.List(s.ctx, &api.StoreListRequest{Filters: []string{"id=="}})
	code("a bad filter", err, codes.InvalidArgument, "filter")

	c := s.c
	_, err = c.Create(s.ctx, &api.ControllerCreateRequest{SandboxID: "x", Sandboxer: "podsandbox"})
	code("another sandboxer", err, codes.NotFound, "podsandbox")
	_, err = c.Create(s.ctx, &api.ControllerCreateRequest{SandboxID: "nobody", Sandboxer: "shim"})
	code("create of what is not there", err, codes.NotFound, "nobody")
	for text, says := range map[string]string{"no JSON": "JSON", `{"linux":{"namespaces":[{"type":"mount"}]}}`: "mount", `{"linux":{"sysctl":{"vm.swappiness":"1"}}}`: "vm.swappiness"} {
		_, err = c.Create(s.ctx, &api.ControllerCreateRequest{SandboxID: "x", Sandboxer: "shim", Sandbox: &types.Sandbox{SandboxID: "x", Spec: spec(text)}})
		code("spec "+text, err, codes.InvalidArgument, says)
	}
	_, err = c.Create(s.ctx, &api.ControllerCreateRequest{SandboxID: "x", Sandboxer: "shim", Sandbox: &types.Sandbox{SandboxID: "x", Runtime: &types.Sandbox_Runtime{Name: "io.containerd.nosuch.v1"}}})
	code("a runtime that is not there", err, codes.NotFound, "nosuch")
	if left := u.Shims(); len(left) != 0 {
		t.Errorf("shims after creates that failed: %v", left)
	}
	st, err := c.Status(s.ctx, &api.ControllerStatusRequest{SandboxID: "x", Sandboxer: "shim"})
	if err != nil || st.State != "SANDBOX_NOTREADY" || st.Address != "" {
		t.Errorf("status of what does not run: %v, %v", st, err)
	}
	_, err = c.Status(s.ctx, &api.ControllerStatusRequest{SandboxID: "nobody"})
	code("status of what is not there", err, codes.NotFound, "nobody")
	_, err = c.Stop(s.ctx, &api.ControllerStopRequest{SandboxID: "x"})
	code("stop of what does not run", err, codes.OK, "")
	_, err = c.Wait(s.ctx, &api.ControllerWaitRequest{SandboxID: "x"})
	code("wait for what does not run", err, codes.NotFound, "x")
	_, err = c.Shutdown(s.ctx, &api.ControllerShutdownRequest{SandboxID: "x"})
	code("shutdown of what does not run", err, codes.NotFound, "x")

	if _, err = c.Create(s.ctx, &api.ControllerCreateRequest{SandboxID: "x", Sandboxer: "shim"}); err != nil { // as the store has it
		t.Fatal(err)
	}
	_, err = c.Create(s.ctx, &api.ControllerCreateRequest{SandboxID: "x", Sandboxer: "shim"})
	code("create again", err, codes.AlreadyExists, "x")
	started, err := c.Start(s.ctx, &api.ControllerStartRequest{SandboxID: "x", Sandboxer: "shim"})
	if err != nil || started.Version != 3 || !strings.HasPrefix(started.Address, "ttrpc+unix:///") || !strings.Contains(string(started.Spec.GetValue()), `"hostname":"x"`) {
		t.Errorf("start: %v, %v", started, err)
	}
	_, err = c.Start(s.ctx, &api.ControllerStartRequest{SandboxID: "x", Sandboxer: "shim"})
	code("start again", err, codes.FailedPrecondition, "running")
	p, err := c.Platform(s.ctx, &api.ControllerPlatformRequest{SandboxID: "x"})
	if err != nil || p.Platform.GetOS() != "linux" {
		t.Errorf("platform: %v, %v", p, err)
	}
	_, err = c.Metrics(s.ctx, &api.ControllerMetricsRequest{SandboxID: "x"})
	code("metrics without a cgroup", err, codes.FailedPrecondition, "cgroupsPath")
	_, err = c.Update(s.ctx, &api.ControllerUpdateRequest{SandboxID: "x", Sandbox: &types.Sandbox{SandboxID: "x", Spec: spec(`{"hostname":"y"}`)}, Fields: []string{"spec"}})
	code("update", err, codes.OK, "")
	if st, err = c.Status(s.ctx, &api.ControllerStatusRequest{SandboxID: "x", Verbose: true}); err != nil || !strings.Contains(st.Info["spec"], `"hostname":"y"`) {
		t.Errorf("status: %v, %v", st, err)
	}
	if _, err = c.Shutdown(s.ctx, &api.ControllerShutdownRequest{SandboxID: "x"}); err != nil {
		t.Error(err)
	}
	if _, err = s.Delete(s.ctx, &api.StoreDeleteRequest{SandboxID: "x"}); err != nil {
		t.Error(err)
	}
	_, err = s.Get(s.ctx, &api.StoreGetRequest{SandboxID: "x"})
	code("get of what was deleted", err, codes.NotFound, "x")
	if left := u.Left(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// TestSandboxAddress: a client that names the sandbox's address for the task of a member, as containerd's do, has it made all the
// same, with a shim of its own.
func TestSandboxAddress(t *testing.T) {
	u := newUser(t)
	defer u.clear()
	u.mctl("sandboxes", "run", "p3")
	u.mctl("containers", "create", "--sandbox", "p3", ref, "member", "sleep", "1000")
	s := u.sandboxes()
	st, err := s.c.Status(s.ctx, &api.ControllerStatusRequest{SandboxID: "p3", Sandboxer: "shim"})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := u.Conn()
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := snapshotsapi.NewSnapshotsClient(conn).Mounts(s.ctx, &snapshotsapi.MountsRequest{Snapshotter: "overlayfs", Key: "member"})
	if err != nil {
		t.Fatal(err)
	}
	//lint:ignore SA1019 clients send it all the same
	opts, err := anypb.New(&options.Options{TaskApiAddress: st.Address, TaskApiVersion: st.Version})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tasksapi.NewTasksClient(conn).Create(s.ctx, &tasksapi.CreateTaskRequest{ContainerID: "member", Rootfs: mounts.Mounts, Options: opts}); err != nil {
		t.Fatal(err)
	}
	if shims := u.Shims(); len(shims) != 2 {
		t.Errorf("shims: %v", shims)
	}
}
