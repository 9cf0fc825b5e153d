package service_test

import (
	"path/filepath"
	"strings"
	"testing"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
)

// TestSandboxMembers: tasks that are asked for on the sandbox's connection are there, each kept by a shim of its own, through
// the death of any of the shims.
func TestSandboxMembers(t *testing.T) {
	b := serveBox(t, "members", boxSpec(ipcNS, utsNS))
	of := b.startBox()
	bundle := func(id string) string {
		spec := shimbin.Spec(id, "sleep", "1000")
		joined(of)(spec)
		dir := filepath.Join(filepath.Dir(b.dir), id)
		shimbin.Bundle(t, dir, spec)
		return dir
	}
	for _, id := range []string{"m1", "m2"} {
		dir := bundle(id)
		// As containerd has it: the address is where it asks for the task.
		//lint:ignore SA1019 clients send it all the same
		opts, err := anypb.New(&options.Options{TaskApiAddress: "ttrpc+unix:///here", TaskApiVersion: 3})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.Create(ctx, &task.CreateTaskRequest{ID: id, Bundle: dir, Rootfs: bind(), Options: opts}); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Start(ctx, &task.StartRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	shims := map[string]uint32{}
	for _, id := range []string{"m1", "m2", "members"} {
		c, err := b.Connect(ctx, &task.ConnectRequest{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		shims[id] = c.ShimPid
	}
	if shims["m1"] == shims["m2"] || shims["m1"] == shims["members"] {
		t.Errorf("shims: %v", shims)
	}
	if d := b.describeBox(); len(d.Sandbox.Members) != 2 {
		t.Errorf("describe: %v", d)
	}
	for id, want := range map[string]func(error) bool{"m1": errdefs.IsAlreadyExists, "bad": errdefs.IsInvalidArgument} {
		if _, err := b.Create(ctx, &task.CreateTaskRequest{ID: id, Bundle: map[string]string{"m1": filepath.Join(filepath.Dir(b.dir), "m1"), "bad": "relative"}[id]}); !want(err) {
			t.Errorf("create of %s: %v", id, err)
		}
	}
	b.succeed()
	if err := unix.Kill(int(shims["m1"]), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a successor keeps the member", func() bool {
		st, err := b.State(ctx, &task.StateRequest{ID: "m1"})
		return err == nil && st.Pid != 0
	})
	for _, id := range []string{"m1", "m2"} {
		if _, err := b.Kill(ctx, &task.KillRequest{ID: id, Signal: 9}); err != nil {
			t.Fatal(err)
		}
		w, err := b.Wait(ctx, &task.WaitRequest{ID: id})
		if err != nil || w.ExitStatus != 137 {
			t.Errorf("%s: %v, %v", id, w, err)
		}
		if _, err := b.Delete(ctx, &task.DeleteRequest{ID: id}); err != nil {
			t.Error(err)
		}
		if _, err := b.State(ctx, &task.StateRequest{ID: id}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), id) {
			t.Errorf("%s after its deletion: %v", id, err)
		}
		if _, err := b.Shutdown(ctx, &task.ShutdownRequest{ID: id}); err != nil {
			t.Error(err)
		}
	}
	if d := b.describeBox(); len(d.Sandbox.Members) != 0 || d.Sandbox.State != "running" {
		t.Errorf("describe: %v", d)
	}
}
