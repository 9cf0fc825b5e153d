package harness

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Clear asks the daemon, which must serve, to end and remove every container of the namespace, with its task and its
// snapshot, in whatever state they are, and then every sandbox.
func (d *Daemon) Clear(ctx context.Context) error {
	conn, err := d.Conn()
	if err != nil {
		return err
	}
	ctx = d.Context(ctx)
	tasks, containers := tasksapi.NewTasksClient(conn), containersapi.NewContainersClient(conn)
	list, err := containers.List(ctx, &containersapi.ListContainersRequest{})
	if err != nil {
		return fmt.Errorf("cannot list containers: %w", err)
	}
	var errs []error
	// What is not there, or has ended, is what was wanted.
	check := func(err error) {
		if code := status.Code(err); code != codes.OK && code != codes.NotFound && code != codes.FailedPrecondition {
			errs = append(errs, err)
		}
	}
	for _, c := range list.Containers {
		_, err := tasks.Kill(ctx, &tasksapi.KillRequest{ContainerID: c.ID, Signal: uint32(unix.SIGKILL), All: true})
		check(err)
		if err == nil {
			_, err = tasks.Wait(ctx, &tasksapi.WaitRequest{ContainerID: c.ID})
			check(err)
		}
		_, err = tasks.Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: c.ID})
		check(err)
		_, err = containers.Delete(ctx, &containersapi.DeleteContainerRequest{ID: c.ID})
		check(err)
		if c.SnapshotKey != "" {
			_, err = snapshotsapi.NewSnapshotsClient(conn).Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: c.Snapshotter, Key: c.SnapshotKey})
			check(err)
		}
	}
	store, sandboxes := sandboxapi.NewStoreClient(conn), sandboxapi.NewControllerClient(conn)
	boxes, err := store.List(ctx, &sandboxapi.StoreListRequest{})
	if err != nil && status.Code(err) != codes.Unimplemented { // as by containerd 1.6
		return errors.Join(append(errs, fmt.Errorf("cannot list sandboxes: %w", err))...)
	}
	for _, b := range boxes.GetList() {
		_, err := sandboxes.Shutdown(ctx, &sandboxapi.ControllerShutdownRequest{SandboxID: b.SandboxID, Sandboxer: b.Sandboxer})
		check(err)
		_, err = store.Delete(ctx, &sandboxapi.StoreDeleteRequest{SandboxID: b.SandboxID})
		check(err)
	}
	return errors.Join(errs...)
}

// Raze removes what Close has found to be left behind, without any daemon: the processes in the cgroups of the namespace
// and those that name the directory, its mounts, its cgroups, and the directory itself. It is for programs that must
// leave nothing, whatever happened; a test fails instead, so that somebody looks.
func (d *Daemon) Raze() error {
	_ = d.Kill()
	for deadline := time.Now().Add(settling); ; time.Sleep(10 * time.Millisecond) {
		pids := d.pidsOfCgroups()
		d.eachProcess(func(pid int, _ []string) { pids = append(pids, pid) })
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		if len(pids) == 0 || time.Now().After(deadline) {
			break
		}
	}
	data, _ := os.ReadFile("/proc/self/mountinfo")
	for _, line := range slices.Backward(strings.Split(string(data), "\n")) { // the latest, and so the innermost, first
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], d.Dir+"/") {
			_ = unix.Unmount(f[4], unix.MNT_DETACH)
		}
	}
	for _, h := range hierarchies() {
		var dirs []string
		_ = filepath.WalkDir(filepath.Join(h, d.Namespace), func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for _, dir := range slices.Backward(dirs) {
			_ = os.Remove(dir)
		}
	}
	if d.store != nil {
		d.store.close()
	}
	if left := append(d.processes(), append(d.mounts(), cgroupsOf(d.Namespace)...)...); len(left) > 0 {
		return fmt.Errorf("cannot be removed:\n%s", strings.Join(left, "\n"))
	}
	return os.RemoveAll(d.Dir)
}

func (d *Daemon) pidsOfCgroups() (pids []int) {
	for _, h := range hierarchies() {
		found, _ := filepath.Glob(filepath.Join(h, d.Namespace, "*", "cgroup.procs"))
		for _, file := range found {
			data, _ := os.ReadFile(file)
			for _, f := range strings.Fields(string(data)) {
				if pid, err := strconv.Atoi(f); err == nil && !slices.Contains(pids, pid) {
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids
}
