package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
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
	limit       = 64 << 20 // memory of a container, in bytes
)

// client is a gRPC client that does not know whether a call that was cut off was carried out, and asks again.
type client struct {
	ctx        context.Context // carries the namespace
	ns         string
	conn       *grpc.ClientConn
	containers containersapi.ContainersClient
	snapshots  snapshotsapi.SnapshotsClient
	tasks      tasksapi.TasksClient
	parent     string     // the snapshot of the image
	options    *anypb.Any // of the runtime of containers that are made; nil: none
	terminal   string     // the FIFOs of the terminal that they get: this and ".in", and ".out"; empty: they get none
}

// dial connects to a daemon into which the image was imported. Its calls end with ctx.
func dial(ctx context.Context, d *harness.Daemon) (*client, error) {
	conn, err := grpc.NewClient("unix://"+d.Socket(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 2 * time.Millisecond, Multiplier: 1.5, MaxDelay: 20 * time.Millisecond},
			MinConnectTimeout: 5 * time.Second,
		}))
	if err != nil {
		return nil, err
	}
	c := &client{
		ctx: d.Context(ctx), ns: d.Namespace, conn: conn, containers: containersapi.NewContainersClient(conn),
		snapshots: snapshotsapi.NewSnapshotsClient(conn), tasks: tasksapi.NewTasksClient(conn),
	}
	err = c.eachSnapshot(func(i *snapshotsapi.Info) {
		if i.Kind == snapshotsapi.Kind_COMMITTED {
			c.parent = i.Name
		}
	})
	if err == nil && c.parent == "" {
		err = errors.New("the image has no snapshot")
	}
	return c, err
}

func (c *client) eachSnapshot(fn func(*snapshotsapi.Info)) error {
	list, err := c.snapshots.List(c.ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: snapshotter})
	if err != nil {
		return err
	}
	for {
		resp, err := list.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, i := range resp.Info {
			fn(i)
		}
	}
}

func encode(url string, v any) *anypb.Any {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // a struct of ours
	}
	return &anypb.Any{TypeUrl: url, Value: data}
}

// keptByLabel keeps what nothing else does from being collected, until it is removed.
var keptByLabel = map[string]string{"containerd.io/gc.root": "test"}

func exists(err error) bool  { return status.Code(err) == codes.AlreadyExists }
func missing(err error) bool { return status.Code(err) == codes.NotFound }

// uncertain says whether the shim died under a request that cannot be made twice, so that nobody knows whether it was done.
func uncertain(err error) bool {
	return status.Code(err) == codes.Unknown && strings.Contains(err.Error(), "is not known")
}

// started says whether a start failed because it had been carried out already.
func started(err error) bool { return status.Code(err) == codes.FailedPrecondition || missing(err) }

// again calls until somebody answers, and says how often it was cut off. done says of an error whether it means that an
// earlier try, whose answer was lost, was carried out.
func (c *client) again(what string, call func() error, done func(error) bool) (cut int, err error) {
	for {
		err := call()
		switch {
		case err == nil:
			return cut, nil
		case status.Code(err) == codes.Unavailable && c.ctx.Err() == nil:
			select {
			case <-time.After(2 * time.Millisecond):
			case <-c.ctx.Done():
			}
			cut++
		case cut > 0 && done != nil && done(err):
			return cut, nil
		default:
			return cut, fmt.Errorf("%s: %w", what, err)
		}
	}
}

