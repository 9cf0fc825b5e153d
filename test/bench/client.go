package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	runc "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/archive"
	"github.com/managerd/managerd/manager/archive/remote"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/manager/spec"
	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/image"
)

const (
	snapshotter = "overlayfs"
	runtimeName = "io.containerd.runc.v2"
	// answering is how long one call may take, on a busy machine, before the measuring is given up.
	answering = time.Minute
)

// client asks a daemon what a command line client or a kubelet asks it: the same calls for both sides.
type client struct {
	home    *harness.Daemon
	conn    *grpc.ClientConn
	options *runc.Options // of the runtime; nil: none
	chain   string        // snapshot of the image's layers
}

// runcRoot is where runc keeps its state; the shim's own default has a fixed place.
func runcRoot(dir string) *runc.Options { return &runc.Options{Root: dir} }

func (c *client) context(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(namespaces.With(ctx, c.home.Namespace), answering)
}

// prepare imports and unpacks the image.
func (c *client) prepare(ctx context.Context) error {
	ctx, cancel := c.context(ctx)
	defer cancel()
	lease, err := leasesapi.NewLeasesClient(c.conn).Create(ctx, &leasesapi.CreateRequest{ID: "bench"})
	if err != nil {
		return err
	}
	ctx = leases.With(ctx, lease.Lease.ID)
	r, w := io.Pipe()
	go func() { _ = w.CloseWithError(image.WriteTo(w, image.Options{})) }()
	content := remote.NewContent(c.conn)
	images, err := archive.Import(ctx, content, remote.NewImages(c.conn), r, archive.ImportOptions{})
	_ = r.Close()
	if err != nil {
		return err
	}
	if len(images) != 1 {
		return fmt.Errorf("the archive held %d images", len(images))
	}
	if c.chain, err = archive.Unpack(ctx, content, remote.NewSnapshotter(c.conn, snapshotter), images[0].Target); err != nil {
		return err
	}
	_, err = leasesapi.NewLeasesClient(c.conn).Delete(ctx, &leasesapi.DeleteRequest{ID: lease.Lease.ID})
	return err
}

// log is the file that a container, and its execs, write to.
func (c *client) log(id string) string { return filepath.Join(c.home.Dir, "out-"+id) }

// record makes a container's snapshot and record: what comes before its task.
func (c *client) record(ctx context.Context, id string, seccomp bool) ([]*types.Mount, error) {
	ctx, cancel := c.context(ctx)
	defer cancel()
	snap, err := snapshotsapi.NewSnapshotsClient(c.conn).Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{
		Snapshotter: snapshotter, Key: id, Parent: c.chain,
		Labels: map[string]string{"containerd.io/gc.root": "bench"}, // nobody refers to it before the container does
	})
	if err != nil {
		return nil, err
	}
	opts := []spec.Option{spec.Args("/bin/sleep", "100000")}
	if seccomp {
		opts = append(opts, spec.Seccomp("default"))
	}
	s, err := spec.New(id, c.home.Namespace, opts...)
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	runtime := &containersapi.Container_Runtime{Name: runtimeName}
	if c.options != nil {
		if runtime.Options, err = typeurl.MarshalAnyToProto(c.options); err != nil {
			return nil, err
		}
	}
	_, err = containersapi.NewContainersClient(c.conn).Create(ctx, &containersapi.CreateContainerRequest{Container: &containersapi.Container{
		ID: id, Image: image.Default, Snapshotter: snapshotter, SnapshotKey: id, Runtime: runtime,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: body},
	}})
	return snap.GetMounts(), err
}

func (c *client) tasks() tasksapi.TasksClient { return tasksapi.NewTasksClient(c.conn) }

