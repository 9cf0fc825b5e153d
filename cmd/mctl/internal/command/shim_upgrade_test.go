package command_test

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

type upgraded struct {
	ID    string
	PID   int
	From  string
	To    string
	Pause int64 `json:"pause_ns"`
	Error string
}

// TestShimUpgrade: shims are replaced under a daemon and its clients, and none of them notices; those that are up to date
// are left alone, and one that is killed afterwards gets a successor as before.
func TestShimUpgrade(t *testing.T) {
	w := newWorld(t)
	next := filepath.Join(t.TempDir(), "shim-runc")
	build := exec.Command("go", "build", "-tags", "seccomp no_grpc netgo osusergo", "-o", next,
		"-ldflags", "-X github.com/managerd/managerd/shimapi/version.Version=next", "github.com/managerd/managerd/cmd/shim-runc")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	w.ok("run", "-d", "busybox", "one", "sleep", "1000")
	w.ok("run", "-d", "busybox", "two", "sleep", "1000")
	const lines = 2000
	attached := w.begin("run", "busybox", "ticker", "sh", "-c",
		fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo $i; i=$((i+1)); usleep 1000; done; exit 42", lines))
	attached.says(t, "5\n")
	waiting := w.begin("tasks", "exec", "--exec-id", "e1", "one", "sh", "-c", "usleep 1500000; exit 17")
	before := w.shims()
	for range 5 {
		var rows []upgraded
		w.decode(w.shim("upgrade", "--all", "-o", "json"), &rows)
		if len(rows) != 3 {
			t.Fatalf("upgrade --all: %+v", rows)
		}
		for _, r := range rows {
			if r.Error != "" || r.PID != before[r.ID].PID || r.To != before[r.ID].Version || r.Pause <= 0 {
				t.Errorf("%+v", r)
			}
		}
	}
	if status := attached.end(t); status != 42 {
		t.Errorf("run: status %d: %s", status, &attached.errs)
	}
	var want strings.Builder
	for i := range lines {
		_, _ = fmt.Fprintln(&want, i)
	}
	if attached.out.String() != want.String() {
		t.Errorf("%d bytes of output, want %d: not every line once", len(attached.out.String()), want.Len())
	}
	if status := waiting.end(t); status != 17 {
		t.Errorf("exec: status %d: %s", status, &waiting.errs)
	}

	if out := w.shim("upgrade", "one", "--binary", next); !strings.Contains(out, "next") || !strings.Contains(out, "upgraded") {
		t.Errorf("upgrade: %s", out)
	}
	var rows []upgraded
	w.decode(w.shim("upgrade", "--outdated", "--binary", next, "-o", "json"), &rows)
	for _, r := range rows {
		if r.ID == "one" || r.To != "next" {
			t.Errorf("--outdated: %+v", r)
		}
	}
	if now := w.shims(); now["one"].Version != "next" || now["two"].Version != "next" || now["one"].PID != before["one"].PID {
		t.Errorf("after: %+v", now)
	}
	w.shimFails([]string{"refused", "/bin/true"}, "upgrade", "one", "--binary", "/bin/true")
	w.shimFails([]string{"nobody"}, "upgrade", "nobody")
	w.fails(2, []string{"--all"}, "shim", "--state", w.State(), "upgrade")

	// What is parked with the daemon is that of the process as it is now.
	w.killShim(before["one"].PID)
	eventually(t, "a successor has taken over", func() bool { return w.shims()["one"].Condition == "ok" })
	w.exits(3, "tasks", "exec", "one", "sh", "-c", "exit 3")
	w.killManager()
	w.shim("upgrade", "two")
	w.startManager()
	w.exits(4, "tasks", "exec", "two", "sh", "-c", "exit 4")
}
