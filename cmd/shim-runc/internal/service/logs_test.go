package service_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
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
