package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	mountsapi "github.com/containerd/containerd/api/services/mounts/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/mounts/stack"
)

// diskMounts are those of a file with a file system: a loop device, and a directory in what is on it for the client.
func diskMounts(file string) []*types.Mount {
	return []*types.Mount{
		{Type: "mkfs/loop", Source: file, Options: []string{"X-containerd.mkfs.size=8MiB"}},
		{Type: "format/ext4", Source: "{{ mount 0 }}"},
		{Type: "format/mkdir/bind", Source: "{{ mount 1 }}/d", Options: []string{"X-containerd.mkdir.path={{ mount 1 }}/d:755", "rbind", "rw"}},
	}
}

// TestMounts: mounts that a client has the daemon make outlive it, a container stands on them, and they go when nothing
// keeps them any more.
func TestMounts(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	m, l := mountsapi.NewMountsClient(c.conn), leasesapi.NewLeasesClient(c.conn)
	if _, err := l.Create(c.ctx, &leasesapi.CreateRequest{ID: "keeps"}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(u.Dir, "disk")
	r, err := m.Activate(leases.With(c.ctx, "keeps"), &mountsapi.ActivateRequest{Name: "x", Mounts: diskMounts(file)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Activate(c.ctx, &mountsapi.ActivateRequest{Name: "loose", Mounts: diskMounts(filepath.Join(u.Dir, "other"))}); err != nil {
		t.Fatal(err)
	}
	u.restart(u.Kill)
	source := r.Info.System[0].Source
	u.ctr("run", "--rm", "--mount", "type=bind,src="+source+",dst=/mnt,options=rbind:rw", ref, "writes", "sh", "-c", "echo here >/mnt/f")
	if b, err := os.ReadFile(filepath.Join(source, "f")); string(b) != "here\n" {
		t.Errorf("%q, %v", b, err)
	}
	has(t, u.mctl("leases", "ls", "-q"), "keeps")
	// In use, it outlives its lease; then not.
	f, err := os.Open(filepath.Join(source, "f"))
	if err != nil {
		t.Fatal(err)
	}
	collect := func(lease string) {
		t.Helper()
		if _, err := l.Delete(c.ctx, &leasesapi.DeleteRequest{ID: lease, Sync: true}); err != nil {
			t.Fatal(err)
		}
	}
	collect("keeps")
	if names := u.mctl("mounts", "ls", "-q"); names != "x\n" {
		t.Errorf("there are %q", names)
	}
	if log, err := os.ReadFile(u.Log()); err != nil || !strings.Contains(string(log), "could not be unmounted") {
		t.Errorf("nothing is said of what is in use: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Create(c.ctx, &leasesapi.CreateRequest{ID: "again"}); err != nil {
		t.Fatal(err)
	}
	collect("again")
	equal(t, "mounts", u.mctl("mounts", "ls", "-q"), "")
	if dirs, err := stack.All(u.State()); err != nil || len(dirs) > 0 {
		t.Errorf("left: %v, %v", dirs, err)
	}
	equal(t, "orphans", fmt.Sprint(u.fsck(0)), "[]")
}

// TestMountsOfTask: a root file system in a file is mounted for a task by the daemon, outlives it, and goes with the task.
func TestMountsOfTask(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	if err := c.make("c", "exec sleep 1000"); err != nil {
		t.Fatal(err)
	}
	lower, err := c.snapshots.View(c.ctx, &snapshotsapi.ViewSnapshotRequest{ // of one layer: no overlay
		Snapshotter: snapshotter, Key: "lower", Parent: c.parent, Labels: map[string]string{"containerd.io/gc.root": "test"},
	})
	if err != nil {
		t.Fatal(err)
	}
	rootfs := append(diskMounts(filepath.Join(u.Dir, "disk"))[:2], lower.Mounts...)
	over := "{{ mount 1 }}"
	rootfs = append(rootfs, &types.Mount{Type: "format/mkdir/overlay", Source: "overlay", Options: []string{
		"X-containerd.mkdir.path=" + over + "/upper:755", "X-containerd.mkdir.path=" + over + "/work:755",
		"lowerdir={{ mount 2 }}", "upperdir=" + over + "/upper", "workdir=" + over + "/work",
	}})
	for round := range 2 {
		if _, err := c.tasks.Create(c.ctx, &tasksapi.CreateTaskRequest{ContainerID: "c", Rootfs: rootfs}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.tasks.Start(c.ctx, &tasksapi.StartRequest{ContainerID: "c"}); err != nil {
			t.Fatal(err)
		}
		u.restart(u.Kill)
		equal(t, "mounts", u.mctl("mounts", "ls", "-q"), "c\n")
		if round == 0 {
			u.ctr("tasks", "exec", "--exec-id", "e", "c", "sh", "-c", "echo here >/f")
		} else {
			equal(t, "what the last task wrote", u.ctr("tasks", "exec", "--exec-id", "e", "c", "cat", "/f"), "here\n")
		}
		has(t, u.ctr("tasks", "exec", "--exec-id", "m", "c", "cat", "/proc/self/mountinfo"), "upperdir="+u.State()+"/mounts/")
		u.mctl("tasks", "rm", "-f", "c")
		equal(t, "mounts", u.mctl("mounts", "ls", "-q"), "")
	}
	rootfs[0].Options = nil
	_, err = c.tasks.Create(c.ctx, &tasksapi.CreateTaskRequest{ContainerID: "c", Rootfs: rootfs})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "size=SIZE") {
		t.Error(err)
	}
	u.mctl("containers", "rm", "c")
	u.mctl("snapshots", "rm", "lower")
	equal(t, "orphans", fmt.Sprint(u.fsck(0)), "[]")
}

// TestMountsCrash: a daemon that is killed at any moment while mounts come and go leaves them whole or not at all, and the
// next one can make and unmake them.
func TestMountsCrash(t *testing.T) {
	const workers, deaths = 4, 8
	u := newUser(t)
	c := newClient(t, u.Daemon)
	m := mountsapi.NewMountsClient(c.conn)
	stop := make(chan struct{})
	var done sync.WaitGroup
	for w := range workers {
		done.Go(func() {
			name, file := fmt.Sprint("w", w), filepath.Join(u.Dir, fmt.Sprint("disk", w))
			// An answer that is lost is asked for again; then it may have been done already.
			try := func(call func() error, already codes.Code) error {
				for lost := false; ; lost = true {
					if err := call(); err == nil || lost && status.Code(err) == already {
						return nil
					} else if status.Code(err) != codes.Unavailable {
						return err
					}
				}
			}
			for {
				select {
				case <-stop:
					return
				default:
				}
				err := try(func() error {
					_, err := m.Activate(c.ctx, &mountsapi.ActivateRequest{Name: name, Mounts: diskMounts(file), Labels: map[string]string{"containerd.io/gc.root": ""}})
					return err
				}, codes.AlreadyExists)
				if err == nil {
					err = try(func() error {
						r, err := m.Info(c.ctx, &mountsapi.InfoRequest{Name: name})
						if err == nil {
							_, err = os.Stat(r.Info.System[0].Source)
						}
						return err
					}, codes.OK)
				}
				if err == nil {
					err = try(func() error {
						_, err := m.Deactivate(c.ctx, &mountsapi.DeactivateRequest{Name: name})
						return err
					}, codes.NotFound)
				}
				if err == nil {
					err = os.Remove(file)
				}
				if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
			}
		})
	}
	for i := range deaths {
		time.Sleep(time.Duration(20+30*i) * time.Millisecond) // wherever that is
		u.restart(u.Kill)
	}
	close(stop)
	done.Wait()
	if half, err := filepath.Glob(filepath.Join(u.Dir, ".managerd-mkfs-*")); err != nil || len(half) > 0 {
		t.Errorf("half made: %v, %v", half, err)
	}
	dirs, err := stack.All(u.State())
	devices, derr := stack.Devices(u.State())
	if err := errors.Join(err, derr); err != nil || len(dirs) > 0 || len(devices) > 0 {
		t.Errorf("left: %v, %v, %v", dirs, devices, err)
	}
}
