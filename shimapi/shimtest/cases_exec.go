package shimtest

import (
	"fmt"
	"math/rand"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"

	"github.com/managerd/managerd/shimapi"
)

// execCase is an exec's life from end to end.
func execCase(sh *shim) {
	init := sh.running(nil)
	sh.must("Exec", sh.addExec("e1", nil, "sh", "-c", "trap 'exit 9' TERM; touch /dev/ready; while :; do sleep 0.01; done"))
	st := sh.state("e1")
	sh.expect("exec/added", st.Status == tasktypes.Status_CREATED && st.Pid == 0, "%v", st)
	sh.expect("exec/ids", st.ID == sh.id && st.ExecID == "e1", "%v", st)
	pid := sh.start("e1")
	st = sh.state("e1")
	sh.expect("exec/state", st.Status == tasktypes.Status_RUNNING && st.Pid == pid, "%v", st)
	sh.must("ready", sh.ready())

	resp, err := request(sh.Pids, &task.PidsRequest{ID: sh.id})
	sh.must("Pids", err)
	for _, p := range resp.Processes {
		if int(p.Pid) == init {
			sh.expect("pids/init details", p.Info == nil, "%v", p.Info)
		}
		if p.Pid != pid {
			continue
		}
		v, err := typeurl.UnmarshalAny(p.Info)
		details, ok := v.(*options.ProcessDetails)
		sh.expect("pids/exec details", err == nil && ok && details.ExecID == "e1", "%v, %v", v, err)
	}
	sh.kill("e1", 15, false)
	w := sh.wait("e1")
	sh.expect("exec/status", w.ExitStatus == 9, "status %d", w.ExitStatus)
	st = sh.state("e1")
	sh.expect("exec/stopped", st.Status == tasktypes.Status_STOPPED && st.ExitStatus == 9, "%v", st)
	d := sh.remove("e1")
	sh.expect("exec/delete", d.Pid == pid && d.ExitStatus == 9 && d.ExitedAt.AsTime().Equal(w.ExitedAt.AsTime()), "%v", d)
	_, err = request(sh.State, stateOf(sh.id, "e1"))
	sh.expect("exec/deleted", errdefs.IsNotFound(err), "%v", err)

	// Its id is free again, and one that was never started can be deleted.
	sh.must("Exec", sh.addExec("e1", nil, "true"))
	sh.remove("e1")
	sh.expect("exec/container", sh.state("").Status == tasktypes.Status_RUNNING, "%v", sh.state(""))

	want := []string{"/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", "/tasks/exec-added"}
	of := func(seen []published) (topics []string) { // others are of execs by which the case looked whether it can go on
		for _, e := range seen {
			switch e.describe() {
			case "/tasks/exec-added " + sh.id + "/e1", "/tasks/exec-started " + sh.id + "/e1", fmt.Sprintf("/tasks/exit %s/e1 9", sh.id):
				topics = append(topics, e.topic)
			}
		}
		return topics
	}
	topics := of(sh.events.waitFor(func(seen []published) bool { return len(of(seen)) >= len(want) }))
	sh.expect("exec/events", slices.Equal(topics, want), "%v", topics)
}

// execFailsCase: an exec that cannot run is refused, and can be deleted.
func execFailsCase(sh *shim) {
	sh.running(nil)
	sh.must("Exec", sh.addExec("e1", nil, "/no/such"))
	_, err := request(sh.Start, &task.StartRequest{ID: sh.id, ExecID: "e1"})
	sh.expect("exec fails/no such program", err != nil && !timedOut(err), "%v", err)
	sh.expect("exec fails/code", errdefs.IsInvalidArgument(err), "%v", err)
	_, err = request(sh.Delete, &task.DeleteRequest{ID: sh.id, ExecID: "e1"})
	sh.expect("exec fails/delete", err == nil, "%v", err)

	sh.must("Exec", sh.addExec("e2", nil, "true"))
	sh.expect("exec fails/twice", errdefs.IsAlreadyExists(sh.addExec("e2", nil, "true")), "%v", sh.addExec("e2", nil, "true"))
	sh.remove("e2")
	err = sh.addExec("", nil, "true")
	sh.expect("exec fails/no id", err != nil, "accepted")
	_, err = request(sh.Exec, &task.ExecProcessRequest{ID: sh.id, ExecID: "e3", Spec: encode(processType, []int{1})})
	sh.expect("exec fails/malformed", err != nil, "accepted")
	sh.expect("exec fails/container", sh.state("").Status == tasktypes.Status_RUNNING, "%v", sh.state(""))
}

