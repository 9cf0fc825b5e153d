package tasks

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/shims"
	shim "github.com/managerd/managerd/protos/shim/v1"
)

// reality is a world of real shims and containers.
type reality struct {
	*world
	root, parent string
	memory       int64 // the limit of what is run from now on, in bytes; 0: none
}

func realWorld(t *testing.T) *reality {
	t.Helper()
	r := &reality{parent: fmt.Sprintf("/managerd-tasks-test-%d", os.Getpid())}
	t.Cleanup(func() { // after that of the world
		dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + r.parent)
		for _, dir := range append(dirs, "/sys/fs/cgroup"+r.parent) {
			if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
		}
	})
	r.world = newWorld(t, shimRunc(t))
	r.root = t.TempDir()
	data, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("%v (Debian: apt-get install busybox-static)", err)
	}
	if err := os.WriteFile(filepath.Join(r.root, "busybox"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"dev", "proc"} {
		if err := os.Mkdir(filepath.Join(r.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// spec is that of a container that runs a shell script.
func (r *reality) spec(c CreateRequest, script string) []byte {
	r.t.Helper()
	spec := specs.Spec{
		Version: "1.2.0",
		Root:    &specs.Root{Path: r.root, Readonly: true},
		Process: &specs.Process{Cwd: "/", Args: []string{"/busybox", "sh", "-c", script}, Terminal: c.Terminal},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: filepath.Join(r.parent, c.ID),
			Namespaces:  []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}},
		},
	}
	if r.memory > 0 {
		spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &r.memory}}
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/dev/zero", Type: "bind", Source: "/dev/zero", Options: []string{"bind"}})
	}
	body, err := json.Marshal(spec)
	if err != nil {
		r.t.Fatal(err)
	}
	return body
}

// run creates and starts a container that runs a shell script.
func (r *reality) run(c CreateRequest, script string) uint32 {
	r.t.Helper()
	r.add(c.ID, r.spec(c, script), shims.DefaultRuntime)
	if _, err := r.Create(in("ns"), c); err != nil {
		r.t.Fatal(err)
	}
	pid, err := r.Start(in("ns"), c.ID, "")
	if err != nil {
		r.t.Fatal(err)
	}
	return pid
}

// exec starts another process in a container.
func (r *reality) exec(id, execID, script string) {
	r.t.Helper()
	spec, err := json.Marshal(specs.Process{Cwd: "/", Args: []string{"/busybox", "sh", "-c", script}})
	if err != nil {
		r.t.Fatal(err)
	}
	if err := r.Exec(in("ns"), &task.ExecProcessRequest{ID: id, ExecID: execID, Spec: &anypb.Any{Value: spec}}); err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.Start(in("ns"), id, execID); err != nil {
		r.t.Fatal(err)
	}
}

// killShim kills the shim of a task with SIGKILL, and does meanwhile before its successor can be there.
func (r *reality) killShim(id string, meanwhile func()) {
	r.t.Helper()
	pid := r.shimPid(id)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		r.t.Fatal(err)
	}
	meanwhile()
	eventually(r.t, "a successor has taken over", func() bool {
		_, s, err := r.living(in("ns"), id)
		if err != nil {
			return false
		}
		d, err := s.Shim().Describe(context.Background(), &shim.DescribeRequest{})
		return err == nil && d.Pid != uint32(pid)
	})
}

