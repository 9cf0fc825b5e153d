package tasks

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/shims"
	"github.com/managerd/managerd/shimapi/shimfake"
)

// unpacked makes a checkpoint that a fake accepts, and a real shim until it reads it.
func unpacked(_ context.Context, dir string) error {
	return errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, shimfake.CheckpointFile), []byte("c"), 0o600))
}

// TestCheckpoint: a task is saved and ended, and another is made of what was saved, which is unpacked into its bundle, kept
// there over a restart of the daemon, and gone when the task runs.
func TestCheckpoint(t *testing.T) {
	w := fakes(t)
	ctx := in("ns")
	w.run("c1", args("run"))
	opts, err := typeurl.MarshalAnyToProto(&options.CheckpointOptions{Exit: true})
	if err != nil {
		t.Fatal(err)
	}
	images := filepath.Join(t.TempDir(), "images")
	if err := w.Checkpoint(ctx, "c1", images, opts); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(images, shimfake.CheckpointFile)); err != nil || string(data) != "c1" {
		t.Errorf("%q, %v", data, err)
	}
	if status, _, err := w.Wait(ctx, "c1", ""); err != nil || status != 137 {
		t.Errorf("status %d, %v", status, err)
	}

	w.add("c2", args("run"), shims.DefaultRuntime)
	where := ""
	failure := errors.New("no such blob")
	_, err = w.Create(ctx, CreateRequest{ID: "c2", Unpack: func(_ context.Context, dir string) error { where = dir; return failure }})
	if !errors.Is(err, failure) {
		t.Errorf("an unpack that fails: %v", err)
	}
	if _, err := w.bundles.Load("ns", "c2"); !errdefs.IsNotFound(err) {
		t.Errorf("its bundle: %v", err)
	}
	if pid, err := w.Create(ctx, CreateRequest{ID: "c2", Unpack: unpacked}); err != nil || pid != 0 {
		t.Fatalf("pid %d, %v", pid, err)
	}
	w.restart()
	if st, err := w.Service.Get(ctx, "c2", ""); err != nil || st.Status != tasktypes.Status_CREATED || st.Pid != 0 {
		t.Errorf("before its start: %v, %v", st, err)
	}
	if _, err := os.Stat(where); err != nil {
		t.Error(err)
	}
	if pid, err := w.Start(ctx, "c2", ""); err != nil || pid == 0 {
		t.Errorf("pid %d, %v", pid, err)
	}
	if _, err := os.Stat(where); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what it was restored from is left: %v", err)
	}
}

// TestUnrestoredShimKilled: the shim of a task that is not restored yet may die; its successor knows what it is to do.
func TestUnrestoredShimKilled(t *testing.T) {
	w := realWorld(t)
	ctx := in("ns")
	w.add("wait", w.spec(CreateRequest{ID: "wait"}, "true"), shims.DefaultRuntime)
	if pid, err := w.Create(ctx, CreateRequest{ID: "wait", Unpack: unpacked}); err != nil || pid != 0 {
		t.Fatalf("pid %d, %v", pid, err)
	}
	old := w.shimPid("wait")
	if err := unix.Kill(old, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); w.shimPid("wait") == old; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("there is no successor")
		}
	}
	var err error
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, err = w.Start(ctx, "wait", ""); !errdefs.IsUnavailable(err) || time.Now().After(deadline) {
			break
		}
	}
	if err == nil || !strings.Contains(err.Error(), "cannot restore container wait") {
		t.Errorf("its start, of a checkpoint that is none: %v", err)
	}
	if st, err := w.Service.Get(ctx, "wait", ""); err != nil || st.Status != tasktypes.Status_CREATED || st.Pid != 0 {
		t.Errorf("%v, %v", st, err)
	}
	if err := w.Kill(ctx, "wait", "", 9, false); err != nil {
		t.Error(err)
	}
	if status, _, err := w.Wait(ctx, "wait", ""); err != nil || status != 137 {
		t.Errorf("status %d, %v", status, err)
	}
	if _, err := w.Delete(ctx, "wait"); err != nil {
		t.Error(err)
	}
}
