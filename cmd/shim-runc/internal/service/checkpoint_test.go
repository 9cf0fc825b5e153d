package service_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// counter counts in its output and in a file that it keeps open, until SIGTERM; its status is 7 then, or 8 if the last in
// the file is neither the number that it is at nor the one before.
const counter = `exec 3>/dev/count; trap 'n=$(tail -n 1 /dev/count); test $n = $i -o $n = $((i-1)) && exit 7; exit 8' TERM
i=0; while :; do echo line $i; echo $i >&3; usleep 50000; i=$((i+1)); done`

// engines are those that know checkpoints: by the runtime option BinaryName.
var engines = map[string]string{"libcontainer": "", "runc": "/usr/sbin/runc"}

func anyOf(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := typeurl.MarshalAnyToProto(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// criuWorks says why not, if it does not.
func criuWorks() error {
	out, err := exec.Command("criu", "check").CombinedOutput()
	if err != nil {
		return fmt.Errorf("criu check: %w: %s", err, out)
	}
	return nil
}

func needCriu(t *testing.T) {
	t.Helper()
	if err := criuWorks(); err != nil {
		t.Skip(err) // a criu older than the kernel; the VM has a pair that fits
	}
}

// counting starts a counter whose output goes to a file; engine is a BinaryName.
func counting(t *testing.T, id, engine string, mod func(*task.CreateTaskRequest)) (f *fixture, log string) {
	t.Helper()
	f = serve(t, id, shimbin.Spec(id, "sh", "-c", counter))
	log = filepath.Join(filepath.Dir(f.dir), "count.log")
	f.create(func(r *task.CreateTaskRequest) {
		r.Stdout, r.Options = "file://"+log, anyOf(t, &options.Options{BinaryName: engine})
		if mod != nil {
			mod(r)
		}
	})
	f.start("")
	awaitLines(t, log, 3)
	return f, log
}

// counted checks that a log has each line once and in order, and gives their number.
func counted(t *testing.T, log string) (n int) {
	t.Helper()
	data, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if strings.TrimRight(line, "\r\n") != fmt.Sprintf("line %d", n) {
			t.Fatalf("entry %d of the output is %q", n, line)
		}
		n++
	}
	return n
}

// awaitLines waits until a log has n lines or more.
func awaitLines(t *testing.T, log string, n int) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		data, _ := os.ReadFile(log)
		if strings.Count(string(data), "\n") >= n {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("no line %d within a minute: %q", n, data)
		}
	}
}

func (f *fixture) checkpoint(path string, opts *options.CheckpointOptions) error {
	f.t.Helper()
	_, err := f.Checkpoint(ctx, &task.CheckpointTaskRequest{ID: f.id, Path: path, Options: anyOf(f.t, opts)})
	return err
}