// run makes the task and starts it.
func (c *client) run(ctx context.Context, id string, rootfs []*types.Mount) error {
	ctx, cancel := c.context(ctx)
	defer cancel()
	out := "file://" + c.log(id)
	r := &tasksapi.CreateTaskRequest{ContainerID: id, Rootfs: rootfs, Stdout: out, Stderr: out}
	if c.options != nil { // containerd 1.6 takes them from here only
		var err error
		if r.Options, err = typeurl.MarshalAnyToProto(c.options); err != nil {
			return err
		}
	}
	if _, err := c.tasks().Create(ctx, r); err != nil {
		return err
	}
	_, err := c.tasks().Start(ctx, &tasksapi.StartRequest{ContainerID: id})
	return err
}

// exec starts a program in a container and waits for its end; started is called in between.
func (c *client) exec(ctx context.Context, id, execID string, started func()) error {
	ctx, cancel := c.context(ctx)
	defer cancel()
	body, err := json.Marshal(&specs.Process{
		Args: []string{"/bin/echo", execID}, Cwd: "/", Env: []string{"PATH=/bin"}, NoNewPrivileges: true,
	})
	if err != nil {
		return err
	}
	out := "file://" + c.log(id)
	if _, err := c.tasks().Exec(ctx, &tasksapi.ExecProcessRequest{
		ContainerID: id, ExecID: execID, Stdout: out, Stderr: out,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: body},
	}); err != nil {
		return err
	}
	if _, err := c.tasks().Start(ctx, &tasksapi.StartRequest{ContainerID: id, ExecID: execID}); err != nil {
		return err
	}
	started()
	w, err := c.tasks().Wait(ctx, &tasksapi.WaitRequest{ContainerID: id, ExecID: execID})
	if err == nil && w.ExitStatus != 0 {
		err = fmt.Errorf("exec %s of %s ended with %d", execID, id, w.ExitStatus)
	}
	return err
}

func (c *client) deleteExec(ctx context.Context, id, execID string) error {
	ctx, cancel := c.context(ctx)
	defer cancel()
	_, err := c.tasks().DeleteProcess(ctx, &tasksapi.DeleteProcessRequest{ContainerID: id, ExecID: execID})
	return err
}

// kill ends a task and waits for its end.
func (c *client) kill(ctx context.Context, id string) error {
	ctx, cancel := c.context(ctx)
	defer cancel()
	if _, err := c.tasks().Kill(ctx, &tasksapi.KillRequest{ContainerID: id, Signal: 9}); err != nil {
		return err
	}
	w, err := c.tasks().Wait(ctx, &tasksapi.WaitRequest{ContainerID: id})
	if err == nil && w.ExitStatus != 137 {
		err = fmt.Errorf("%s ended with %d, not by the signal that was sent", id, w.ExitStatus)
	}
	return err
}

// remove deletes an ended task.
func (c *client) remove(ctx context.Context, id string) error {
	ctx, cancel := c.context(ctx)
	defer cancel()
	_, err := c.tasks().Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: id})
	return err
}

// forget removes what record made.
func (c *client) forget(ctx context.Context, id string) error {
	ctx, cancel := c.context(ctx)
	defer cancel()
	if _, err := containersapi.NewContainersClient(c.conn).Delete(ctx, &containersapi.DeleteContainerRequest{ID: id}); err != nil {
		return err
	}
	_, err := snapshotsapi.NewSnapshotsClient(c.conn).Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: id})
	return err
}

// pids are those of the inits of all running tasks, by container.
func (c *client) pids(ctx context.Context) (map[string]int, error) {
	ctx, cancel := c.context(ctx)
	defer cancel()
	r, err := c.tasks().List(ctx, &tasksapi.ListTasksRequest{})
	if err != nil {
		return nil, err
	}
	pids := map[string]int{}
	for _, t := range r.Tasks {
		if t.Pid > 0 && t.ExitStatus == 0 {
			pids[t.ID] = int(t.Pid)
		}
	}
	return pids, nil
}

// wrote checks that the execs of a container have written their lines.
func (c *client) wrote(id, want string) error {
	got, err := os.ReadFile(c.log(id))
	if err != nil {
		return err
	}
	if string(got) != want {
		return fmt.Errorf("container %s wrote %q, not %q", id, got, want)
	}
	return os.Remove(c.log(id))
}
