package service_test

import (
	"testing"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
)

// TestTakeOverEnded: of what has ended while no shim lived, a successor never says that it runs.
func TestTakeOverEnded(t *testing.T) {
	f := serve(t, "takeover", shimbin.Spec("takeover", "yes"))
	f.create(nil)
	f.start("")
	if err := f.exec("e", nil, "yes"); err != nil {
		t.Fatal(err)
	}
	f.start("e")
	pids := []uint32{f.state("").Pid, f.state("e").Pid}
	f.die()
	for _, pid := range pids {
		if err := unix.Kill(int(pid), unix.SIGKILL); err != nil && pid == pids[0] { // the exec dies with the init
			t.Fatal(err)
		}
	}
	until(t, "they end", func() bool {
		return unix.Kill(int(pids[0]), 0) == unix.ESRCH && unix.Kill(int(pids[1]), 0) == unix.ESRCH
	})
	f.adopt()
	for _, id := range []string{"e", ""} {
		if s := f.state(id); s.Status != tasktypes.Status_STOPPED || s.ExitStatus == 0 {
			t.Errorf("%q: %v, exit status %d", id, s.Status, s.ExitStatus)
		}
	}
}