// execSignalsCase: a process that a signal ends has the status 128 + its number.
func execSignalsCase(sh *shim) {
	sh.running(nil)
	for _, sig := range []uint32{1, 2, 3, 6, 9, 10, 14, 15} {
		id := fmt.Sprint("s", sig)
		pid := sh.startExec(id, "sleep", "1000")
		// Not every shim's Start means that the program runs; before that, the runtime's own code takes the signal.
		runs := func() bool {
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			return strings.HasPrefix(string(line), "sleep\x00")
		}
		sh.expect("exec/runs", eventually(runs), "process %d never runs its program", pid)
		sh.kill(id, sig, false)
		sh.expect("exec/signal", sh.wait(id).ExitStatus == 128+sig, "signal %d gives status %d", sig, sh.wait(id).ExitStatus)
		sh.remove(id)
	}
}

// execStatusesCase: every exit status there is, from execs side by side.
func execStatusesCase(sh *shim) {
	pid := sh.running(nil)
	step := 1
	if testing.Short() {
		step = 8
	}
	codes := make(chan uint32)
	var wg sync.WaitGroup
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for code := range codes {
				sh.oneStatus(code)
			}
		}()
	}
	for _, code := range rand.Perm(256) {
		if code%step == step-1 {
			codes <- uint32(code)
		}
	}
	close(codes)
	wg.Wait()
	sh.expect("exec/pids afterwards", slices.Equal(sh.pids(), []int{pid}), "%v", sh.pids())
}

func (sh *shim) oneStatus(code uint32) {
	id := fmt.Sprint("x", code)
	if err := sh.addExec(id, nil, "sh", "-c", fmt.Sprint("exit ", code)); err != nil {
		sh.expect("exec/concurrent", false, "add: %v", err)
		return
	}
	if _, err := request(sh.Start, &task.StartRequest{ID: sh.id, ExecID: id}); err != nil {
		sh.expect("exec/concurrent", false, "start: %v", err)
		return
	}
	w, err := request(sh.Wait, &task.WaitRequest{ID: sh.id, ExecID: id})
	sh.expect("exec/statuses", err == nil && w.ExitStatus == code, "%v, %v, want %d", w, err, code)
	d, err := request(sh.Delete, &task.DeleteRequest{ID: sh.id, ExecID: id})
	sh.expect("exec/delete statuses", err == nil && d.ExitStatus == code, "%v, %v, want %d", d, err, code)
}

// execsEndCase: the exits of the execs come before the container's own.
func execsEndCase(sh *shim) {
	sh.running(nil)
	for i := range 4 {
		sh.startExec(fmt.Sprint("e", i), "sleep", "1000")
	}
	sh.kill("", 9, false)
	sh.wait("")
	for i := range 4 {
		sh.expect("execs end/status", sh.wait(fmt.Sprint("e", i)).ExitStatus == 137, "status %d", sh.wait(fmt.Sprint("e", i)).ExitStatus)
	}
	var exits []string
	for _, e := range sh.events.wait(2 + 2*4 + 5) {
		if e.topic == "/tasks/exit" {
			exits = append(exits, e.describe())
		}
	}
	last := fmt.Sprintf("/tasks/exit %s/%s 137", sh.id, sh.id)
	sh.expect("execs end/events", len(exits) == 5 && exits[4] == last, "%v", exits)
	sh.must("Delete", sh.ask(shimapi.ReqDelete, ""))
}