// make makes a container that runs a script, and its task. stdout is a URI.
func (c *client) make(id, script, stdout string) error {
	s, err := spec.New(id, c.ns, spec.Args("/bin/sh", "-c", script), spec.Env("PATH=/bin"), spec.MemoryLimit(limit))
	if err == nil && c.terminal != "" {
		err = spec.Apply(s, spec.Terminal(80, 25))
	}
	if err != nil {
		return err
	}
	steps := []struct {
		what string
		call func() error
	}{
		{"prepare", func() error {
			_, err := c.snapshots.Prepare(c.ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: snapshotter, Key: id, Parent: c.parent, Labels: keptByLabel})
			return err
		}},
		{"container", func() error {
			_, err := c.containers.Create(c.ctx, &containersapi.CreateContainerRequest{Container: &containersapi.Container{
				ID: id, Snapshotter: snapshotter, SnapshotKey: id, Spec: encode(specURL, s),
				Runtime: &containersapi.Container_Runtime{Name: "io.containerd.runc.v2", Options: c.options},
			}})
			return err
		}},
		{"create", func() error {
			m, err := c.snapshots.Mounts(c.ctx, &snapshotsapi.MountsRequest{Snapshotter: snapshotter, Key: id})
			if err != nil {
				return err
			}
			r := &tasksapi.CreateTaskRequest{ContainerID: id, Rootfs: m.Mounts, Stdout: stdout}
			if c.terminal != "" {
				r.Terminal, r.Stdin, r.Stdout = true, c.terminal+".in", c.terminal+".out"
			}
			_, err = c.tasks.Create(c.ctx, r)
			return err
		}},
	}
	for _, s := range steps {
		if _, err := c.again(s.what, s.call, exists); err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
	}
	return nil
}

// start starts the init, or an exec, and says how often it was cut off.
func (c *client) start(id, exec string) (int, error) {
	cut, err := c.again("start "+exec, func() error {
		_, err := c.tasks.Start(c.ctx, &tasksapi.StartRequest{ContainerID: id, ExecID: exec})
		return err
	}, started)
	if err != nil {
		return cut, fmt.Errorf("%s: %w", id, err)
	}
	return cut, nil
}

// exec runs another process in a container: the status it ended with, and how often its start was cut off. One of which it
// is not known whether it ran must have ended unknown.
func (c *client) exec(id, exec, script, stdout string) (got uint32, cut int, err error) {
	_, err = c.again("exec "+exec, func() error {
		_, err := c.tasks.Exec(c.ctx, &tasksapi.ExecProcessRequest{
			ContainerID: id, ExecID: exec, Stdout: stdout,
			Spec: encode(processURL, &specs.Process{Args: []string{"/bin/sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin"}}),
		})
		return err
	}, exists)
	if err == nil {
		cut, err = c.start(id, exec)
	}
	lost := uncertain(err)
	if lost {
		cut, err = cut+1, nil
	}
	if err == nil {
		got, err = c.wait(id, exec)
	}
	if err == nil && lost && got != unknownStatus {
		err = fmt.Errorf("%s: exec %s ended with %d, though whether it ran is not known", id, exec, got)
	}
	return got, cut, err
}

func (c *client) wait(id, exec string) (got uint32, err error) {
	_, err = c.again("wait "+exec, func() error {
		resp, err := c.tasks.Wait(c.ctx, &tasksapi.WaitRequest{ContainerID: id, ExecID: exec})
		got = resp.GetExitStatus()
		return err
	}, nil)
	if err != nil {
		return got, fmt.Errorf("%s: %w", id, err)
	}
	return got, nil
}

// deleteExec removes an exec that ended with want.
func (c *client) deleteExec(id, exec string, want uint32) error {
	_, err := c.again("delete exec "+exec, func() error {
		resp, err := c.tasks.DeleteProcess(c.ctx, &tasksapi.DeleteProcessRequest{ContainerID: id, ExecID: exec})
		if err == nil && resp.ExitStatus != want {
			return fmt.Errorf("deleted with status %d, not %d", resp.ExitStatus, want)
		}
		return err
	}, missing)
	if err != nil {
		return fmt.Errorf("%s: %w", id, err)
	}
	return nil
}

// remove takes away a container that ended with one of want.
func (c *client) remove(id string, want ...uint32) error {
	for _, s := range []struct {
		what string
		call func() error
	}{
		{"delete", func() error {
			resp, err := c.tasks.Delete(c.ctx, &tasksapi.DeleteTaskRequest{ContainerID: id})
			if err == nil && !slices.Contains(want, resp.ExitStatus) {
				return fmt.Errorf("deleted with status %d, not %v", resp.ExitStatus, want)
			}
			return err
		}},
		{"delete container", func() error {
			_, err := c.containers.Delete(c.ctx, &containersapi.DeleteContainerRequest{ID: id})
			return err
		}},
		{"remove snapshot", func() error {
			_, err := c.snapshots.Remove(c.ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: id})
			return err
		}},
	} {
		if _, err := c.again(s.what, s.call, missing); err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
	}
	return nil
}
