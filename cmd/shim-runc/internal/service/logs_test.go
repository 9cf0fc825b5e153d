package service_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/test/hungfs"
)

// TestLogFullDisk: a container whose log has no room does not hold up an exec beside it, nor its own kill and delete.
func TestLogFullDisk(t *testing.T) {
	f := serve(t, "logfull", shimbin.Spec("logfull", "yes"))
	small := filepath.Join(filepath.Dir(f.dir), "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	log := filepath.Join(small, "log")
	f.create(func(r *task.CreateTaskRequest) { r.Stdout, r.Stderr = "cri://"+log, "cri://"+log })
	f.start("")
	for fi, err := os.Stat(log); err != nil || fi.Size() < 250<<10; fi, err = os.Stat(log) {
		time.Sleep(time.Millisecond)
	}
	begin := time.Now()
	if out := f.capture("e", "echo", "hello"); out != "hello\n" {
		t.Errorf("an exec: %q", out)
	}
	f.kill("", unix.SIGKILL)
	if s := f.wait("").ExitStatus; s != 137 {
		t.Errorf("status %d", s)
	}
	f.remove("")
	if took := time.Since(begin); took > 6*time.Second {
		t.Errorf("exec, kill, wait and delete took %v", took)
	}
	data, err := os.ReadFile(log)
	if err != nil || !bytes.HasSuffix(data, []byte(" stdout F y\n")) {
		t.Errorf("the log does not end with a whole entry: %v", err)
	}
}

// TestLogBusy: a log that one process writes is not another's, and the refusal harms neither.
func TestLogBusy(t *testing.T) {
	f := serve(t, "logbusy", shimbin.Spec("logbusy", "sleep", "1000"))
	uri := "json-file://" + filepath.Join(filepath.Dir(f.dir), "log")
	f.create(func(r *task.CreateTaskRequest) { r.Stdout = uri })
	f.start("")
	if err := f.exec("e", func(r *task.ExecProcessRequest) { r.Stdout = uri }, "true"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Start(ctx, &task.StartRequest{ID: "logbusy", ExecID: "e"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a second writer: %v", err)
	}
	f.remove("e")
	if s := f.state(""); s.Pid == 0 {
		t.Error("the container is gone")
	}
}

// notUpgraded asks for an upgrade that must not wait for the file system of a log.
func (f *fixture) notUpgraded(log string) {
	f.t.Helper()
	c, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	_, err := f.Shim().Upgrade(c, &shim.UpgradeRequest{Binary: binary})
	if err = shimapi.FromWire(err); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "the file system of log "+log+" does not answer") {
		f.t.Errorf("upgrade: %v", err)
	}
}

// TestHungFollower: a log that nobody writes to, and somebody follows, is on a file system that stops answering, so that even a
// signal ends no call into it. The shim is not replaced, which would wait for the follower's file; when the file system answers,
// it is, and the follower gets each line once, on the same stream.
func TestHungFollower(t *testing.T) {
	f := serve(t, "follower", shimbin.Spec("follower", "sh", "-c",
		"i=0; while :; do echo line $i; i=$((i+1)); while [ ! -e /dev/go$i ]; do usleep 20000; done; done"))
	fs := hungfs.Mount(t)
	log := fs.Dir + "/log"
	f.create(func(r *task.CreateTaskRequest) { r.Stdout = "file://" + log })
	f.start("")
	awaitLines(t, log, 1)
	f.upgrade() // the new program opens the log when it has something to write
	c, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	stream, err := f.Shim().Logs(c, &shim.LogsRequest{Id: "follower", Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	next := func(want string) {
		t.Helper()
		r, err := stream.Recv()
		if err != nil || len(r.Entries) != 1 || string(r.Entries[0].Line) != want+"\n" {
			t.Fatalf("%v, %v, not %s", r, shimapi.FromWire(err), want)
		}
	}
	next("line 0")
	fs.Stall(t, true)
	f.notUpgraded(log)
	if s := f.runExec("e", nil, "touch", "/dev/go1"); s != 0 {
		t.Errorf("an exec: status %d", s)
	}
	f.notUpgraded(log)
	fs.Stall(t, false)
	next("line 1")
	f.upgrade()
	if s := f.runExec("e", nil, "touch", "/dev/go2"); s != 0 {
		t.Errorf("an exec: status %d", s)
	}
	next("line 2")
}

// TestHungLeftBehind: an upgrade does not wait either for the log of a process that is deleted, while its file system did not
// answer.
func TestHungLeftBehind(t *testing.T) {
	f := running(t, "behind", nil)
	fs := hungfs.Mount(t)
	log := fs.Dir + "/log"
	if err := f.exec("e", func(r *task.ExecProcessRequest) { r.Stdout = "cri://" + log }, "sh", "-c", "echo one; while [ ! -e /dev/go ]; do usleep 20000; done; echo two"); err != nil {
		t.Fatal(err)
	}
	f.start("e")
	awaitLines(t, log, 1)
	fs.Stall(t, true)
	if s := f.runExec("go", nil, "touch", "/dev/go"); s != 0 {
		t.Errorf("an exec: status %d", s)
	}
	f.wait("e")
	f.remove("e")
	f.notUpgraded(log)
	fs.Stall(t, false)
	until(t, "it can be upgraded", func() bool {
		_, err := f.Shim().Upgrade(ctx, &shim.UpgradeRequest{Binary: binary})
		if err = shimapi.FromWire(err); err != nil && !errdefs.IsUnavailable(err) {
			t.Fatal(err)
		}
		return err == nil
	})
}
