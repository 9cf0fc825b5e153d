package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	containers "github.com/containerd/containerd/api/services/containers/v1"
	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	taskapi "github.com/containerd/containerd/api/types/task"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/spec"
	"github.com/managerd/managerd/test/harness"
)

const (
	specURL     = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
	processURL  = "types.containerd.io/opencontainers/runtime-spec/1/Process"
	snapshotter = "overlayfs"
	runtime     = "io.containerd.runc.v2"
)

// client is a gRPC client of a daemon, that survives restarts of it: its calls wait for the next one.
type client struct {
	ctx        context.Context // carries the namespace
	ns         string
	conn       *grpc.ClientConn
	containers containers.ContainersClient
	snapshots  snapshots.SnapshotsClient
	tasks      tasks.TasksClient
	parent     string // the snapshot of the image
}

func newClient(t *testing.T, d *harness.Daemon) *client {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+d.Socket(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 2 * time.Millisecond, Multiplier: 1.5, MaxDelay: 20 * time.Millisecond},
			MinConnectTimeout: 5 * time.Second,
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ctx, cancel := context.WithTimeout(d.Context(context.Background()), 4*time.Minute)
	t.Cleanup(cancel)
	c := &client{
		ctx: ctx, ns: d.Namespace, conn: conn, containers: containers.NewContainersClient(conn),
		snapshots: snapshots.NewSnapshotsClient(conn), tasks: tasks.NewTasksClient(conn),
	}
	list, err := c.snapshots.List(ctx, &snapshots.ListSnapshotsRequest{Snapshotter: snapshotter})
	if err != nil {
		t.Fatal(err)
	}
	for {
		resp, err := list.Recv()
		if err != nil {
			break
		}
		for _, i := range resp.Info {
			if i.Kind == snapshots.Kind_COMMITTED {
				c.parent = i.Name
			}
		}
	}
	if c.parent == "" {
		t.Fatal("the image has no snapshot")
	}
	return c
}

func encode(url string, v any) *anypb.Any {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // a struct of ours
	}
	return &anypb.Any{TypeUrl: url, Value: data}
}

// sh is the spec of a container that runs a script.
func (c *client) sh(id, script string) (*specs.Spec, error) {
	s, err := spec.New(id, c.ns, spec.Args("/bin/sh", "-c", script), spec.Env("PATH=/bin"), spec.MemoryLimit(limit))
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (c *client) prepare(id string) error {
	return c.prepareWith(id, map[string]string{"containerd.io/gc.root": "test"}) // the container, which keeps it, comes after and goes before
}

func (c *client) prepareWith(id string, labels map[string]string) error {
	_, err := c.snapshots.Prepare(c.ctx, &snapshots.PrepareSnapshotRequest{Snapshotter: snapshotter, Key: id, Parent: c.parent, Labels: labels})
	return err
}

func (c *client) mounts(id string) ([]*types.Mount, error) {
	m, err := c.snapshots.Mounts(c.ctx, &snapshots.MountsRequest{Snapshotter: snapshotter, Key: id})
	return m.GetMounts(), err
}

func (c *client) container(id string, s *specs.Spec) error {
	_, err := c.containers.Create(c.ctx, &containers.CreateContainerRequest{Container: &containers.Container{
		ID: id, Snapshotter: snapshotter, SnapshotKey: id, Spec: encode(specURL, s), Runtime: &containers.Container_Runtime{Name: runtime},
	}})
	return err
}

// make makes everything that a task needs.
func (c *client) make(id, script string) error {
	s, err := c.sh(id, script)
	if err != nil {
		return err
	}
	if err := c.prepare(id); err != nil {
		return err
	}
	return c.container(id, s)
}

func (c *client) create(id string) (uint32, error) {
	m, err := c.mounts(id)
	if err != nil {
		return 0, err
	}
	resp, err := c.tasks.Create(c.ctx, &tasks.CreateTaskRequest{ContainerID: id, Rootfs: m})
	return resp.GetPid(), err
}

func (c *client) start(id, exec string) error {
	_, err := c.tasks.Start(c.ctx, &tasks.StartRequest{ContainerID: id, ExecID: exec})
	return err
}

// run makes a container and runs it.
func (c *client) run(id, script string) (uint32, error) {
	if err := c.make(id, script); err != nil {
		return 0, err
	}
	pid, err := c.create(id)
	if err != nil {
		return 0, err
	}
	return pid, c.start(id, "")
}

func (c *client) exec(id, exec, script string) error {
	_, err := c.tasks.Exec(c.ctx, &tasks.ExecProcessRequest{ContainerID: id, ExecID: exec, Spec: encode(processURL, &specs.Process{
		Args: []string{"/bin/sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin"},
	})})
	return err
}

func (c *client) state(id, exec string) (*taskapi.Process, error) {
	resp, err := c.tasks.Get(c.ctx, &tasks.GetRequest{ContainerID: id, ExecID: exec})
	return resp.GetProcess(), err
}

func (c *client) kill(id, exec string, signal uint32) error {
	_, err := c.tasks.Kill(c.ctx, &tasks.KillRequest{ContainerID: id, ExecID: exec, Signal: signal})
	return err
}

func (c *client) wait(id, exec string) (uint32, error) {
	resp, err := c.tasks.Wait(c.ctx, &tasks.WaitRequest{ContainerID: id, ExecID: exec})
	return resp.GetExitStatus(), err
}

func (c *client) deleteTask(id string) (uint32, error) {
	resp, err := c.tasks.Delete(c.ctx, &tasks.DeleteTaskRequest{ContainerID: id})
	return resp.GetExitStatus(), err
}

func (c *client) deleteExec(id, exec string) (uint32, error) {
	resp, err := c.tasks.DeleteProcess(c.ctx, &tasks.DeleteProcessRequest{ContainerID: id, ExecID: exec})
	return resp.GetExitStatus(), err
}

func (c *client) deleteContainer(id string) error {
	_, err := c.containers.Delete(c.ctx, &containers.DeleteContainerRequest{ID: id})
	return err
}

func (c *client) removeSnapshot(id string) error {
	_, err := c.snapshots.Remove(c.ctx, &snapshots.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: id})
	return err
}

// remove takes away a container whose process has ended, or never was.
func (c *client) remove(id string) error {
	if _, err := c.deleteTask(id); err != nil && status.Code(err) != codes.NotFound {
		return fmt.Errorf("task %s: %w", id, err)
	}
	if err := c.deleteContainer(id); err != nil {
		return fmt.Errorf("container %s: %w", id, err)
	}
	return c.removeSnapshot(id)
}

// finish kills a container's process and takes all of it away.
func (c *client) finish(t *testing.T, id string) {
	t.Helper()
	if err := c.kill(id, "", 9); err != nil && status.Code(err) != codes.NotFound {
		t.Errorf("kill %s: %v", id, err)
	}
	if _, err := c.wait(id, ""); err != nil && status.Code(err) != codes.NotFound {
		t.Errorf("wait for %s: %v", id, err)
	}
	if err := c.remove(id); err != nil {
		t.Error(err)
	}
}

// has fails the test unless err has the code and its text every part.
func fails(t *testing.T, what string, err error, code codes.Code, parts ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("%s: %v, not %v: %v", what, status.Code(err), code, err)
		return
	}
	has(t, status.Convert(err).Message(), parts...)
}
