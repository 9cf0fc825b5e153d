package service_test

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/blackbox"
)

// TestBlackBox: what a shim does is in its black box, in order, before anybody has the answer; what only looks is not, unless
// it failed.
func TestBlackBox(t *testing.T) {
	f := serve(t, "box", shimbin.Spec("box", "sleep", "1000"))
	if _, err := f.State(ctx, &task.StateRequest{ID: "box", ExecID: "none"}); err == nil {
		t.Fatal("there is a state of nothing")
	}
	f.create(nil)
	f.start("")
	f.state("")
	f.runExec("e", nil, "false")
	f.kill("", unix.SIGKILL)
	f.wait("")
	entries, err := blackbox.Read(filepath.Join(f.dir, shimapi.BlackBoxFile))
	if err != nil {
		t.Fatal(err)
	}
	has := func(kind blackbox.Kind, text string) int {
		t.Helper()
		i := slices.IndexFunc(entries, func(e blackbox.Entry) bool { return e.Kind == kind && strings.HasPrefix(e.Text, text) })
		if i < 0 {
			t.Errorf("no %v %q among %+v", kind, text, entries)
		}
		return i
	}
	order := []int{
		has(blackbox.Note, "shim begins"), has(blackbox.Error, "State exec none: "), has(blackbox.Request, "Create"),
		has(blackbox.Event, "/tasks/create"), has(blackbox.Answer, "Create"), has(blackbox.Request, "Start"), has(blackbox.Answer, "Start"),
		has(blackbox.Request, "Exec exec e"), has(blackbox.Answer, "Start exec e"), has(blackbox.Request, "Kill signal 9"),
		has(blackbox.Event, "/tasks/exit"), // of the exec
	}
	if !slices.IsSorted(order[:len(order)-1]) {
		t.Errorf("out of order: %v of %+v", order, entries)
	}
	if i := has(blackbox.Phase, "create"); i >= 0 && entries[i].Took <= 0 {
		t.Errorf("a phase took no time: %+v", entries[i])
	}
	exits := 0
	for _, e := range entries {
		if strings.Contains(e.Text, "exec e process") && strings.HasSuffix(e.Text, "exit status 1") || strings.HasSuffix(e.Text, "exit status 137") {
			exits++
		}
		if e.Kind == blackbox.Request && (strings.HasPrefix(e.Text, "State") || strings.HasPrefix(e.Text, "Wait")) {
			t.Errorf("a request that only looks is recorded: %+v", e)
		}
	}
	if exits != 2 {
		t.Errorf("%d exits among %+v", exits, entries)
	}
	f.remove("")
}
