package service_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	ledgerpb "github.com/managerd/managerd/protos/ledger"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/ledger"
)

var oomCount = flag.Int("oom-kills", 20, "how many processes the tests have the kernel kill (-args -oom-kills 1000); or MANAGERD_OOM_KILLS")

func oomKills() int {
	if n, err := strconv.Atoi(os.Getenv("MANAGERD_OOM_KILLS")); err == nil {
		return n
	}
	return *oomCount
}

// small is a container with little memory. "tail /dev/zero" wants more and more of it.
func small(id string, args ...string) *specs.Spec {
	spec := shimbin.Spec(id, args...)
	limit := int64(32 << 20)
	spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/dev/zero", Type: "bind", Source: "/dev/zero", Options: []string{"bind"}})
	return spec
}

// past is what a shim's ledger has of OOM kills, in their order, and of the exits, by exec id.
func (f *fixture) past() (ooms []uint64, exits map[string]*ledgerpb.Exit) {
	f.t.Helper()
	records, err := ledger.Read(filepath.Join(f.dir, shimapi.LedgerFile))
	if err != nil {
		f.t.Fatal(err)
	}
	exits = map[string]*ledgerpb.Exit{}
	for _, r := range records {
		if r.Event != nil && r.Event.Topic == "/tasks/oom" {
			ooms = append(ooms, r.Event.OomKills)
		}
		if r.Exit != nil {
			exits[r.Exit.ExecId] = r.Exit
		}
	}
	return ooms, exits
}

// TestOOM: a container whose init the kernel kills for want of memory, again and again: each has its one event, told before
// the exit, exit status 137, and the mark.
func TestOOM(t *testing.T) {
	reported := 0
	for i := range oomKills() {
		id := fmt.Sprint("oom", i)
		t.Run(id, func(t *testing.T) {
			f := serve(t, id, small(id, "tail", "/dev/zero"))
			f.create(nil)
			f.start("")
			if s := f.wait("").ExitStatus; s != 137 {
				t.Errorf("status %d", s)
			}
			got := topics(f.events(0, 1, "/tasks/exit"))
			if !slices.Equal(got, []string{"create", "start", "oom", "exit"}) {
				t.Errorf("events %v", got)
			}
			if _, exits := f.past(); exits[""].OomKills != 1 || !exits[""].OomKilled {
				t.Errorf("exit: %v", exits[""])
			}
			if d := f.describe(); d.OomLevel != "own" || d.OomCgroup != shimbin.CgroupParent+"/"+id {
				t.Errorf("limit: %q of %q", d.OomLevel, d.OomCgroup)
			}
			if d := f.describe(); d.OomKills != 1 || len(d.Processes) != 1 || !d.Processes[0].OomKilled {
				t.Errorf("description: %v", d)
			}
			if !t.Failed() {
				reported++
			}
		})
	}
	t.Logf("%d of %d inits killed for want of memory were reported, each once and with the mark", reported, oomKills())
}

// TestOOMCount: kills that come several at a time are told one by one, none twice and none left out.
func TestOOMCount(t *testing.T) {
	const together = 4
	n := (oomKills() + together - 1) / together * together
	many := strings.Repeat("tail /dev/zero & ", together)
	f := serve(t, "many", small("many", "sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do %s wait; i=$((i+%d)); done; exit 5", n, many, together)))
	f.create(nil)
	f.start("")
	c, cancel := context.WithTimeout(ctx, 20*time.Second+time.Duration(n)*time.Second/2)
	defer cancel()
	if resp, err := f.Wait(c, &task.WaitRequest{ID: f.id}); err != nil || resp.ExitStatus != 5 {
		t.Errorf("%v, %v", resp, err)
	}
	ooms, exits := f.past()
	for i, k := range ooms {
		if k != uint64(i+1) {
			t.Fatalf("event %d tells of kill %d", i, k)
		}
	}
	e := exits[""]
	if e == nil {
		t.Fatalf("no exit; %d events", len(ooms))
	}
	if len(ooms) != n || e.OomKills != uint64(n) || e.OomKilled {
		t.Errorf("%d events of %d kills; exit: %v", len(ooms), n, e)
	}
	if d := f.describe(); d.OomKills != uint64(n) || d.Processes[0].OomKilled {
		t.Errorf("description: %v", d)
	}
	t.Logf("%d events of %d kills, %d at a time", len(ooms), n, together)
}

// TestOOMExec: the mark is for whom SIGKILL has ended, and only when there was a kill in its time.
func TestOOMExec(t *testing.T) {
	f := serve(t, "execs", small("execs", "sleep", "1000"))
	f.create(nil)
	f.start("")
	for _, run := range []struct {
		id, script string
		marked     bool
	}{
		{"before", "kill -9 $$", false},
		{"victim", "exec tail /dev/zero", true},
		{"parent", "tail /dev/zero; exit 3", false},
		{"after", "kill -9 $$", false},
	} {
		f.runExec(run.id, nil, "sh", "-c", run.script)
		_, exits := f.past()
		if e := exits[run.id]; e == nil || e.OomKilled != run.marked {
			t.Errorf("%s: exit %v", run.id, e)
		}
	}
	if ooms, _ := f.past(); !slices.Equal(ooms, []uint64{1, 2}) {
		t.Errorf("kills: %v", ooms)
	}
}
