package ledger

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	ledger "github.com/managerd/managerd/protos/ledger"
)

// even keeps what add wrote for an even number.
func even(r *ledger.Record) bool { return r.Exit.GetStatus()%2 == 0 }

// statuses are what add wrote, as it stands in the file.
func statuses(t testing.TB, path string) (out []int) {
	t.Helper()
	records, err := Read(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if r.Exit != nil {
			out = append(out, int(r.Exit.Status))
		}
	}
	return out
}

func TestCompact(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	l := open(t, path)
	for i := 1; i <= 300; i++ { // sequence number i+1
		add(t, l, i)
	}
	size := l.Size()
	if err := l.Compact(201, even); err != nil { // up to status 200
		t.Fatal(err)
	}
	var want []int
	for i := 1; i <= 300; i++ {
		if i%2 == 0 || i > 200 {
			want = append(want, i)
		}
	}
	check := func(l *Ledger, last uint64) {
		t.Helper()
		if got := statuses(t, path); !slices.Equal(got, want) {
			t.Fatalf("there are %v", got)
		}
		if l.Last() != last || l.Trimmed() != 201 {
			t.Errorf("last %d, trimmed %d", l.Last(), l.Trimmed())
		}
		for _, since := range []uint64{0, 1, 2, 3, 63, 64, 100, 199, 200, 201, 202, 299, 300, last - 1, last} {
			var got, above []int
			for next := since; ; {
				records, _, err := l.Since(next, 7)
				if err != nil {
					t.Fatal(err)
				}
				if len(records) == 0 {
					break
				}
				for _, r := range records {
					if r.Seq <= next {
						t.Fatalf("since %d: %d after %d", since, r.Seq, next)
					}
					if next = r.Seq; r.Exit != nil {
						got = append(got, int(r.Exit.Status))
					}
				}
			}
			for _, s := range want {
				if uint64(s)+1 > since {
					above = append(above, s)
				}
			}
			if !slices.Equal(got, above) {
				t.Errorf("since %d: %v, want %v", since, got, above)
			}
		}
	}
	check(l, 301)
	if records, err := Read(path); err != nil || TrimmedBy(records) != 201 || records[0].Trim.Dropped != 100 {
		t.Errorf("%v, %v", records[0], err)
	}
	if l.Size() >= size {
		t.Errorf("%d bytes, %d before", l.Size(), size)
	}
	if err := l.Compact(100, func(*ledger.Record) bool { return false }); err != nil { // of what has been
		t.Fatal(err)
	}
	check(l, 301)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	// Half of a compaction that was killed does not matter; the header that is kept is the newest.
	if err := os.WriteFile(path+".new", []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	again := open(t, path)
	check(again, 302)
	want = nil
	if err := again.Compact(1<<40, func(*ledger.Record) bool { return false }); err != nil {
		t.Fatal(err)
	}
	records, err := Read(path)
	if err != nil || len(records) != 2 || records[1].Header == nil || records[1].Seq != 302 || TrimmedBy(records) != 302 {
		t.Errorf("%v, %v", records, err)
	}
	if seq := add(t, again, 1); seq != 303 {
		t.Errorf("sequence number %d", seq)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if l := open(t, path); l.Last() != 304 {
		t.Errorf("last %d", l.Last())
	}
}

// TestCompactGap: a gap above what was dropped is damage.
func TestCompactGap(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	l := open(t, path)
	add(t, l, 1)
	if err := l.Compact(2, even); err != nil {
		t.Fatal(err)
	}
	l.seq++
	add(t, l, 2)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, ledger.Header{}); !errdefs.IsDataLoss(err) {
		t.Errorf("open: %v", err)
	}
}

// TestCompactWhileUsed: readers and writers do not notice.
func TestCompactWhileUsed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	l := open(t, path)
	const n = 2000
	var wg sync.WaitGroup
	wg.Go(func() {
		for since := uint64(0); since < n+2; {
			got, more, err := l.Since(since, 10)
			if err != nil {
				t.Error(err)
				return
			}
			for _, r := range got {
				if r.Seq <= since {
					t.Errorf("%d after %d", r.Seq, since)
				}
				since = r.Seq
			}
			if len(got) == 0 {
				<-more
			}
		}
	})
	wg.Go(func() {
		for l.Last() < n+1 {
			if err := l.Compact(l.Last(), even); err != nil {
				t.Error(err)
			}
		}
	})
	for i := range n {
		add(t, l, i)
	}
	add(t, l, n) // which is kept, and so the reader's last
	wg.Wait()
	if got := statuses(t, path); !slices.IsSorted(got) || len(got) < n/2 {
		t.Errorf("there are %d: %v", len(got), got)
	}
}

// TestCompactSuccessor: who waits for the end of a writer that replaces the file meanwhile gets the new one.
func TestCompactSuccessor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	l := open(t, path)
	add(t, l, 1)
	next := make(chan *Ledger)
	go func() { next <- open(t, path) }()
	time.Sleep(20 * time.Millisecond) // it may wait by then, and must get it right whether it does or not
	if err := l.Compact(2, even); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	add(t, <-next, 2)
	if got := statuses(t, path); !slices.Equal(got, []int{2}) {
		t.Errorf("there are %v", got)
	}
}

const killedEnv = "MANAGERD_LEDGER_KILLED"

// TestCompactKilled kills a writer that compacts all the time: what is to be kept is there, and nothing is twice.
func TestCompactKilled(t *testing.T) {
	if path := os.Getenv(killedEnv); path != "" {
		l := open(t, path)
		for i := int(l.Last()); ; i++ {
			add(t, l, i)
			fmt.Println(i)
			if err := l.Compact(l.Last(), even); err != nil {
				t.Fatal(err)
			}
		}
	}
	path := filepath.Join(t.TempDir(), "ledger")
	told := map[int]bool{}
	for round := range 10 {
		cmd := exec.Command(os.Args[0], "-test.run", "^TestCompactKilled$")
		cmd.Env = append(os.Environ(), killedEnv+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for range 20 + round {
			var i int
			if _, err := fmt.Fscan(out, &i); err != nil {
				t.Fatal(err)
			}
			told[i] = true
		}
		_ = cmd.Process.Kill()
		for {
			var i int
			if _, err := fmt.Fscan(out, &i); err != nil {
				break
			}
			told[i] = true
		}
		_ = cmd.Wait()
		there := map[int]int{}
		for _, s := range statuses(t, path) {
			there[s]++
		}
		for i := range told {
			if i%2 == 0 && there[i] != 1 {
				t.Fatalf("round %d: record %s is there %d times", round, strconv.Itoa(i), there[i])
			}
		}
	}
}
