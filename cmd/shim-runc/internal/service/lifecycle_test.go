package service_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup1/stats"
	statsv2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/ledger"
)

// events reads the event stream until n events of topic have come, or the stream ends.
func (f *fixture) events(since uint64, n int, topic string) []*shim.EventRecord {
	f.t.Helper()
	c, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	stream, err := f.Shim().Events(c, &shim.EventsRequest{Since: since})
	if err != nil {
		f.t.Fatal(err)
	}
	var got []*shim.EventRecord
	for n > 0 {
		r, err := stream.Recv()
		if err != nil {
			f.t.Fatalf("%d events, then: %v", len(got), err)
		}
		got = append(got, r)
		if r.Topic == topic {
			n--
		}
	}
	return got
}

func topics(records []*shim.EventRecord) []string {
	var out []string
	for _, r := range records {
		out = append(out, strings.TrimPrefix(r.Topic, "/tasks/"))
	}
	return out
}

// TestLife: a container from create to delete, with its output, exit code, events and ledger.
func TestLife(t *testing.T) {
	f := serve(t, "life", shimbin.Spec("life", "sh", "-c", "echo out; echo err >&2; read x; echo got $x; exit 7"))
	in, out, errs := f.fifos("init")
	created := f.create(func(r *task.CreateTaskRequest) { r.Stdin, r.Stdout, r.Stderr = in, out, errs })
	outs, errc := read(t, out), read(t, errs)
	if s := f.state(""); s.Status != tasktypes.Status_CREATED || s.Pid != created.Pid || s.Bundle != f.dir || s.Stdout != out {
		t.Errorf("created: %v", s)
	}
	if data, err := os.ReadFile(filepath.Join(f.dir, shimapi.InitPidFile)); err != nil || string(data) != fmt.Sprint(created.Pid) {
		t.Errorf("init.pid: %q, %v", data, err)
	}
	if pid := f.start(""); pid != created.Pid {
		t.Errorf("started as %d, created as %d", pid, created.Pid)
	}
	if s := f.state(""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("running: %v", s)
	}
	if _, err := f.Start(ctx, &task.StartRequest{ID: "life"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second start: %v", err)
	}
	if _, err := f.Delete(ctx, &task.DeleteRequest{ID: "life"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete while running: %v", err)
	}
	w, err := os.OpenFile(in, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.WriteString("input\n")
	_ = w.Close()
	exit := f.wait("")
	if exit.ExitStatus != 7 || time.Since(exit.ExitedAt.AsTime()) > time.Minute {
		t.Errorf("exit: %v", exit)
	}
	if got := <-outs; got != "out\ngot input\n" {
		t.Errorf("stdout %q", got)
	}
	if got := <-errc; got != "err\n" {
		t.Errorf("stderr %q", got)
	}
	if s := f.state(""); s.Status != tasktypes.Status_STOPPED || s.ExitStatus != 7 {
		t.Errorf("stopped: %v", s)
	}
	if _, err := f.Kill(ctx, &task.KillRequest{ID: "life", Signal: 15}); !errdefs.IsNotFound(err) {
		t.Errorf("kill after the exit: %v", err)
	}
	if d := f.remove(""); d.ExitStatus != 7 || d.Pid != created.Pid {
		t.Errorf("delete: %v", d)
	}
	if _, err := f.State(ctx, &task.StateRequest{ID: "life"}); !errdefs.IsNotFound(err) {
		t.Errorf("state after delete: %v", err)
	}
	got := f.events(0, 1, "/tasks/delete")
	if want := []string{"create", "start", "exit", "delete"}; !slices.Equal(topics(got), want) {
		t.Errorf("events %v", topics(got))
	}
	exits, err := f.Shim().Exits(ctx, &shim.ExitsRequest{})
	if err != nil || len(exits.Exits) != 1 || exits.Exits[0].ExitStatus != 7 || exits.Exits[0].Seq > got[2].Seq {
		t.Errorf("exits: %v, %v", exits, err)
	}
	records, err := ledger.Read(filepath.Join(f.dir, shimapi.LedgerFile))
	if err != nil {
		t.Fatal(err)
	}
	if p := records[1].Process; p == nil || p.Pid != created.Pid || p.StartTicks == 0 || p.Stdout != out {
		t.Errorf("process record: %v", records[1])
	}
	for _, name := range []string{shimapi.StdioDir, filepath.Join(shimapi.EngineDir, "life"), filepath.Join(shimapi.RootfsDir, "bin")} {
		if _, err := os.Stat(filepath.Join(f.dir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
	// The open event stream gets its end when the shim ends.
	stream, err := f.Shim().Events(ctx, &shim.EventsRequest{Since: got[3].Seq})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Shutdown(ctx, &task.ShutdownRequest{ID: "life"}); err != nil {
		t.Fatal(err)
	}
	if r, err := stream.Recv(); err == nil {
		t.Errorf("event after the last: %v", r)
	}
	select {
	case <-f.done:
	case <-time.After(10 * time.Second):
		t.Error("the shim lives on after Shutdown")
	}
}

func TestDeleteCreated(t *testing.T) {
	f := serve(t, "parked", shimbin.Spec("parked", "true"))
	f.create(nil)
	if d := f.remove(""); d.ExitStatus != 137 {
		t.Errorf("deleted with status %d", d.ExitStatus)
	}
	if got := topics(f.events(0, 1, "/tasks/delete")); !slices.Equal(got, []string{"create", "exit", "delete"}) {
		t.Errorf("events %v", got)
	}
}

func TestKillCreated(t *testing.T) {
	f := serve(t, "parked2", shimbin.Spec("parked2", "true"))
	f.create(nil)
	f.kill("", syscall.SIGKILL)
	if s := f.wait("").ExitStatus; s != 137 {
		t.Errorf("status %d", s)
	}
	if _, err := f.Start(ctx, &task.StartRequest{ID: "parked2"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start after the exit: %v", err)
	}
}

// TestSignals: what a signal does to a process, and that containers do not inherit what the shim does with signals.
func TestSignals(t *testing.T) {
	f := running(t, "sig", nil)
	for i, pid := range []string{"self", "1"} {
		got := f.capture(fmt.Sprint("grep", i), "grep", "-E", "Sig(Ign|Blk)", "/proc/"+pid+"/status")
		var blocked, ignored uint64
		if _, err := fmt.Sscanf(got, "SigBlk:\t%x\nSigIgn:\t%x", &blocked, &ignored); err != nil {
			t.Fatalf("%v: %q", err, got)
		}
		// 32 and 33 belong to the C library, whose posix_spawn(3), as make uses it, has children ignore them.
		if ignored &^= 0b11 << 31; blocked != 0 || ignored != 0 {
			t.Errorf("process %s blocks or ignores signals:\n%s", pid, got)
		}
	}
	if err := f.exec("e", nil, "sleep", "1000"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Kill(ctx, &task.KillRequest{ID: "sig", ExecID: "e", Signal: 15}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("kill of an exec that was not started: %v", err)
	}
	f.start("e")
	f.kill("e", syscall.SIGTERM)
	if s := f.wait("e").ExitStatus; s != 143 {
		t.Errorf("exec ended by SIGTERM has status %d", s)
	}
	if _, err := f.Kill(ctx, &task.KillRequest{ID: "sig", Signal: 99}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("signal 99: %v", err)
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE, syscall.SIGQUIT} {
		_ = f.cmd.Process.Signal(sig)
	}
	if s := f.state(""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("after signals to the shim: %v", s)
	}
}

func TestPause(t *testing.T) {
	f := running(t, "pause", nil)
	if _, err := f.Resume(ctx, &task.ResumeRequest{ID: "pause"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("resume of what runs: %v", err)
	}
	if err := f.exec("added", nil, "true"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Pause(ctx, &task.PauseRequest{ID: "pause"}); err != nil {
		t.Fatal(err)
	}
	if s := f.state(""); s.Status != tasktypes.Status_PAUSED {
		t.Errorf("paused: %v", s)
	}
	refused := func(err error) bool {
		return errdefs.IsFailedPrecondition(err) && strings.Contains(err.Error(), "pause") && strings.Contains(err.Error(), "paused")
	}
	if err := f.exec("e", nil, "true"); !refused(err) {
		t.Errorf("exec in a paused container: %v", err)
	}
	if _, err := f.Start(ctx, &task.StartRequest{ID: "pause", ExecID: "added"}); !refused(err) {
		t.Errorf("start of an exec in a paused container: %v", err)
	}
	if _, err := f.Resume(ctx, &task.ResumeRequest{ID: "pause"}); err != nil {
		t.Fatal(err)
	}
	if s := f.runExec("e", nil, "true"); s != 0 {
		t.Errorf("exec after resume: %d", s)
	}
	if _, err := f.Pause(ctx, &task.PauseRequest{ID: "pause"}); err != nil {
		t.Fatal(err)
	}
	f.kill("", syscall.SIGKILL) // reaches what is paused
	if s := f.wait("").ExitStatus; s != 137 {
		t.Errorf("status %d", s)
	}
	if got := topics(f.events(0, 1, "/tasks/exit")); !slices.Contains(got, "paused") || !slices.Contains(got, "resumed") {
		t.Errorf("events %v", got)
	}
}

func TestStatsAndUpdate(t *testing.T) {
	f := running(t, "stats", nil)
	limit := func() uint64 {
		resp, err := f.Stats(ctx, &task.StatsRequest{ID: "stats"})
		if err != nil {
			t.Fatal(err)
		}
		m, err := typeurl.UnmarshalAny(resp.Stats)
		if err != nil {
			t.Fatal(err)
		}
		switch m := m.(type) {
		case *stats.Metrics:
			return m.Memory.Usage.Limit
		case *statsv2.Metrics:
			return m.Memory.UsageLimit
		}
		t.Fatalf("metrics are a %T", m)
		return 0
	}
	if l := limit(); l <= 64<<20 {
		t.Errorf("limit is %d", l)
	}
	if _, err := f.Update(ctx, &task.UpdateTaskRequest{ID: "stats", Resources: &anypb.Any{Value: []byte(`{"memory":{"limit":67108864}}`)}}); err != nil {
		t.Fatal(err)
	}
	if l := limit(); l != 64<<20 {
		t.Errorf("limit is %d", l)
	}
	for _, bad := range []*anypb.Any{nil, {Value: []byte("[]")}} {
		if _, err := f.Update(ctx, &task.UpdateTaskRequest{ID: "stats", Resources: bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("update with %v: %v", bad, err)
		}
	}
}

// TestHostPID: what a container without a pid namespace leaves running dies with its init.
func TestHostPID(t *testing.T) {
	spec := shimbin.Spec("host", "sh", "-c", "setsid sleep 12345 & setsid sleep 12345 & sleep 0.1; exit 9")
	shimbin.HostPID(spec)
	f := serve(t, "host", spec)
	f.create(nil)
	f.start("")
	if s := f.wait("").ExitStatus; s != 9 {
		t.Errorf("status %d", s)
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if data, _ := os.ReadFile(p); string(data) == "sleep\x0012345\x00" {
			t.Errorf("%s lives on", p)
		}
	}
}

// TestBadCreate: each failure has its code, names the object, leaves nothing, and a good Create works after it.
func TestBadCreate(t *testing.T) {
	good := shimbin.Spec("bad", "true")
	f := serve(t, "bad", good)
	config := filepath.Join(f.dir, shimapi.ConfigFile)
	whole, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	any := func(o *options.Options) *anypb.Any {
		a, err := typeurl.MarshalAnyToProto(o)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for name, c := range map[string]struct {
		config string
		mod    func(*task.CreateTaskRequest)
		is     func(error) bool
		says   string
	}{
		"other id":      {mod: func(r *task.CreateTaskRequest) { r.ID = "other" }, is: errdefs.IsInvalidArgument, says: "other"},
		"other bundle":  {mod: func(r *task.CreateTaskRequest) { r.Bundle = "/other" }, is: errdefs.IsInvalidArgument, says: "/other"},
		"checkpoint":    {mod: func(r *task.CreateTaskRequest) { r.Checkpoint = "/no/images" }, is: errdefs.IsInvalidArgument, says: "/no/images holds no checkpoint"},
		"binary":        {mod: func(r *task.CreateTaskRequest) { r.Options = any(&options.Options{BinaryName: "no-runtime"}) }, is: errdefs.IsFailedPrecondition, says: "no-runtime"},
		"options":       {mod: func(r *task.CreateTaskRequest) { r.Options = &anypb.Any{TypeUrl: "no.such.Type"} }, is: errdefs.IsInvalidArgument, says: "no.such.Type"},
		"stdout":        {mod: func(r *task.CreateTaskRequest) { r.Stdout = "/no/such" }, is: errdefs.IsInvalidArgument, says: "/no/such"},
		"logger":        {mod: func(r *task.CreateTaskRequest) { r.Stdout = "binary:///logger" }, is: errdefs.IsInvalidArgument, says: "/logger: no such file"},
		"mount":         {mod: func(r *task.CreateTaskRequest) { r.Rootfs[0].Source = "/no/such" }, is: func(err error) bool { return err != nil }, says: "/no/such"},
		"syntax":        {config: "{\n \"root\": {\n,", is: errdefs.IsInvalidArgument, says: "line 3"},
		"type":          {config: "{\n\"process\": {\"args\": 5}}", is: errdefs.IsInvalidArgument, says: "process.args"},
		"no process":    {config: `{"root":{"path":"rootfs"},"linux":{}}`, is: errdefs.IsInvalidArgument, says: "process"},
		"no config":     {config: "-", is: errdefs.IsInvalidArgument, says: "config.json"},
		"no executable": {config: strings.Replace(string(whole), `"true"`, `"/no/such"`, 1), is: errdefs.IsInvalidArgument, says: "/no/such"},
		"no rootfs":     {mod: func(r *task.CreateTaskRequest) { r.Rootfs = nil }, is: errdefs.IsInvalidArgument, says: "true"},
	} {
		switch c.config {
		case "":
			err = os.WriteFile(config, whole, 0o600)
		case "-":
			err = os.Remove(config)
		default:
			err = os.WriteFile(config, []byte(c.config), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		r := &task.CreateTaskRequest{ID: "bad", Bundle: f.dir, Rootfs: bind()}
		if c.mod != nil {
			c.mod(r)
		}
		if _, err := f.Create(ctx, r); !c.is(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := f.State(ctx, &task.StateRequest{ID: "bad"}); !errdefs.IsNotFound(err) {
			t.Errorf("%s: state: %v", name, err)
		}
		for _, left := range []string{"rootfs/bin", "runc/bad", "init.pid", "options.json"} {
			if _, err := os.Stat(filepath.Join(f.dir, left)); err == nil {
				t.Errorf("%s: %s is left", name, left)
			}
		}
		if left, _ := os.ReadDir(filepath.Join(f.dir, shimapi.StdioDir)); len(left) > 0 {
			t.Errorf("%s: FIFOs are left: %v", name, left)
		}
		if left, _ := filepath.Glob("/sys/fs/cgroup/*" + shimbin.CgroupParent + "/bad"); len(left) > 0 {
			t.Errorf("%s: cgroups are left: %v", name, left)
		}
	}
	if err := os.WriteFile(config, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	f.create(nil)
	if _, err := f.Create(ctx, &task.CreateTaskRequest{ID: "bad", Bundle: f.dir}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second create: %v", err)
	}
	if _, err := f.Shutdown(ctx, &task.ShutdownRequest{ID: "bad"}); err != nil {
		t.Fatal(err)
	}
	f.start("") // Shutdown did nothing: a container is kept
	if s := f.wait("").ExitStatus; s != 0 {
		t.Errorf("status %d", s)
	}
	if _, err := f.Checkpoint(ctx, &task.CheckpointTaskRequest{ID: "bad"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("checkpoint of what has ended: %v", err)
	}
}

// TestClientGoes: a request goes on when its client does not wait for it, and other clients are served.
func TestClientGoes(t *testing.T) {
	f := serve(t, "gone", shimbin.Spec("gone", "sleep", "1000"))
	c, err := shimapi.Dial(ctx, shimapi.BootstrapParams{Version: 2, Address: f.socket()})
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = c.Create(ctx, &task.CreateTaskRequest{ID: "gone", Bundle: f.dir, Rootfs: bind()}) }()
	for { // until the shim has begun
		if _, err := os.Stat(filepath.Join(f.dir, shimapi.StdioDir)); err == nil {
			break
		}
		time.Sleep(100 * time.Microsecond)
	}
	_ = c.Close()
	f.start("") // waits for the lifecycle lock, then finds the container created
	if s := f.state(""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("state %v", s)
	}
}

// TestDescribe: what the shim says of itself, and that thousands of requests leave neither descriptors nor goroutines.
func TestDescribe(t *testing.T) {
	f := running(t, "describe", nil)
	in, out, errs := f.fifos("e")
	withIO := func(r *task.ExecProcessRequest) { r.Stdin, r.Stdout, r.Stderr = in, out, errs }
	withTTY := func(r *task.ExecProcessRequest) { r.Stdin, r.Stdout, r.Terminal = in, out, true }
	for _, mod := range []func(*task.ExecProcessRequest){withIO, withTTY} {
		f.runExec("warm", mod, "true")
	}
	// libcontainer leaves the pidfd in its os.Process to the garbage collector: those come and go, all others must not.
	fds := func() (pidfds, others int) {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", f.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if target, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", f.cmd.Process.Pid, e.Name())); strings.Contains(target, "pidfd") {
				pidfds++
			} else {
				others++
			}
		}
		return pidfds, others
	}
	before := f.describe()
	_, othersBefore := fds()
	n := 300
	if testing.Short() || shimbin.Race {
		n = 40
	}
	for i := range n {
		mod := withIO
		if i%4 == 0 {
			mod = withTTY
		}
		if s := f.runExec(fmt.Sprint("e", i), mod, "true"); s != 0 {
			t.Fatalf("exec %d: status %d", i, s)
		}
	}
	after := f.describe()
	pidfds, others := fds()
	if others > othersBefore+1 || pidfds > 150 || after.Goroutines > before.Goroutines+5 {
		t.Errorf("after %d execs: %d pidfds, %d other descriptors (before: %d), %d goroutines (before: %d)",
			n, pidfds, others, othersBefore, after.Goroutines, before.Goroutines)
	}
	if after.Id != "describe" || after.Namespace != "test" || after.Bundle != f.dir || int(after.Pid) != f.cmd.Process.Pid || after.Version == "" ||
		len(after.Processes) != 1 || after.Processes[0].State != string(shimapi.Running) || after.LastSeq == 0 || after.Incarnation == "" {
		t.Errorf("describe: %v", after)
	}
	for _, phase := range []string{"create", "create.mount", "create.config", "create.init", "start", "exec"} {
		if after.Timings[phase] <= 0 {
			t.Errorf("no timing of %s: %v", phase, after.Timings)
		}
	}
}
