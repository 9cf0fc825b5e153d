package service_test

import (
	"context"
	"errors"
	"fmt"
	"io"
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

// logs reads what is kept of a process, to the end.
func (f *fixture) logs(r *shim.LogsRequest) (string, error) {
	f.t.Helper()
	c, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	r.Id = f.id
	stream, err := f.Shim().Logs(c, r)
	if err != nil {
		return "", shimapi.FromWire(err)
	}
	var text strings.Builder
	for {
		batch, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return text.String(), nil
		}
		if err != nil {
			return text.String(), shimapi.FromWire(err)
		}
		for _, e := range batch.Entries {
			text.Write(e.Line)
		}
	}
}

// TestLogsFollow: who follows a log gets every line once, through rotations, upgrades and the end.
func TestLogsFollow(t *testing.T) {
	for name, uri := range map[string]string{"json-file": "json-file:///?max-size=4k&max-file=100", "file": "file:///", "ring": ""} {
		t.Run(name, func(t *testing.T) {
			id := "follow" + name
			f := serve(t, id, shimbin.Spec(id, "sh", "-c", ticking(id)))
			f.create(func(r *task.CreateTaskRequest) {
				if uri != "" {
					r.Stdout = strings.Replace(uri, ":///", "://"+filepath.Dir(f.dir)+"/log", 1)
				}
			})
			f.start("")
			got := make(chan string, 1)
			go func() {
				text, err := f.logs(&shim.LogsRequest{Follow: true})
				if err != nil {
					t.Error(err)
				}
				got <- text
			}()
			for range 3 {
				f.upgrade()
			}
			if s := f.wait("").ExitStatus; s != 0 {
				t.Errorf("status %d", s)
			}
			path := filepath.Join(filepath.Dir(f.dir), "followed")
			if err := os.WriteFile(path, []byte(<-got), 0o600); err != nil {
				t.Fatal(err)
			}
			lines(t, path, id)
		})
	}
}

