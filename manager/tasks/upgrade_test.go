package tasks

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	shim "github.com/managerd/managerd/protos/shim/v1"
)

// TestUpgradeShims: a daemon that finds another shim on disk replaces those that run: at first those without execs only.
func TestUpgradeShims(t *testing.T) {
	r := realWorld(t)
	for _, id := range []string{"quiet", "busy"} {
		r.run(CreateRequest{ID: id}, "sleep 1000")
	}
	r.exec("busy", "e", "sleep 1000")
	pids := map[string]int{"quiet": r.shimPid("quiet"), "busy": r.shimPid("busy")}
	version := func(id string) string {
		t.Helper()
		_, s, err := r.living(in("ns"), id)
		if err != nil {
			t.Fatal(err)
		}
		d, err := s.Shim().Describe(context.Background(), &shim.DescribeRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if int(d.Pid) != pids[id] {
			t.Errorf("shim of %s is process %d, was %d", id, d.Pid, pids[id])
		}
		return d.Version
	}
	old := version("busy")

	r.binary = filepath.Join(t.TempDir(), "shim-runc")
	build := exec.Command("go", "build", "-tags", "seccomp no_grpc netgo osusergo", "-o", r.binary,
		"-ldflags", "-X github.com/managerd/managerd/shimapi/version.Version=next", "github.com/managerd/managerd/cmd/shim-runc")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	logged := func(n int) func() bool {
		return func() bool { return strings.Count(r.log.String(), `msg="shim upgraded"`) == n }
	}
	for _, idle := range []bool{true, false} {
		r.stop()
		if err := r.UpgradeShims(idle, nil); err == nil {
			t.Error("shims are upgraded by a daemon that has ended")
		}
		recovered := r.begin()
		if err := r.UpgradeShims(idle, recovered); err != nil {
			t.Fatal(err)
		}
		eventually(t, "quiet is upgraded", func() bool { return version("quiet") == "next" })
		if idle { // else a stop could come before the answer
			eventually(t, "the upgrade of quiet is logged", logged(1))
		}
		if idle {
			eventually(t, "busy is left alone", func() bool { return strings.Contains(r.log.String(), "has execs") })
			if v := version("busy"); v != old {
				t.Errorf("a shim with an exec was upgraded to %s", v)
			}
		}
	}
	eventually(t, "busy is upgraded", func() bool { return version("busy") == "next" })
	eventually(t, "both upgrades are logged", logged(2))
	r.exec("quiet", "e", "exit 3")
	if status, _, err := r.Wait(in("ns"), "quiet", "e"); err != nil || status != 3 {
		t.Errorf("exec: %v, %v", status, err)
	}
}