// TestCheckpointFails: where criu does not work the error says which criu it is, why, and where the rest is written; the
// container goes on. It is made to fail where it works: by a program of that name.
func TestCheckpointFails(t *testing.T) {
	version, says := "3.17.1", "vDSO"
	if criuWorks() == nil {
		dir := t.TempDir()
		script := "#!/bin/sh\ncase $1 in --version) echo Version: 9.9;; check) echo 'Error (x.c:1): no vDSO'; exit 1;; *) exit 1;; esac\n"
		if err := os.WriteFile(filepath.Join(dir, "criu"), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
		version = "9.9"
	}
	for name, binary := range engines {
		t.Run(name, func(t *testing.T) {
			f, log := counting(t, "ckfail", binary, nil)
			dir := t.TempDir()
			for _, opts := range []*options.CheckpointOptions{{}, {Exit: true}, {WorkPath: filepath.Join(dir, "work")}} {
				path := filepath.Join(dir, "images")
				err := f.checkpoint(path, opts)
				if !errdefs.IsFailedPrecondition(err) {
					t.Fatalf("%v", err)
				}
				for _, want := range []string{"cannot checkpoint container ckfail", "criu " + version, says, "criu check", "kernel"} {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("the error does not say %q: %v", want, err)
					}
				}
				where := filepath.Join(f.dir, "criu-dump.log")
				if opts.WorkPath != "" {
					where = filepath.Join(opts.WorkPath, "dump.log")
				}
				if version != "9.9" && !strings.Contains(err.Error(), where) {
					t.Errorf("the error does not name %s: %v", where, err)
				}
				if _, serr := os.Stat(path); !errors.Is(serr, fs.ErrNotExist) {
					t.Errorf("the directory of the images: %v", serr)
				}
				if st := f.state("").Status; st != tasktypes.Status_RUNNING {
					t.Errorf("%v after a checkpoint that failed", st)
				}
				awaitLines(t, log, counted(t, log)+3)
			}
			if _, err := f.Pause(ctx, &task.PauseRequest{ID: f.id}); err != nil {
				t.Fatal(err)
			}
			if err := f.checkpoint(filepath.Join(dir, "images"), &options.CheckpointOptions{}); err == nil {
				t.Error("no error of a paused container")
			}
			if st := f.state("").Status; st != tasktypes.Status_PAUSED {
				t.Errorf("%v after a checkpoint of a paused container that failed", st)
			}
			if _, err := f.Resume(ctx, &task.ResumeRequest{ID: f.id}); err != nil {
				t.Fatal(err)
			}
			awaitLines(t, log, counted(t, log)+3)
			f.kill("", syscall.SIGTERM)
			if s := f.wait("").ExitStatus; s != 7 {
				t.Errorf("status %d, want 7", s)
			}
			counted(t, log)
		})
	}
}

// TestOptionCriuWorkPath: criu's log is there, whatever becomes of the checkpoint.
func TestOptionCriuWorkPath(t *testing.T) {
	work := filepath.Join(t.TempDir(), "work")
	f := serve(t, "ckwork", shimbin.Spec("ckwork", "sleep", "1000"))
	f.create(func(r *task.CreateTaskRequest) { r.Options = anyOf(t, &options.Options{CriuWorkPath: work}) })
	f.start("")
	err := f.checkpoint(filepath.Join(t.TempDir(), "images"), &options.CheckpointOptions{})
	if works := criuWorks() == nil; works != (err == nil) || !works && !strings.Contains(err.Error(), work+"/dump.log") {
		t.Errorf("%v", err)
	}
	if data, err := os.ReadFile(filepath.Join(work, "dump.log")); err != nil || len(data) == 0 {
		t.Errorf("%d bytes, %v", len(data), err)
	}
}

// TestCheckpointRefused: what cannot be done is said before anything is touched.
func TestCheckpointRefused(t *testing.T) {
	f := running(t, "ckrefused", nil)
	dir := t.TempDir()
	for name, c := range map[string]struct {
		path string
		opts proto.Message
		is   func(error) bool
		says string
	}{
		"no path":       {opts: &options.CheckpointOptions{}, is: errdefs.IsInvalidArgument, says: "absolute"},
		"relative path": {path: "images", opts: &options.CheckpointOptions{}, is: errdefs.IsInvalidArgument, says: `"images"`},
		"relative work": {path: dir, opts: &options.CheckpointOptions{WorkPath: "work"}, is: errdefs.IsInvalidArgument, says: `"work"`},
		"parent":        {path: dir, opts: &options.CheckpointOptions{ParentPath: "/parent"}, is: errdefs.IsNotImplemented, says: "/parent"},
		"cgroups mode":  {path: dir, opts: &options.CheckpointOptions{CgroupsMode: "some"}, is: errdefs.IsInvalidArgument, says: `"some"`},
		"namespace":     {path: dir, opts: &options.CheckpointOptions{EmptyNamespaces: []string{"ipc"}}, is: errdefs.IsInvalidArgument, says: `"ipc"`},
		"other options": {path: dir, opts: &options.Options{}, is: errdefs.IsInvalidArgument, says: "CheckpointOptions"},
	} {
		_, err := f.Checkpoint(ctx, &task.CheckpointTaskRequest{ID: f.id, Path: c.path, Options: anyOf(t, c.opts)})
		if !c.is(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), f.id) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if st := f.state("").Status; st != tasktypes.Status_RUNNING {
		t.Errorf("it is %v", st)
	}
}

