package tasks

import (
	"strings"
	"testing"
	"time"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi/shimfake"
)

func TestDeaths(t *testing.T) {
	now := time.Unix(1000, 0)
	var d deaths
	var waited time.Duration
	for i := 1; i < maxDeaths; i++ {
		wait, again := d.count(now, 5)
		if !again || (wait == 0) != (i == 1) {
			t.Errorf("death %d: %v, %v", i, wait, again)
		}
		waited += wait
		now = now.Add(wait)
	}
	if waited > 5*time.Second {
		t.Errorf("a task is without a shim for %v", waited)
	}
	afresh := d
	if _, again := d.count(now, 5); again {
		t.Error("it goes on for ever")
	}
	if wait, again := afresh.count(now, 6); !again || wait != 0 {
		t.Errorf("a shim that worked: %v, %v", wait, again)
	}
	for range 3 * maxDeaths { // now and then is no reason either
		now = now.Add(deathsWithin / (maxDeaths - 2))
		if _, again := afresh.count(now, 6); !again {
			t.Fatal("given up though the deaths are far apart")
		}
	}
}

// TestSuccessorsDie: a successor that crashes as soon as it has taken over is not started for ever.
func TestSuccessorsDie(t *testing.T) {
	w := fakes(t)
	w.run("c1", args("run"))
	w.run("c2", args("run"))
	w.fault("c1", shimfake.Faults{"Adopt": {}, "Events": {Crash: true}})
	w.fault("c2", shimfake.Faults{"Adopt": {}})
	for _, id := range []string{"c1", "c2"} {
		if err := unix.Kill(w.shimPid(id), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	const given = "the successors of a shim die again and again"
	eventually(t, "it is given up", func() bool { return strings.Contains(w.log.String(), given) })
	eventually(t, "the task is shown without a shim", func() bool {
		st, err := w.Service.Get(in("ns"), "c1", "")
		return err == nil && st.Status == tasktypes.Status_UNKNOWN && st.ExitStatus == unknownExit
	})
	starts := func(id string) int {
		b, err := w.bundles.Load("ns", id)
		if err != nil {
			t.Fatal(err)
		}
		records, err := b.Ledger()
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, r := range records {
			if r.Header != nil {
				n++
			}
		}
		return n
	}
	if n := starts("c1"); n != maxDeaths {
		t.Errorf("%d shims", n)
	}
	if n := starts("c2"); n != 2 {
		t.Errorf("%d shims of the task whose successor is well", n)
	}
	if st, err := w.Service.Get(in("ns"), "c2", ""); err != nil || st.Status != tasktypes.Status_RUNNING {
		t.Errorf("%v, %v", st, err)
	}
	// The next daemon tries again.
	w.fault("c1", shimfake.Faults{"Adopt": {}})
	w.restart()
	if st, err := w.Service.Get(in("ns"), "c1", ""); err != nil || st.Status != tasktypes.Status_RUNNING {
		t.Errorf("%v, %v", st, err)
	}
}

// TestConnectionsBreak: a shim that breaks every connection is connected to again and again, but not as fast as that goes.
func TestConnectionsBreak(t *testing.T) {
	w := fakes(t)
	w.run("c1", args("run"))
	begin := time.Now()
	w.fault("c1", shimfake.Faults{"Events": {Drop: true}, "State": {Times: 1, Drop: true}})
	_, _ = w.Service.Get(in("ns"), "c1", "") // breaks the first one
	eventually(t, "it breaks six times", func() bool { return strings.Count(w.log.String(), "was made anew") >= 6 })
	if took := time.Since(begin); took < 15*firstWait { // 0 + 1 + 2 + 4 + 8
		t.Errorf("six connections within %v", took)
	}
}
