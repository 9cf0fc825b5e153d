package tasks

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// hogs is a script whose children want more memory than there is: one at once, one when it is told to end.
const hogs = "trap '/busybox tail /dev/zero; exit 7' TERM; /busybox tail /dev/zero; while :; do /busybox usleep 1000; done"

// pastOOM is what the ledger of a task has of OOM kills, and how many there were at the exit of the init.
func (r *reality) pastOOM(id string) (kills []uint64, atExit uint64) {
	r.t.Helper()
	b, err := r.bundles.Load("ns", id)
	if err != nil {
		r.t.Fatal(err)
	}
	records, err := b.Ledger()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, rec := range records {
		if rec.Event != nil && rec.Event.Topic == "/tasks/oom" {
			kills = append(kills, rec.Event.OomKills)
		}
		if rec.Exit != nil && rec.Exit.ExecId == "" {
			atExit = rec.Exit.OomKills
		}
	}
	return kills, atExit
}

// TestOOMAcrossShims: a successor tells of the kills that the one before it did not see, and of no other.
func TestOOMAcrossShims(t *testing.T) {
	w := realWorld(t)
	w.memory = 32 << 20
	events := w.record()
	pid := w.run(CreateRequest{ID: "c1"}, hogs)
	events.await(t, "c1", "create", "start", "oom")
	w.killShim("c1", func() {})
	w.killShim("c1", func() {
		if err := unix.Kill(int(pid), unix.SIGTERM); err != nil {
			t.Error(err)
		}
	})
	events.await(t, "c1", "create", "start", "oom", "oom", "exit c1=7")
	if kills, atExit := w.pastOOM("c1"); !slices.Equal(kills, []uint64{1, 2}) || atExit != 2 {
		t.Errorf("kills %v, %d at the exit", kills, atExit)
	}
}

// TestOOMUnseen: the kernel kills, and the container ends, while neither shim nor daemon lives; its cgroup knows.
func TestOOMUnseen(t *testing.T) {
	w := realWorld(t)
	w.memory = 32 << 20
	events := w.record()
	pid := w.run(CreateRequest{ID: "c1"}, hogs)
	events.await(t, "c1", "create", "start", "oom")
	w.stop()
	shimPid := w.shimPid("c1")
	if err := unix.Kill(shimPid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the shim is gone", func() bool { return unix.Kill(shimPid, 0) != nil })
	if err := unix.Kill(int(pid), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the container has ended", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(stat), ") Z ")
	})
	<-w.begin()
	if status, _, err := w.Wait(in("ns"), "c1", ""); err != nil || status != 7 {
		t.Errorf("%d, %v", status, err)
	}
	if kills, atExit := w.pastOOM("c1"); !slices.Equal(kills, []uint64{1, 2}) || atExit != 2 {
		t.Errorf("kills %v, %d at the exit", kills, atExit)
	}
}