// TestCheckpointNoCriu: a machine without it is told so, with the package to install.
func TestCheckpointNoCriu(t *testing.T) {
	t.Setenv("PATH", "/no/such/directory")
	f := running(t, "cknone", nil)
	err := f.checkpoint(filepath.Join(t.TempDir(), "images"), &options.CheckpointOptions{})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "/no/such/directory") || !strings.Contains(err.Error(), "package criu") {
		t.Errorf("%v", err)
	}
	if st := f.state("").Status; st != tasktypes.Status_RUNNING {
		t.Errorf("it is %v", st)
	}
}

// TestCheckpointPending: before Start a container from a checkpoint has no process, and can be asked, killed, deleted, and
// its shim replaced. What is in the checkpoint is not looked at before.
func TestCheckpointPending(t *testing.T) {
	images := t.TempDir()
	f := serve(t, "ckpending", shimbin.Spec("ckpending", "true"))
	r := &task.CreateTaskRequest{ID: f.id, Bundle: f.dir, Rootfs: bind(), Checkpoint: images}
	if _, err := f.Create(ctx, r); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "no checkpoint") {
		t.Fatalf("an empty directory: %v", err)
	}
	if err := os.WriteFile(filepath.Join(images, "inventory.img"), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if resp, err := f.Create(ctx, r); err != nil || resp.Pid != 0 {
		t.Fatalf("%v, %v", resp, err)
	}
	waited := make(chan uint32, 1)
	go func() {
		w, err := f.Wait(ctx, &task.WaitRequest{ID: f.id})
		if err != nil {
			t.Error(err)
		}
		waited <- w.GetExitStatus()
	}()
	check := func() {
		t.Helper()
		if s := f.state(""); s.Status != tasktypes.Status_CREATED || s.Pid != 0 {
			t.Errorf("it is %v", s)
		}
		if p, err := f.Pids(ctx, &task.PidsRequest{ID: f.id}); err != nil || len(p.Processes) != 0 {
			t.Errorf("processes %v, %v", p, err)
		}
	}
	check()
	for range 2 {
		if _, err := f.Start(ctx, &task.StartRequest{ID: f.id}); err == nil || !strings.Contains(err.Error(), "cannot restore container ckpending") || !strings.Contains(err.Error(), "criu") {
			t.Fatalf("start from a damaged checkpoint: %v", err)
		}
		check()
	}
	if left := shimbin.Leftovers("/no"); len(left) > 0 {
		t.Errorf("left by starts that failed: %v", left)
	}
	f.upgrade()
	check()
	if err := f.exec("e", nil, "true"); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"exec": func() error { _, err := f.Start(ctx, &task.StartRequest{ID: f.id, ExecID: "e"}); return err }(),
		"update": func() error {
			_, err := f.Update(ctx, &task.UpdateTaskRequest{ID: f.id, Resources: &anypb.Any{Value: []byte("{}")}})
			return err
		}(),
		"resize": func() error {
			_, err := f.ResizePty(ctx, &task.ResizePtyRequest{ID: f.id, Width: 1, Height: 1})
			return err
		}(),
		"hup": func() error {
			_, err := f.Kill(ctx, &task.KillRequest{ID: f.id, Signal: uint32(syscall.SIGHUP)})
			return err
		}(),
	} {
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	f.remove("e")
	f.kill("", syscall.SIGKILL)
	select {
	case s := <-waited:
		if s != 137 {
			t.Errorf("status %d", s)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("nobody says that it has ended")
	}
	f.upgrade()
	if s := f.state(""); s.Status != tasktypes.Status_STOPPED || s.ExitStatus != 137 {
		t.Errorf("it is %v", s)
	}
	f.remove("")

	g := serve(t, "ckpending", shimbin.Spec("ckpending", "true"))
	if _, err := g.Create(ctx, &task.CreateTaskRequest{ID: g.id, Bundle: g.dir, Rootfs: bind(), Checkpoint: images}); err != nil {
		t.Fatal(err)
	}
	g.remove("")
}

// TestCheckpointRestore: a container that counts is saved and ended, and goes on in another shim where it was: not one
// line is missing or there twice, its open file is whole, and its status is its own.
func TestCheckpointRestore(t *testing.T) {
	needCriu(t)
	for name, engine := range engines {
		t.Run(name, func(t *testing.T) {
			f, log := counting(t, "ckcount", engine, nil)
			images := filepath.Join(t.TempDir(), "images")
			if err := f.checkpoint(images+"-running", &options.CheckpointOptions{}); err != nil {
				t.Fatal(err)
			}
			awaitLines(t, log, counted(t, log)+3)
			if st := f.state("").Status; st != tasktypes.Status_RUNNING {
				t.Errorf("it is %v after a checkpoint that leaves it running", st)
			}
			if err := f.checkpoint(images, &options.CheckpointOptions{Exit: true, WorkPath: images + "-work"}); err != nil {
				t.Fatal(err)
			}
			if s := f.state(""); s.Status != tasktypes.Status_STOPPED || s.ExitStatus != 137 {
				t.Errorf("after a checkpoint that ends it: %v", s)
			}
			f.remove("")
			if _, err := os.Stat(images + "-work/dump.log"); err != nil {
				t.Error(err)
			}
			from := images
			for round := range 2 { // a restored one can be saved again
				n := counted(t, log)
				g := serve(t, "ckcount", shimbin.Spec("ckcount", "sh", "-c", counter))
				g.create(func(r *task.CreateTaskRequest) {
					r.Stdout, r.Checkpoint = "file://"+log, from
					r.Options = anyOf(t, &options.Options{BinaryName: engine})
				})
				pid := g.start("")
				if s := g.state(""); s.Status != tasktypes.Status_RUNNING || s.Pid != pid || pid == 0 {
					t.Fatalf("a restored container: %v", s)
				}
				awaitLines(t, log, n+3)
				g.upgrade()
				awaitLines(t, log, counted(t, log)+3)
				if got := g.capture("e", "tail", "-n", "1", "/dev/count"); strings.TrimSpace(got) == "" {
					t.Error("an exec does not see the container's files")
				}
				if d, err := g.Shim().Exits(ctx, &shim.ExitsRequest{}); err != nil || len(d.Exits) != 1 {
					t.Errorf("exits: %v, %v", d, err)
				}
				if round == 0 {
					from = images + "-again"
					if err := g.checkpoint(from, &options.CheckpointOptions{Exit: true}); err != nil {
						t.Fatal(err)
					}
					g.remove("")
					continue
				}
				g.kill("", syscall.SIGTERM)
				if s := g.wait("").ExitStatus; s != 7 {
					t.Errorf("status %d, want 7", s)
				}
				counted(t, log)
			}
		})
	}
}

// TestCheckpointInput: a restored container reads on where it was, from the input of the one who restores it.
func TestCheckpointInput(t *testing.T) {
	needCriu(t)
	spec := func() *specs.Spec {
		return shimbin.Spec("ckinput", "sh", "-c", "while read x; do echo got $x; done; echo end; exit 5")
	}
	images := filepath.Join(t.TempDir(), "images")
	log := filepath.Join(t.TempDir(), "log")
	for round := range 2 {
		f := serve(t, "ckinput", spec())
		in, _, _ := f.fifos("init")
		f.create(func(r *task.CreateTaskRequest) {
			r.Stdin, r.Stdout = in, "file://"+log
			if round == 1 {
				r.Checkpoint = images
			}
		})
		f.start("")
		stdin, err := os.OpenFile(in, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintf(stdin, "%d\n", round); err != nil {
			t.Fatal(err)
		}
		awaitLines(t, log, round+1)
		if round == 0 {
			if err := f.checkpoint(images, &options.CheckpointOptions{Exit: true}); err != nil {
				t.Fatal(err)
			}
			_ = stdin.Close()
			f.remove("")
			continue
		}
		_ = stdin.Close()
		if _, err := f.CloseIO(ctx, &task.CloseIORequest{ID: f.id, Stdin: true}); err != nil {
			t.Fatal(err)
		}
		if s := f.wait("").ExitStatus; s != 5 {
			t.Errorf("status %d, want 5", s)
		}
	}
	if data, err := os.ReadFile(log); err != nil || string(data) != "got 0\ngot 1\nend\n" {
		t.Errorf("%q, %v", data, err)
	}
}

// TestCheckpointTerminal: a terminal comes with the container, and has the size that somebody gives it.
func TestCheckpointTerminal(t *testing.T) {
	needCriu(t)
	for name, engine := range engines {
		t.Run(name, func(t *testing.T) {
			terminal := func(r *task.CreateTaskRequest) { r.Terminal = true }
			f, log := counting(t, "cktty", engine, terminal)
			images := filepath.Join(t.TempDir(), "images")
			if err := f.checkpoint(images, &options.CheckpointOptions{Exit: true}); err != nil {
				t.Fatal(err)
			}
			f.remove("")
			n := counted(t, log)
			g := serve(t, "cktty", shimbin.Spec("cktty", "sh", "-c", counter))
			g.create(func(r *task.CreateTaskRequest) {
				r.Terminal, r.Stdout, r.Checkpoint = true, "file://"+log, images
				r.Options = anyOf(t, &options.Options{BinaryName: engine})
			})
			g.start("")
			awaitLines(t, log, n+3)
			if _, err := g.ResizePty(ctx, &task.ResizePtyRequest{ID: g.id, Width: 77, Height: 33}); err != nil {
				t.Error(err)
			}
			g.kill("", syscall.SIGTERM)
			if s := g.wait("").ExitStatus; s != 7 {
				t.Errorf("status %d, want 7", s)
			}
			counted(t, log)
		})
	}
}

// TestCheckpointNoOutput: a container that is restored by somebody who wants nothing of its output is not held up by that.
func TestCheckpointNoOutput(t *testing.T) {
	needCriu(t)
	f, _ := counting(t, "cknoout", "", nil)
	images := filepath.Join(t.TempDir(), "images")
	if err := f.checkpoint(images, &options.CheckpointOptions{Exit: true}); err != nil {
		t.Fatal(err)
	}
	f.remove("")
	g := serve(t, "cknoout", shimbin.Spec("cknoout", "sh", "-c", counter))
	g.create(func(r *task.CreateTaskRequest) { r.Checkpoint = images })
	g.start("")
	before := strings.TrimSpace(g.capture("a", "tail", "-n", "1", "/dev/count"))
	for deadline := time.Now().Add(60 * time.Second); ; {
		if now := strings.TrimSpace(g.capture(fmt.Sprint(time.Now().UnixNano()), "tail", "-n", "1", "/dev/count")); now != before {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it does not go on")
		}
	}
	g.kill("", syscall.SIGTERM)
	if s := g.wait("").ExitStatus; s != 7 {
		t.Errorf("status %d, want 7", s)
	}
	if _, err := os.Stat(filepath.Join(g.dir, shimapi.CriuConfigFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("criu's configuration: %v", err)
	}
}
