//go:build vmguest

package guest

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/spec"
)

const (
	socket      = "/run/managerd/managerd.sock" // what managerd.socket holds
	namespace   = "default"
	snapshotter = "overlayfs"
)

// step is the time for one call; everything is slow here, so that it only keeps a hang from lasting for ever.
const step = 60 * time.Second

// client calls managerd. Its calls wait for one that serves.
type client struct {
	t          *testing.T
	containers containersapi.ContainersClient
	snapshots  snapshotsapi.SnapshotsClient
	tasks      tasksapi.TasksClient
	version    versionapi.VersionClient
}

func dial(opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+socket, append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
}

func newClient(t *testing.T) *client {
	t.Helper()
	conn, err := dial(grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &client{
		t: t, containers: containersapi.NewContainersClient(conn), snapshots: snapshotsapi.NewSnapshotsClient(conn),
		tasks: tasksapi.NewTasksClient(conn), version: versionapi.NewVersionClient(conn),
	}
}

// limited gives the context of one call.
func limited() (context.Context, context.CancelFunc) {
	return context.WithTimeout(namespaces.With(context.Background(), namespace), step)
}

// call makes one call that must succeed.
func call[Q, A any](c *client, fn func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) A {
	c.t.Helper()
	ctx, cancel := limited()
	defer cancel()
	answer, err := fn(ctx, request)
	if err != nil {
		c.t.Fatalf("%T: %v", request, err)
	}
	return answer
}

func encode(t *testing.T, url string, v any) *anypb.Any {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/" + url, Value: data}
}

// image is the snapshot of the image that was imported.
func (c *client) image() string {
	c.t.Helper()
	ctx, cancel := limited()
	defer cancel()
	list, err := c.snapshots.List(ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: snapshotter})
	if err != nil {
		c.t.Fatal(err)
	}
	for {
		resp, err := list.Recv()
		if err != nil {
			c.t.Fatalf("the image has no snapshot: %v", err)
		}
		for _, i := range resp.Info {
			if i.Kind == snapshotsapi.Kind_COMMITTED {
				return i.Name
			}
		}
	}
}

// make makes a container that runs a script, and no task yet.
func (c *client) make(id, script string, systemd bool, opts ...spec.Option) {
	c.t.Helper()
	opts = append([]spec.Option{spec.Args("/bin/sh", "-c", script), spec.Env("PATH=/bin")}, opts...)
	runtime := &containersapi.Container_Runtime{Name: "io.containerd.runc.v2"}
	if systemd {
		o, err := typeurl.MarshalAnyToProto(&options.Options{SystemdCgroup: true})
		if err != nil {
			c.t.Fatal(err)
		}
		runtime.Options = o
		opts = append(opts, spec.CgroupsPath("system.slice:test:"+id))
	}
	s, err := spec.New(id, namespace, opts...)
	if err != nil {
		c.t.Fatal(err)
	}
	call(c, c.snapshots.Prepare, &snapshotsapi.PrepareSnapshotRequest{
		Snapshotter: snapshotter, Key: id, Parent: c.image(), Labels: map[string]string{"containerd.io/gc.root": "test"},
	})
	call(c, c.containers.Create, &containersapi.CreateContainerRequest{Container: &containersapi.Container{
		ID: id, Snapshotter: snapshotter, SnapshotKey: id, Spec: encode(c.t, "Spec", s), Runtime: runtime,
	}})
}

// start makes the task of a container and starts it; it gives the pid.
func (c *client) start(id string) int {
	c.t.Helper()
	m := call(c, c.snapshots.Mounts, &snapshotsapi.MountsRequest{Snapshotter: snapshotter, Key: id})
	pid := call(c, c.tasks.Create, &tasksapi.CreateTaskRequest{ContainerID: id, Rootfs: m.Mounts}).Pid
	call(c, c.tasks.Start, &tasksapi.StartRequest{ContainerID: id})
	return int(pid)
}

func (c *client) run(id, script string, systemd bool, opts ...spec.Option) int {
	c.t.Helper()
	c.make(id, script, systemd, opts...)
	return c.start(id)
}

var execs int

// exec runs a script in a container and gives its exit status.
func (c *client) exec(id, script string) uint32 {
	c.t.Helper()
	execs++
	name := fmt.Sprint("e", execs)
	call(c, c.tasks.Exec, &tasksapi.ExecProcessRequest{ContainerID: id, ExecID: name, Spec: encode(c.t, "Process", &specs.Process{
		Args: []string{"/bin/sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin"},
		Capabilities: &specs.LinuxCapabilities{
			Bounding: []string{"CAP_MKNOD"}, Permitted: []string{"CAP_MKNOD"}, Effective: []string{"CAP_MKNOD"},
		},
	})})
	call(c, c.tasks.Start, &tasksapi.StartRequest{ContainerID: id, ExecID: name})
	c.waitFor(id, name)
	return call(c, c.tasks.DeleteProcess, &tasksapi.DeleteProcessRequest{ContainerID: id, ExecID: name}).ExitStatus
}

func (c *client) wait(id string) uint32 { return c.waitFor(id, "") }

// waitFor waits for the end of a process. A daemon that stops ends the waits, with Unavailable: one asks the next.
func (c *client) waitFor(id, execID string) uint32 {
	c.t.Helper()
	ctx, cancel := limited()
	defer cancel()
	for {
		resp, err := c.tasks.Wait(ctx, &tasksapi.WaitRequest{ContainerID: id, ExecID: execID})
		if err == nil {
			return resp.ExitStatus
		}
		if status.Code(err) != codes.Unavailable {
			c.t.Fatalf("waiting for %s %s: %v", id, execID, err)
		}
	}
}

// remove takes a container away whose process has ended; it gives the status.
func (c *client) remove(id string) uint32 {
	c.t.Helper()
	status := call(c, c.tasks.Delete, &tasksapi.DeleteTaskRequest{ContainerID: id}).ExitStatus
	// In this order: the container is what keeps the snapshot from being collected.
	call(c, c.snapshots.Remove, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: id})
	call(c, c.containers.Delete, &containersapi.DeleteContainerRequest{ID: id})
	return status
}

// finish kills a container and takes it away.
func (c *client) finish(id string) {
	c.t.Helper()
	call(c, c.tasks.Kill, &tasksapi.KillRequest{ContainerID: id, Signal: 9})
	if s := c.wait(id); s != 137 {
		c.t.Errorf("%s, killed, ended with %d", id, s)
	}
	c.remove(id)
}

// metrics gives a container's metrics as a message of the kind that T is.
func metrics[T proto.Message](c *client, id string) T {
	c.t.Helper()
	m := call(c, c.tasks.Metrics, &tasksapi.MetricsRequest{Filters: []string{"id==" + id}}).Metrics
	if len(m) != 1 {
		c.t.Fatalf("%d metrics of %s", len(m), id)
	}
	v, err := typeurl.UnmarshalAny(m[0].Data)
	if err != nil {
		c.t.Fatal(err)
	}
	kind, ok := v.(T)
	if !ok {
		c.t.Fatalf("metrics are a %T", v)
	}
	return kind
}
