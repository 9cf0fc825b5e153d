package service_test

import (
	"flag"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

var (
	manyShims  = flag.Int("upgrade.shims", 6, "how many shims TestUpgradeMany has")
	manyRounds = flag.Int("upgrade.rounds", 8, "how often it upgrades each of them")
)

// TestUpgradeMany: many shims are upgraded again and again, two at a time, while execs run in each of them.
func TestUpgradeMany(t *testing.T) {
	var all []*fixture
	for i := range *manyShims {
		all = append(all, running(t, fmt.Sprint("many", i), nil))
	}
	stop := make(chan struct{})
	var busy sync.WaitGroup
	execs := make([]int, len(all))
	for i, f := range all {
		busy.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					execs[i] = n
					return
				default:
				}
				want := uint32(n % 100)
				if got := f.runExec(fmt.Sprint("e", n), nil, "sh", "-c", fmt.Sprintf("usleep 100000; exit %d", want)); got != want {
					t.Errorf("%s: status %d, want %d", f.id, got, want)
				}
			}
		})
	}
	var mu sync.Mutex
	var pauses []time.Duration
	for range *manyRounds {
		var under sync.WaitGroup
		room := make(chan struct{}, 2)
		for _, f := range all {
			under.Go(func() {
				room <- struct{}{}
				defer func() { <-room }()
				p := f.upgrade()
				mu.Lock()
				defer mu.Unlock()
				pauses = append(pauses, p)
			})
		}
		under.Wait()
	}
	close(stop)
	busy.Wait()
	total := 0
	for _, n := range execs {
		total += n
	}
	slices.Sort(pauses)
	t.Logf("%d upgrades, %d execs beside them; pause p50 %s, p99 %s, max %s", len(pauses), total,
		pauses[len(pauses)/2], pauses[len(pauses)*99/100], pauses[len(pauses)-1])
}
