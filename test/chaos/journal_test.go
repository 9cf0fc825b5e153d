package chaos

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/managerd/managerd/shimapi/ledger"
	"github.com/managerd/managerd/test/harness"
)

// journal is what was done to whom, and when.
type journal struct {
	d     *harness.Daemon
	begin time.Time

	mu     sync.Mutex
	file   *os.File
	down   []window               // times without a daemon
	killed map[string][]time.Time // shims, by container
	counts map[string]int         // faults, and what followed, by kind
	took   map[string][]time.Duration
}

// window is from just before a daemon was killed to when the next one was seen to serve.
type window struct{ from, to time.Time }

func newJournal(d *harness.Daemon) (*journal, error) {
	f, err := os.Create(filepath.Join(d.Dir, "chaos.log"))
	return &journal{
		d: d, begin: time.Now(), file: f, killed: map[string][]time.Time{}, counts: map[string]int{}, took: map[string][]time.Duration{},
	}, err
}

// note writes a line down.
func (j *journal) note(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	_, _ = fmt.Fprintf(j.file, "%10.4fs %s\n", time.Since(j.begin).Seconds(), fmt.Sprintf(format, args...))
}

// did counts a fault, and writes it down.
func (j *journal) did(kind, format string, args ...any) {
	j.mu.Lock()
	j.counts[kind]++
	j.mu.Unlock()
	j.note(kind+" "+format, args...)
}

func (j *journal) sample(what string, took time.Duration) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.took[what] = append(j.took[what], took)
}

// timed is sample for what is worth a line.
func (j *journal) timed(what string, took time.Duration) {
	j.sample(what, took)
	j.note("%s took %s", what, took)
}

// figures gives the median, the 99th percentile and the longest of what was timed.
func (j *journal) figures() (out []string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for what, all := range j.took {
		slices.Sort(all)
		out = append(out, fmt.Sprintf("%s: %d times, p50 %s, p99 %s, max %s", what, len(all),
			all[len(all)/2].Round(10*time.Microsecond), all[len(all)*99/100].Round(10*time.Microsecond), all[len(all)-1].Round(10*time.Microsecond)))
	}
	for what, n := range j.counts {
		out = append(out, fmt.Sprintf("%s: %d", what, n))
	}
	slices.Sort(out)
	return out
}

func (j *journal) killedShim(id string, at time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.killed[id] = append(j.killed[id], at)
}

func (j *journal) wentDown(from time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.down = append(j.down, window{from: from})
}

// cameUp ends the windows that are open.
func (j *journal) cameUp() {
	j.mu.Lock()
	defer j.mu.Unlock()
	for i := len(j.down) - 1; i >= 0 && j.down[i].to.IsZero(); i-- {
		j.down[i].to = time.Now()
	}
}

const (
	// parked is how long after a daemon's start shims may take to park with it: until then nobody else has their pidfds.
	parked = 3 * time.Second
	// successor is how long a dead shim's may take.
	successor = 3 * time.Second
)

// excused says whether it may be unknown how a process ended that ran from begin until now: its shim was killed when no
// daemon lived either, or, if cut says so, while it started the process. The ledger must say that it is unknown, and why.
func (j *journal) excused(id, exec string, begin time.Time, cut bool) error {
	records, err := ledger.Read(filepath.Join(j.d.State(), "io.containerd.runtime.v2.task", j.d.Namespace, id, "ledger"))
	if err != nil {
		return err
	}
	why := ""
	for _, r := range records {
		if r.Exit != nil && r.Exit.ExecId == exec {
			why = r.Exit.Unknown
		}
	}
	if why == "" {
		return fmt.Errorf("the ledger of %s does not say that the end of %q is unknown", id, exec)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.counts["exits said to be unknown, "+why]++
	if j.orphanedLocked(id, begin, cut) {
		return nil
	}
	return fmt.Errorf("the end of %q of %s is unknown (%s), and no shim and daemon were dead at once", exec, id, why)
}

// orphaned says whether, since begin, shim and daemon of a container have been dead at once. What a process has written and
// nobody has read is lost when it ends then: nobody has its pipe open any more.
func (j *journal) orphaned(id string, begin time.Time) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.orphanedLocked(id, begin, false)
}

// shimKilled says whether the shim of a container was killed since begin.
func (j *journal) shimKilled(id string, begin time.Time) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.orphanedLocked(id, begin, true)
}

// killedWithin says whether the shim of a container was killed between two moments.
func (j *journal) killedWithin(id string, from, to time.Time) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.ContainsFunc(j.killed[id], func(at time.Time) bool { return at.After(from) && at.Before(to) })
}

func (j *journal) orphanedLocked(id string, begin time.Time, alone bool) bool {
	for _, at := range j.killed[id] {
		if at.Before(begin.Add(-successor)) {
			continue
		}
		if alone {
			return true
		}
		for _, w := range j.down {
			to := w.to
			if to.IsZero() {
				to = time.Now()
			}
			if at.After(w.from.Add(-successor)) && at.Before(to.Add(parked)) {
				return true
			}
		}
	}
	return false
}
