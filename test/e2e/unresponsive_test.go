package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/test/harness"
)

// tasksEnv is how many tasks TestUnresponsive runs; one in 25 of them has a shim that is stopped. 500 is what
// docs/failures.md speaks of.
const tasksEnv = "MANAGERD_E2E_TASKS"

type listed struct {
	ID     string     `json:"id"`
	PID    uint32     `json:"pid"`
	Status string     `json:"status"`
	Since  *time.Time `json:"unresponsive_since"`
}

// tasks runs mctl tasks ls, and says how long that took.
func (u *user) tasks() (map[string]listed, time.Duration) {
	u.t.Helper()
	begin := time.Now()
	out, err := harness.Output(u.Mctl("-o", "json", "tasks", "ls"))
	took := time.Since(begin)
	var rows []listed
	if err != nil || json.Unmarshal([]byte(out), &rows) != nil {
		u.t.Fatalf("%v\n%s", err, out)
	}
	byID := map[string]listed{}
	for _, r := range rows {
		byID[r.ID] = r
	}
	return byID, took
}

// cpu is the time that processes have run so far (utime and stime of proc_pid_stat(5), in hundredths of a second).
func cpu(pids ...int) (all time.Duration) {
	for _, pid := range pids {
		data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
		for i := 11; i < min(13, len(f)); i++ {
			ticks, _ := strconv.Atoi(f[i])
			all += time.Duration(ticks) * 10 * time.Millisecond
		}
	}
	return all
}

// TestUnresponsive: some shims are stopped, the daemon is killed, and the first list after its start is right and prompt:
// the tasks of the stopped ones are shown with their pids and since when they do not answer, the others as they are.
func TestUnresponsive(t *testing.T) {
	n := 25
	if v := os.Getenv(tasksEnv); v != "" {
		var err error
		if n, err = strconv.Atoi(v); err != nil {
			t.Fatalf("%s: %v", tasksEnv, err)
		}
	}
	u := newUser(t)
	c := newClient(t, u.Daemon)
	pids := map[string]uint32{}
	var mu sync.Mutex
	var work sync.WaitGroup
	for w := range 4 {
		work.Go(func() {
			for i := w; i < n; i += 4 {
				id := fmt.Sprintf("t%03d", i)
				pid, err := c.run(id, "exec sleep 100000")
				if err != nil {
					t.Errorf("%s: %v", id, err)
					return
				}
				mu.Lock()
				pids[id] = pid
				mu.Unlock()
			}
		})
	}
	work.Wait()
	stopped := map[string]int{}
	shims := u.Shims()
	cont := func() {
		for _, pid := range stopped {
			_ = unix.Kill(pid, unix.SIGCONT)
		}
	}
	t.Cleanup(cont)
	for _, pid := range shims {
		cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
		if id := filepath.Base(cwd); err == nil && strings.HasPrefix(id, "t") && len(stopped) < max(1, n/25) {
			if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			stopped[id] = pid
		}
	}
	if err := u.Kill(); err != nil {
		t.Fatal(err)
	}
	before := cpu(shims...)
	begin := time.Now()
	if err := u.Start(); err != nil {
		t.Fatal(err)
	}
	up := time.Since(begin)
	got, took := u.tasks()
	for id, pid := range pids {
		r := got[id]
		if r.PID != pid {
			t.Errorf("task %s has pid %d, not %d", id, r.PID, pid)
		}
		if _, is := stopped[id]; is {
			if r.Status != "UNKNOWN" || r.Since == nil || r.Since.Before(begin) || r.Since.After(time.Now()) {
				t.Errorf("%+v: its shim is stopped", r)
			}
		} else if r.Status != "RUNNING" || r.Since != nil {
			t.Errorf("%+v: its shim runs", r)
		}
	}
	t.Logf("%d tasks, %d of them stopped: the daemon serves after %s, the first list took %s",
		n, len(stopped), up.Round(time.Millisecond), took.Round(time.Millisecond))
	if limit := 10 * time.Second; took > limit {
		t.Errorf("the list took %s", took)
	}
	until(t, "all that answer are known to", func() bool {
		got, _ := u.tasks()
		for id := range pids {
			if _, is := stopped[id]; !is && got[id].Status != "RUNNING" {
				return false
			}
		}
		return len(got) == n
	})
	t.Logf("all are known to answer after %s; the daemon has used %s of CPU, the shims %s",
		time.Since(begin).Round(time.Millisecond), cpu(u.PID()), cpu(shims...)-before)
	text, err := harness.Output(u.Mctl("tasks", "ls"))
	if err != nil {
		t.Fatal(err)
	}
	if lines := strings.Count(text, "UNKNOWN, unresponsive since "); lines != len(stopped) {
		t.Errorf("%d of %d are shown as unresponsive:\n%s", lines, len(stopped), text)
	}
	cont()
	until(t, "all answer again", func() bool {
		got, _ := u.tasks()
		for id := range pids {
			if got[id].Status != "RUNNING" || got[id].Since != nil {
				return false
			}
		}
		return true
	})
	for w := range 4 {
		work.Go(func() {
			for i := w; i < n; i += 4 {
				c.finish(t, fmt.Sprintf("t%03d", i))
			}
		})
	}
	work.Wait()
}