// TestRing: the last of what a process prints for which nobody named a sink is kept, bounded, also through the death of its
// shim, and costs it little; with null:// nothing is kept.
func TestRing(t *testing.T) {
	const much = 256 << 20
	f := serve(t, "ring", shimbin.Spec("ring", "sh", "-c", fmt.Sprintf("dd if=/dev/zero bs=64k count=%d 2>/dev/null; echo; echo the end; sleep 1000", much>>16)))
	f.create(nil)
	begin := time.Now()
	f.start("")
	until(t, "it has printed all", func() bool {
		text, err := f.logs(&shim.LogsRequest{Tail: new(uint64(1))})
		return err == nil && text == "the end\n"
	})
	t.Logf("%d MiB/s", int(much/time.Since(begin).Seconds())>>20)
	o := f.output("", "stdout")
	text, err := f.logs(&shim.LogsRequest{})
	if err != nil || o.Sink != "ring" || len(text) < 16<<10 || !strings.HasSuffix(text, "\x00\nthe end\n") {
		t.Errorf("%d bytes of log, %v, %v", len(text), err, o)
	}
	var size int64
	files, err := filepath.Glob(filepath.Join(f.dir, shimapi.StdioDir, ".init.*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err == nil {
			size += st.Blocks * 512
		}
	}
	if size > 1<<20 {
		t.Errorf("it takes %d bytes", size)
	}
	f.succeed()
	if again, err := f.logs(&shim.LogsRequest{}); err != nil || again != text {
		t.Errorf("a successor has %d bytes of %d, %v", len(again), len(text), err)
	}
	if err := f.exec("null", func(r *task.ExecProcessRequest) { r.Stdout, r.Stderr = "null://", "null://" }, "echo", "x"); err != nil {
		t.Fatal(err)
	}
	f.start("null")
	f.wait("null")
	if _, err := f.logs(&shim.LogsRequest{ExecId: "null"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("null: %v", err)
	}
	f.remove("null")
	f.kill("", unix.SIGKILL)
	f.wait("")
	f.remove("")
	if left, _ := filepath.Glob(filepath.Join(f.dir, shimapi.StdioDir, "*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestHungSink: a file system that does not answer any more holds up neither the container's end and deletion, nor another
// process, nor the successor of a shim that died.
func TestHungSink(t *testing.T) {
	for _, scheme := range []string{"file", "cri"} {
		t.Run(scheme, func(t *testing.T) {
			id := "hung" + scheme
			f := serve(t, id, shimbin.Spec(id, "yes"))
			fs := hungfs.Mount(t)
			f.create(func(r *task.CreateTaskRequest) { r.Stdout = scheme + "://" + fs.Dir + "/log" })
			f.start("")
			if err := f.exec("other", nil, "sleep", "1000"); err != nil {
				t.Fatal(err)
			}
			f.start("other")
			until(t, "it prints", func() bool { return f.output("", "stdout").Bytes > 0 })
			if scheme == "cri" {
				f.die() // the kernel may let nobody die who waits for such a file system
			}
			fs.Hang(t, true)
			if scheme == "cri" {
				f.adopt()
			}
			const stuck = "a call into it does not return"
			until(t, "it is told", func() bool { return f.output("", "stdout").Waiting == stuck })
			if _, err := f.Shim().ReopenLogs(ctx, &shim.ReopenLogsRequest{}); !errdefs.IsUnavailable(shimapi.FromWire(err)) || !strings.Contains(err.Error(), stuck) {
				t.Errorf("reopen: %v", err)
			}
			if status := f.runExec("late", nil, "sh", "-c", "exit 7"); status != 7 {
				t.Errorf("an exec that is started meanwhile: status %d", status)
			}
			begin := time.Now()
			f.kill("other", unix.SIGKILL)
			if s := f.wait("other").ExitStatus; s != 137 {
				t.Errorf("another process: status %d", s)
			}
			f.remove("other")
			f.kill("", unix.SIGKILL)
			if s := f.wait("").ExitStatus; s != 137 {
				t.Errorf("status %d", s)
			}
			f.remove("")
			if took := time.Since(begin); took > 45*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// TestHungCreate: a log on a file system that does not answer fails the request, which leaves nothing; until then, others are
// answered. When it answers again, so does the request.
func TestHungCreate(t *testing.T) {
	for _, scheme := range []string{"file", "json-file"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			fs := hungfs.Mount(t)
			id := "hungcreate" + scheme
			f := serve(t, id, shimbin.Spec(id, "sleep", "1000"))
			uri := scheme + "://" + fs.Dir + "/log"
			unanswered := func(what string, call func() error) {
				t.Helper()
				fs.Hang(t, true)
				done := make(chan error, 1)
				go func() { done <- call() }()
				begin := time.Now()
				for asked := 0; ; asked++ {
					select {
					case err := <-done:
						if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "its file system has not answered for 10s") {
							t.Errorf("%s: %v", what, err)
						}
						if asked < 10 {
							t.Errorf("%s: others could ask %d times", what, asked)
						}
						fs.Hang(t, false)
						return
					case <-time.After(20 * time.Millisecond):
					}
					if time.Since(begin) > time.Minute {
						t.Fatalf("%s does not return", what)
					}
					c, cancel := context.WithTimeout(ctx, 5*time.Second)
					_, err := f.State(c, &task.StateRequest{ID: id})
					_, kerr := f.Kill(c, &task.KillRequest{ID: id, Signal: uint32(unix.SIGCONT)})
					_, derr := f.Delete(c, &task.DeleteRequest{ID: id})
					cancel()
					for _, err := range []error{err, kerr, derr} {
						if errdefs.IsDeadlineExceeded(err) || errors.Is(err, context.DeadlineExceeded) {
							t.Fatalf("%s: others wait: %v", what, err)
						}
					}
				}
			}
			request := &task.CreateTaskRequest{ID: id, Bundle: f.dir, Rootfs: bind(), Stdout: uri}
			unanswered("create", func() error {
				_, err := f.Create(ctx, request)
				return err
			})
			until(t, "it can be created", func() bool {
				_, err := f.Create(ctx, request)
				if err != nil && !errdefs.IsFailedPrecondition(err) { // the late file has its lock for a moment
					t.Fatal(err)
				}
				return err == nil
			})
			f.start("")
			other := strings.TrimSuffix(uri, "log") + "other"
			if err := f.exec("x", func(r *task.ExecProcessRequest) { r.Stdout = other }, "echo", "x"); err != nil {
				t.Fatal(err)
			}
			unanswered("exec", func() error {
				_, err := f.Start(ctx, &task.StartRequest{ID: id, ExecID: "x"})
				return err
			})
			until(t, "it can be executed", func() bool {
				_, err := f.Start(ctx, &task.StartRequest{ID: id, ExecID: "x"})
				if err != nil && !errdefs.IsFailedPrecondition(err) {
					t.Fatal(err)
				}
				return err == nil
			})
			if s := f.wait("x").ExitStatus; s != 0 {
				t.Errorf("status %d", s)
			}
			f.remove("x")
		})
	}
}

// TestHungUpgrade: a shim whose log's file system does not answer is not replaced, which would wait for that; it goes on, and is
// replaced when the file system answers. No line is lost.
func TestHungUpgrade(t *testing.T) {
	for name, script := range map[string]string{
		"silent":   "echo line 0; while [ ! -e /dev/go ]; do usleep 50000; done; echo line 1; sleep 1000",
		"printing": "i=0; while :; do echo line $i; i=$((i+1)); usleep 10000; done",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			id := "hungup" + name
			f := serve(t, id, shimbin.Spec(id, "sh", "-c", script))
			fs := hungfs.Mount(t)
			log := fs.Dir + "/log"
			f.create(func(r *task.CreateTaskRequest) { r.Stdout = "file://" + log })
			f.start("")
			awaitLines(t, log, 1)
			fs.Hang(t, true)
			c, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			_, err := f.Shim().Upgrade(c, &shim.UpgradeRequest{Binary: binary})
			if err = shimapi.FromWire(err); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "the file system of log "+log+" does not answer") {
				t.Errorf("upgrade: %v", err)
			}
			if s := f.runExec("go", nil, "touch", "/dev/go"); s != 0 {
				t.Errorf("an exec: status %d", s)
			}
			fs.Hang(t, false)
			f.upgrade()
			awaitLines(t, log, 2)
			f.upgrade()
			f.kill("", unix.SIGKILL)
			f.wait("")
			f.remove("")
			if n := counted(t, log); n < 2 {
				t.Errorf("%d lines", n)
			}
		})
	}
}

// TestReattach: clients come, read a part and vanish, and another one comes: the streams go on, no line is lost in between,
// and the container notices nothing.
func TestReattach(t *testing.T) {
	script := strings.Replace(ticking("attach"), "echo end", "until [ -e /dev/go ]; do usleep 10000; done; echo end", 1)
	f := serve(t, "attach", shimbin.Spec("attach", "sh", "-c", script))
	_, out, _ := f.fifos("init")
	f.create(func(r *task.CreateTaskRequest) { r.Stdout = out })
	f.start("")
	path := filepath.Join(filepath.Dir(f.dir), "read")
	all, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		if i%5 == 4 {
			f.upgrade()
		}
		client, err := os.Open(out)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(all, client, 500); err != nil {
			t.Fatal(err)
		}
		_ = client.Close()
		if s := f.state("").Status.String(); s != "RUNNING" {
			t.Fatalf("the container is %s", s)
		}
	}
	last := read(t, out)
	if s := f.runExec("go", nil, "touch", "/dev/go"); s != 0 {
		t.Errorf("touch: status %d", s)
	}
	if s := f.wait("").ExitStatus; s != 0 {
		t.Errorf("status %d", s)
	}
	if _, err := all.WriteString(<-last); err != nil {
		t.Fatal(err)
	}
	lines(t, path, "attach")
}
