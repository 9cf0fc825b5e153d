package shimtest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3/cgroup1/stats"
	stats2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi"
)

// story judges the events so far, by their lines.
func (sh *shim) story(key string, want ...string) {
	sh.t.Helper()
	var got []string
	for _, e := range sh.events.wait(len(want)) {
		got = append(got, e.describe())
		sh.expect("events/namespace", e.namespace == sh.ns, "%q", e.namespace)
	}
	sh.expect(key, slices.Equal(got, want), "events:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
}

// lifeCase is a container's life from end to end.
func lifeCase(sh *shim) {
	before := time.Now()
	pid := sh.created(newSpec(sh.id, "sh", "-c", "exit 7"), nil)
	st := sh.state("")
	sh.expect("create/state", st.Status == tasktypes.Status_CREATED && st.Pid == pid && st.ID == sh.id && st.Bundle == sh.bundle, "%v", st)
	sh.expect("create/parked", alive(int(pid)), "there is no init %d", pid)
	data, err := os.ReadFile(filepath.Join(sh.bundle, shimapi.InitPidFile))
	sh.expect("create/pid file", err == nil && strings.TrimSpace(string(data)) == fmt.Sprint(pid), "%q, %v", data, err)
	conn, err := request(sh.Connect, &task.ConnectRequest{ID: sh.id})
	sh.expect("connect/pid", err == nil && conn.TaskPid == pid, "%v, %v", conn, err)

	sh.expect("start/pid", sh.start("") == pid, "another pid than create's")
	w := sh.wait("")
	sh.expect("wait/status", w.ExitStatus == 7, "status %d", w.ExitStatus)
	at := w.ExitedAt.AsTime()
	sh.expect("wait/time", at.After(before.Add(-time.Second)) && at.Before(time.Now().Add(time.Second)), "%v", at)
	st = sh.state("")
	sh.expect("exit/state", st.Status == tasktypes.Status_STOPPED && st.ExitStatus == 7, "%v", st)
	again := sh.wait("")
	sh.expect("wait/again", again.ExitStatus == 7 && again.ExitedAt.AsTime().Equal(at), "%v", again)
	d := sh.remove("")
	sh.expect("delete/answer", d.Pid == pid && d.ExitStatus == 7 && d.ExitedAt.AsTime().Equal(at), "%v", d)
	sh.expect("delete/mounts", len(mountsBelow(sh.bundle)) == 0, "left: %v", mountsBelow(sh.bundle))
	sh.expect("delete/cgroups", len(cgroupDirs(sh.id)) == 0, "left: %v", cgroupDirs(sh.id))

	sh.story("life/events",
		"/tasks/create "+sh.id, "/tasks/start "+sh.id, fmt.Sprintf("/tasks/exit %s/%s 7", sh.id, sh.id), "/tasks/delete "+sh.id+" 7")
	for _, e := range sh.events.wait(4) {
		switch e := e.body.(type) {
		case *events.TaskCreate:
			sh.expect("events/create", e.Pid == pid && e.Bundle == sh.bundle && len(e.Rootfs) == 1, "%v", e)
		case *events.TaskStart:
			sh.expect("events/start", e.Pid == pid, "%v", e)
		case *events.TaskExit:
			sh.expect("events/exit", e.Pid == pid && e.ExitedAt.AsTime().Equal(at), "%v", e)
		case *events.TaskDelete:
			sh.expect("events/delete", e.Pid == pid && e.ExitedAt.AsTime().Equal(at), "%v", e)
		}
	}
}

// killCase: a signal reaches init, and with "all" every process.
func killCase(sh *shim) {
	sh.running(newSpec(sh.id, "sh", "-c", `trap 'exit 5' TERM; touch /dev/ready; while :; do sleep 0.01; done`))
	sh.must("ready", sh.ready())
	sh.startExec("e1", "sleep", "1000")
	_, err := request(sh.Kill, &task.KillRequest{ID: sh.id, Signal: 99})
	sh.expect("kill/no such signal", err != nil, "accepted")
	sh.kill("", 15, false)
	sh.expect("kill/handled", sh.wait("").ExitStatus == 5, "status %d", sh.wait("").ExitStatus)
	sh.expect("kill/execs of a dead init", sh.wait("e1").ExitStatus == 137, "status %d", sh.wait("e1").ExitStatus)
}

// ready waits until the container has made /dev/ready.
func (sh *shim) ready() error {
	var last error
	for i := range 200 {
		id := fmt.Sprint("ready", i)
		if err := sh.addExec(id, nil, "test", "-e", "/dev/ready"); err != nil {
			return err
		}
		sh.start(id)
		status := sh.wait(id).ExitStatus
		sh.remove(id)
		if status == 0 {
			return nil
		}
		last = fmt.Errorf("test -e exits with %d", status)
	}
	return last
}

// killCreatedCase: a container that was never started dies, and says so.
func killCreatedCase(sh *shim) {
	pid := int(sh.created(nil, nil))
	sh.kill("", 9, false)
	sh.expect("kill/created", sh.wait("").ExitStatus == 137, "status %d", sh.wait("").ExitStatus)
	sh.expect("kill/created pid", !alive(pid), "it lives")
	d := sh.remove("")
	sh.expect("delete/killed", d.ExitStatus == 137, "%v", d)
	sh.story("kill created/events",
		"/tasks/create "+sh.id, fmt.Sprintf("/tasks/exit %s/%s 137", sh.id, sh.id), "/tasks/delete "+sh.id+" 137")
}

// initKilledCase: somebody else than the shim kills init.
func initKilledCase(sh *shim) {
	pid := sh.running(nil)
	sh.must("kill", unix.Kill(pid, unix.SIGKILL))
	sh.expect("init killed/status", sh.wait("").ExitStatus == 137, "status %d", sh.wait("").ExitStatus)
	sh.expect("init killed/state", sh.state("").Status == tasktypes.Status_STOPPED, "%v", sh.state(""))
	sh.remove("")
	sh.story("init killed/events",
		"/tasks/create "+sh.id, "/tasks/start "+sh.id, fmt.Sprintf("/tasks/exit %s/%s 137", sh.id, sh.id), "/tasks/delete "+sh.id+" 137")
}

// hostPIDCase: without a pid namespace, what outlives init does not outlive the container.
func hostPIDCase(sh *shim) {
	spec := newSpec(sh.id, "sh", "-c", "sleep 1000 & sleep 1000 & (sleep 1000 &) ; sleep 1000")
	hostPID(spec)
	sh.running(spec)
	sh.must("children", func() error {
		if !eventually(func() bool { return len(sh.pids()) >= 4 }) { // a shell may run its last command in its own place
			return fmt.Errorf("pids: %v", sh.pids())
		}
		return nil
	}())
	pids := sh.pids()
	sh.kill("", 9, true)
	sh.expect("host pid/status", sh.wait("").ExitStatus == 137, "status %d", sh.wait("").ExitStatus)
	sh.remove("")
	for _, pid := range pids {
		sh.expect("host pid/all", eventually(func() bool { return !alive(pid) }), "process %d lives after Delete", pid)
	}
}

// pauseCase: a paused container does not run, and can be killed.
func pauseCase(sh *shim) {
	pid := sh.running(newSpec(sh.id, "sh", "-c", "while :; do :; done"))
	sh.must("Pause", sh.ask(shimapi.ReqPause, ""))
	sh.expect("pause/state", sh.state("").Status == tasktypes.Status_PAUSED, "%v", sh.state(""))
	used := ticks(pid)
	time.Sleep(100 * time.Millisecond) // time for it to run, should it not be frozen
	sh.expect("pause/frozen", ticks(pid) == used, "it ran for %d ticks", ticks(pid)-used)
	sh.expect("pause/exec", sh.addExec("e1", nil, "true") != nil, "an exec was added to a paused container")
	sh.must("Resume", sh.ask(shimapi.ReqResume, ""))
	sh.expect("resume/state", sh.state("").Status == tasktypes.Status_RUNNING, "%v", sh.state(""))
	sh.expect("resume/runs", eventually(func() bool { return ticks(pid) > used }), "it does not run")
	sh.must("Pause", sh.ask(shimapi.ReqPause, ""))
	_, err := request(sh.Kill, &task.KillRequest{ID: sh.id, Signal: 9})
	sh.expect("pause/kill", err == nil, "%v", err)
	ended := eventually(func() bool { return !alive(pid) })
	sh.expect("pause/killed", ended, "a paused container survives SIGKILL")
	if !ended {
		_ = sh.ask(shimapi.ReqResume, "")
	}
	sh.expect("pause/status", sh.wait("").ExitStatus == 137, "status %d", sh.wait("").ExitStatus)
	var lines []string
	for _, e := range sh.events.wait(5) {
		lines = append(lines, e.topic)
	}
	sh.expect("pause/events", len(lines) > 4 && slices.Equal(lines[2:5], []string{"/tasks/paused", "/tasks/resumed", "/tasks/paused"}), "%v", lines)
}

// ticks is the processor time of a process: fields 14 and 15 of /proc/PID/stat.
func ticks(pid int) (sum int) {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 13 {
		return 0
	}
	for _, f := range fields[11:13] {
		var n int
		_, _ = fmt.Sscan(f, &n)
		sum += n
	}
	return sum
}

// statsCase: metrics in containerd's types; limits that change them.
func statsCase(sh *shim) {
	const before, after = 64 << 20, 96 << 20
	spec := newSpec(sh.id, "sleep", "1000")
	spec.Linux.Resources = &specs.LinuxResources{Memory: memory(before)}
	pid := sh.running(spec)
	limit, used, _ := sh.numbers()
	sh.expect("stats/limit", limit == before, "memory limit %d", limit)
	sh.expect("stats/memory", used > 0, "memory %d", used)
	// A runtime's own threads may take a moment to be gone.
	sh.expect("stats/pids", eventually(func() bool { _, _, n := sh.numbers(); return n == 1 }), "more than one process")
	sh.expect("pids/init", slices.Equal(sh.pids(), []int{pid}), "pids %v, init is %d", sh.pids(), pid)

	_, err := request(sh.Update, &task.UpdateTaskRequest{ID: sh.id, Resources: encode(resourcesType, &specs.LinuxResources{Memory: memory(after)})})
	sh.expect("update", err == nil, "%v", err)
	limit, _, _ = sh.numbers()
	sh.expect("update/limit", limit == after, "memory limit %d", limit)
}

// updateNothingCase: a request without its contents harms nobody.
func updateNothingCase(sh *shim) {
	sh.running(nil)
	_, err := request(sh.Update, &task.UpdateTaskRequest{ID: sh.id})
	sh.expect("update nothing/code", errdefs.IsInvalidArgument(err), "%v", err)
	_, err = request(sh.State, stateOf(sh.id, ""))
	sh.expect("update nothing/shim", err == nil, "%v", err)
	if err != nil {
		_ = unix.Kill(sh.pid, unix.SIGKILL)
		sh.dead = true
		sh.deleteVerb()
	}
}

func memory(limit int64) *specs.LinuxMemory { return &specs.LinuxMemory{Limit: &limit, Swap: &limit} }

// numbers are a container's memory limit, memory and processes, in either version of containerd's metrics.
func (sh *shim) numbers() (limit, used, pids uint64) {
	sh.t.Helper()
	resp, err := request(sh.Stats, &task.StatsRequest{ID: sh.id})
	sh.must("Stats", err)
	v, err := typeurl.UnmarshalAny(resp.Stats)
	sh.must("Stats", err)
	switch m := v.(type) {
	case *stats.Metrics:
		return m.GetMemory().GetUsage().GetLimit(), m.GetMemory().GetUsage().GetUsage(), m.GetPids().GetCurrent()
	case *stats2.Metrics:
		return m.GetMemory().GetUsageLimit(), m.GetMemory().GetUsage(), m.GetPids().GetCurrent()
	}
	sh.t.Fatalf("metrics are a %T", v)
	return 0, 0, 0
}

// createFailsCase: what cannot be created is refused with its reason, and leaves nothing; the next try succeeds.
func createFailsCase(sh *shim) {
	spec := func(mod func(*specs.Spec)) *specs.Spec {
		s := newSpec(sh.id, "sleep", "1000")
		mod(s)
		return s
	}
	for _, c := range []struct {
		name string
		spec *specs.Spec
		raw  string
	}{
		{"no such program", spec(func(s *specs.Spec) { s.Process.Args = []string{"/no/such"} }), ""},
		{"no process", spec(func(s *specs.Spec) { s.Process = nil }), ""},
		{"no rootfs", spec(func(s *specs.Spec) { s.Root.Path = "/no/such/rootfs" }), ""},
		{"malformed", nil, `{"ociVersion": `},
		{"not a spec", nil, `[1, 2]`},
	} {
		sh.writeSpec(c.spec, c.raw)
		_, err := request(sh.Create, &task.CreateTaskRequest{ID: sh.id, Bundle: sh.bundle, Rootfs: sh.bind()})
		key := "create fails/" + c.name
		sh.expect(key, err != nil && !timedOut(err), "%v", err)
		sh.expect(key+"/code", errdefs.IsInvalidArgument(err), "%v", err)
		_, err = request(sh.State, stateOf(sh.id, ""))
		sh.expect(key+"/state", errdefs.IsNotFound(err), "%v", err)
		sh.expect(key+"/mounts", len(mountsBelow(sh.bundle)) == 0, "left: %v", mountsBelow(sh.bundle))
		sh.expect(key+"/cgroups", len(cgroupDirs(sh.id)) == 0, "left: %v", cgroupDirs(sh.id))
	}
	sh.running(newSpec(sh.id, "sh", "-c", "exit 3"))
	sh.expect("create fails/then", sh.wait("").ExitStatus == 3, "status %d", sh.wait("").ExitStatus)
}
