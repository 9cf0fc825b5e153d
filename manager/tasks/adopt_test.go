package tasks

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/manager/filters"
	"github.com/managerd/managerd/shimapi"
)

// TestRecoverUnreachable: a shim that cannot be connected to when the daemon begins, and can be later, keeps its task; one that has
// died by then leaves what it has written.
func TestRecoverUnreachable(t *testing.T) {
	w := fakes(t)
	for _, id := range []string{"back", "dead"} {
		w.run(id, args("run"))
	}
	w.Close()
	pids := map[string]int{}
	for _, id := range []string{"back", "dead"} {
		path := shimapi.SocketPath(w.state, "ns", id)
		pids[id] = w.shimPid(id)
		if err := os.Rename(path, path+".away"); err != nil {
			t.Fatal(err)
		}
		other, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}) // connecting fails, and not as to a dead one
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = other.Close() }()
	}
	<-w.begin()
	for id := range pids {
		if st, err := w.Service.Get(in("ns"), id, ""); err != nil || st.Status != tasktypes.Status_UNKNOWN || st.Pid == 0 {
			t.Errorf("%s: %v, %v", id, st, err)
		}
	}
	if err := unix.Kill(pids["dead"], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for id := range pids {
		path := shimapi.SocketPath(w.state, "ns", id)
		if err := os.Rename(path+".away", path); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "both are known", func() bool {
		st, err := w.Service.Get(in("ns"), "back", "")
		gone, gerr := w.Service.Get(in("ns"), "dead", "")
		return err == nil && st.Status == tasktypes.Status_RUNNING && gerr == nil && gone.ExitStatus == unknownExit
	})
	if err := w.Kill(in("ns"), "back", "", 9, false); err != nil {
		t.Fatal(err)
	}
	if status, _, err := w.Wait(in("ns"), "back", ""); err != nil || status != 137 {
		t.Errorf("status %d, %v", status, err)
	}
}

// TestRecoverMetrics: directly after a start the counters of all tasks are there, but of those whose shims are stopped, for which
// nobody waits.
func TestRecoverMetrics(t *testing.T) {
	w := fakes(t)
	const well, stopped = 60, 20
	var pids []int
	for i := range well {
		w.run(fmt.Sprint("well", i), args("run"))
	}
	for i := range stopped {
		id := fmt.Sprint("stopped", i)
		w.run(id, args("run"))
		pids = append(pids, w.shimPid(id))
	}
	w.Close()
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	defer func() {
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGCONT)
		}
	}()
	check := func(filter string, want int) {
		t.Helper()
		f := filters.Always
		if filter != "" {
			var err error
			if f, err = filters.Parse(filter); err != nil {
				t.Fatal(err)
			}
		}
		begin := time.Now()
		all, err := w.Metrics(in("ns"), f)
		if err != nil || len(all) != want {
			t.Errorf("%q: counters of %d tasks, not %d, %v", filter, len(all), want, err)
		}
		for _, m := range all {
			if !strings.HasPrefix(m.ID, "well") {
				t.Errorf("%q: %s does not answer", filter, m.ID)
			}
		}
		t.Logf("%q: %v", filter, time.Since(begin))
	}
	adopted := w.begin()
	check("id==well7", 1)
	check("id==stopped7", 0)
	check("", well)
	<-adopted
	check("", well)
}