func fifo(t *testing.T, name string) (string, *os.File) {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if name == "in" {
		_ = f.Close()
		f, err = os.OpenFile(path, os.O_RDWR, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return path, f
}

// TestShimsKilled kills the shim of a container that writes a line per millisecond again and again (MANAGERD_KILLS times,
// 20 by default): its client, which knows of nothing, has each line once; execs that run across it and the container,
// which ends while no shim lives, have their exact exit codes.
func TestShimsKilled(t *testing.T) {
	kills := 20
	if n, err := strconv.Atoi(os.Getenv("MANAGERD_KILLS")); err == nil {
		kills = n
	}
	w := realWorld(t)
	out, _ := fifo(t, "out")
	file := filepath.Join(t.TempDir(), "log")
	lines := make(chan int, 1)
	go func() {
		n := 0
		f, err := os.Open(out) // waits for the shim's side
		if err != nil {
			t.Error(err)
		}
		defer func() { _ = f.Close() }()
		for s := bufio.NewScanner(f); s.Scan(); n++ {
			if s.Text() != strconv.Itoa(n) {
				t.Errorf("line %d is %q", n, s.Text())
				break
			}
		}
		lines <- n
	}()
	events := w.record()
	pid := w.run(CreateRequest{ID: "c1", Stdout: out, Stderr: "file://" + file},
		"trap end=1 TERM; i=0; while [ -z $end ]; do echo $i; echo $i >&2; i=$((i+1)); /busybox usleep 1000; done; echo $i; echo $i >&2; exit 42")
	var longest time.Duration
	told := []string{"create", "start"}
	for i := range kills {
		execID := fmt.Sprintf("e%d", i)
		w.exec("c1", execID, fmt.Sprintf("/busybox usleep 20000; exit %d", i%200))
		begin := time.Now()
		w.killShim("c1", func() {})
		longest = max(longest, time.Since(begin))
		told = append(told, "exec-added", "exec-started", fmt.Sprintf("exit %s=%d", execID, i%200))
		status, _, err := w.Wait(in("ns"), "c1", execID)
		if err != nil || status != uint32(i%200) {
			t.Fatalf("exec %d: %d, %v", i, status, err)
		}
		if _, err := w.DeleteProcess(in("ns"), "c1", execID); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d kills, longest time to a successor that answers %v", kills, longest)
	if longest > 5*time.Second {
		t.Errorf("it took a successor %v", longest)
	}
	w.killShim("c1", func() {
		if err := unix.Kill(int(pid), unix.SIGTERM); err != nil {
			t.Error(err)
		}
	})
	status, _, err := w.Wait(in("ns"), "c1", "")
	if err != nil || status != 42 {
		t.Errorf("exit: %d, %v", status, err)
	}
	events.await(t, "c1", append(told, "exit c1=42")...) // each once
	select {
	case n := <-lines:
		t.Logf("%d lines", n)
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		got := strings.Fields(string(data))
		for i, line := range got {
			if line != strconv.Itoa(i) {
				t.Fatalf("line %d of the file is %q", i, line)
			}
		}
		if len(got) != n || n < kills {
			t.Errorf("%d lines in the file, %d by the FIFO", len(got), n)
		}
	case <-time.After(20 * time.Second):
		t.Error("the client sees no end of the output")
	}
	if _, err := w.Delete(in("ns"), "c1"); err != nil {
		t.Error(err)
	}
}

// TestTerminalSurvives: a terminal and its input go on with the next shim.
func TestTerminalSurvives(t *testing.T) {
	w := realWorld(t)
	out, screen := fifo(t, "out")
	in1, keys := fifo(t, "in")
	w.run(CreateRequest{ID: "c1", Stdin: in1, Stdout: out, Terminal: true}, "echo ready; read a; echo got $a; read b; echo got $b; exit 5")
	lines := bufio.NewScanner(screen)
	expect := func(want string) {
		t.Helper()
		for lines.Scan() {
			if strings.TrimSpace(lines.Text()) == want {
				return
			}
		}
		t.Fatalf("the terminal never says %q: %v", want, lines.Err())
	}
	expect("ready")
	for _, word := range []string{"one", "two"} {
		w.killShim("c1", func() {})
		if _, err := keys.WriteString(word + "\n"); err != nil {
			t.Fatal(err)
		}
		expect("got " + word)
	}
	if status, _, err := w.Wait(in("ns"), "c1", ""); err != nil || status != 5 {
		t.Errorf("exit: %d, %v", status, err)
	}
}

// TestInputSurvives: the container sees no end of its input when its shim dies, and the client none of its pipe.
func TestInputSurvives(t *testing.T) {
	w := realWorld(t)
	out, f := fifo(t, "out")
	in1, keys := fifo(t, "in")
	w.run(CreateRequest{ID: "c1", Stdin: in1, Stdout: out}, "exec /busybox cat")
	lines := bufio.NewScanner(f)
	for i := range 5 {
		w.killShim("c1", func() { _, _ = fmt.Fprintln(keys, i) })
		if !lines.Scan() || lines.Text() != strconv.Itoa(i) {
			t.Fatalf("line %d: %q, %v", i, lines.Text(), lines.Err())
		}
	}
	if err := w.CloseIO(in("ns"), "c1", "", true); err != nil {
		t.Fatal(err)
	}
	if status, _, err := w.Wait(in("ns"), "c1", ""); err != nil || status != 0 {
		t.Errorf("exit: %d, %v", status, err)
	}
}

// TestBothKilled: the shim dies while no daemon lives; the next one goes on with it.
func TestBothKilled(t *testing.T) {
	w := realWorld(t)
	file := filepath.Join(t.TempDir(), "log")
	pid := w.run(CreateRequest{ID: "c1", Stdout: "file://" + file}, "trap 'exit 42' TERM; while :; do echo line; /busybox usleep 1000; done")
	w.exec("c1", "e1", "trap 'exit 7' TERM; while :; do /busybox usleep 1000; done")
	w.stop()
	shimPid := w.shimPid("c1")
	if err := unix.Kill(shimPid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the shim is gone", func() bool { return unix.Kill(shimPid, 0) != nil })
	<-w.begin()
	if st, err := w.Service.Get(in("ns"), "c1", ""); err != nil || st.Pid != pid || st.Status != tasktypes.Status_RUNNING {
		t.Errorf("%v, %v", st, err)
	}
	if err := w.Kill(in("ns"), "c1", "e1", 15, false); err != nil {
		t.Error(err)
	}
	if status, _, err := w.Wait(in("ns"), "c1", "e1"); err != nil || status != 7 {
		t.Errorf("exec: %d, %v", status, err)
	}
	if err := w.Kill(in("ns"), "c1", "", 15, false); err != nil {
		t.Error(err)
	}
	if status, _, err := w.Wait(in("ns"), "c1", ""); err != nil || status != 42 {
		t.Errorf("exit: %d, %v", status, err)
	}
}

// TestListStopped: a list is there within a second, whatever the shims do.
func TestListStopped(t *testing.T) {
	w := realWorld(t)
	var pids []int
	for i := range 4 {
		id := fmt.Sprint("c", i)
		w.run(CreateRequest{ID: id}, "exec /busybox sleep 1000")
		pids = append(pids, w.shimPid(id))
	}
	signal := func(sig unix.Signal) {
		for _, pid := range pids[1:] {
			if err := unix.Kill(pid, sig); err != nil {
				t.Error(err)
			}
		}
	}
	signal(unix.SIGSTOP)
	defer signal(unix.SIGCONT)
	for _, pid := range pids[1:] {
		eventually(t, "the shim is stopped", func() bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			return err == nil && strings.Contains(string(stat), ") T ")
		})
	}
	for range 3 { // the second one finds a question that is still open
		begin := time.Now()
		all, err := w.List(in("ns"))
		took := time.Since(begin)
		if err != nil || len(all) != 4 || took >= time.Second {
			t.Fatalf("%d tasks after %v, %v", len(all), took, err)
		}
		t.Logf("the list took %v", took)
		for i, st := range all {
			if want := tasktypes.Status_UNKNOWN; i > 0 && st.Status != want || i == 0 && st.Status != tasktypes.Status_RUNNING {
				t.Errorf("%s is %v", st.ID, st.Status)
			}
		}
	}
}
