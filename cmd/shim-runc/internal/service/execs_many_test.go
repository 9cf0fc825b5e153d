package service_test

import (
	"bytes"
	"context"
	wire "encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// processType is the type of an OCI process in a request.
const processType = "types.containerd.io/opencontainers/runtime-spec/1/Process"

var (
	manyExecs = flag.Int("execs", 400, "how many execs TestManyExecs sends through one shim (-args -execs 100000)")
	manyAtA   = flag.Int("parallel-execs", 8, "and how many at a time")
)

// usage is what a shim holds.
type usage struct {
	private    int64 // bytes that are its own: Private_Dirty of /proc/PID/smaps_rollup
	pss        int64
	fds        int
	goroutines int
	ledger     int64 // bytes of the file
}

func (u usage) String() string {
	return fmt.Sprintf("private %d KiB, pss %d KiB, %d fds, %d goroutines, ledger %d KiB", u.private>>10, u.pss>>10, u.fds, u.goroutines, u.ledger>>10)
}

func (f *fixture) usage() (u usage) {
	f.t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", f.cmd.Process.Pid))
	if err != nil {
		f.t.Fatal(err)
	}
	for line := range bytes.Lines(data) {
		w := bytes.Fields(line)
		if len(w) != 3 {
			continue
		}
		kib, _ := strconv.ParseInt(string(w[1]), 10, 64)
		switch string(w[0]) {
		case "Private_Dirty:":
			u.private = kib << 10
		case "Pss:":
			u.pss = kib << 10
		}
	}
	d := f.describe()
	u.fds, u.goroutines = int(d.Fds), int(d.Goroutines)
	fi, err := os.Stat(filepath.Join(f.dir, shimapi.LedgerFile))
	if err != nil {
		f.t.Fatal(err)
	}
	u.ledger = fi.Size()
	return u
}

// TestManyExecs: thousands of execs through one shim leave nothing behind in it. What is compared with is what it holds when
// the first thousand (of a shorter run, the first half) has been: before, Go's heap has not had its size.
func TestManyExecs(t *testing.T) {
	f := running(t, "many", func(s *specs.Spec) { s.Process.Args = []string{"sleep", "1000000"} })
	spec, err := json.Marshal(&specs.Process{Args: []string{"/bin/true"}, Cwd: "/", Env: []string{"PATH=/bin"}})
	if err != nil {
		t.Fatal(err)
	}
	one := func(id string) error {
		_, err := f.Exec(ctx, &task.ExecProcessRequest{ID: f.id, ExecID: id, Spec: &anypb.Any{TypeUrl: processType, Value: spec}})
		if err == nil {
			_, err = f.Start(ctx, &task.StartRequest{ID: f.id, ExecID: id})
		}
		var resp *task.WaitResponse
		if err == nil {
			resp, err = f.Wait(ctx, &task.WaitRequest{ID: f.id, ExecID: id})
		}
		if err == nil {
			_, err = f.Delete(ctx, &task.DeleteRequest{ID: f.id, ExecID: id})
		}
		if err == nil && resp.ExitStatus != 0 {
			err = fmt.Errorf("exit status %d", resp.ExitStatus)
		}
		return err
	}
	// The daemon takes events, and remembers which.
	exits := 0
	taken := make(chan error, 1)
	follow, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := f.Shim().Events(follow, &shim.EventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for last := uint64(0); ; {
			e, err := stream.Recv()
			if err == nil && e.Seq <= last {
				err = fmt.Errorf("event %d after %d", e.Seq, last)
			}
			if err != nil {
				taken <- err
				return
			}
			if last = e.Seq; e.Topic == "/tasks/exit" {
				exits++
			}
			if err := os.WriteFile(filepath.Join(f.dir, shimapi.CursorFile), wire.LittleEndian.AppendUint64(nil, last), 0o600); err != nil {
				taken <- err
				return
			}
			if e.Topic == "/tasks/exit" && exits == *manyExecs {
				taken <- nil
				return
			}
		}
	}()

	budget := int64(1 << 20)
	if shimbin.Race {
		budget = 32 << 20 // the detector remembers what it saw
	}
	t.Logf("before: %v", f.usage())
	begin, step := time.Now(), min(1000, *manyExecs/2)
	var base, now usage
	for done := 0; done < *manyExecs; {
		n := min(step, *manyExecs-done)
		var wg sync.WaitGroup
		for w := range *manyAtA {
			wg.Go(func() {
				for i := w; i < n; i += *manyAtA {
					if err := one(fmt.Sprint("e", done+i)); err != nil {
						t.Errorf("exec %d: %v", done+i, err)
						return
					}
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			return
		}
		first := done == 0
		if done += n; first || done == *manyExecs || done/10000 > (done-n)/10000 {
			if first {
				base = f.settled(math.MaxInt64)
				now = base
			} else {
				now = f.settled(base.private + budget)
			}
			t.Logf("%d execs after %v: %v", done, time.Since(begin).Round(time.Second), now)
		}
	}
	select {
	case err := <-taken:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(60 * time.Second):
		t.Errorf("%d exits were told of %d", exits, *manyExecs)
	}
	if grown := now.private - base.private; grown >= budget {
		t.Errorf("grown by %d KiB since %v", grown>>10, base)
	}
	if now.fds > base.fds+2 || now.goroutines > base.goroutines+2 {
		t.Errorf("%v; it was %v", now, base)
	}
	// What is told of is dropped, also when the last exec was long before.
	for deadline := time.Now().Add(60 * time.Second); now.ledger > 512<<10; now = f.usage() {
		if time.Now().After(deadline) {
			t.Fatalf("the ledger has %d bytes", now.ledger)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// settling is how long a shim has to give memory back: it waits for quiet, ends threads and drops records, on a machine and a
// disk that may be busy.
const settling = 60 * time.Second

// settled is what the shim holds when it has given back what it does not need, which it does some time after the last exec: the
// least in five seconds, or in longer if that is not less than limit bytes of its own.
func (f *fixture) settled(limit int64) (u usage) {
	f.t.Helper()
	begin := time.Now()
	for u = f.usage(); ; {
		if took := time.Since(begin); took > settling || took > 5*time.Second && u.private < limit {
			return u
		}
		time.Sleep(100 * time.Millisecond) // nothing tells when the kernel has it back
		if now := f.usage(); now.private < u.private {
			u = now
		}
	}
}
