package ledger

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	ledger "github.com/managerd/managerd/protos/ledger"
)

func open(t testing.TB, path string) *Ledger {
	t.Helper()
	l, err := Open(path, ledger.Header{Namespace: "ns", ContainerId: "c"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func add(t testing.TB, l *Ledger, status int) uint64 {
	t.Helper()
	seq, err := l.Append(&ledger.Record{Exit: &ledger.Exit{ExecId: strconv.Itoa(status), Status: uint32(status)}})
	if err != nil {
		t.Fatal(err)
	}
	return seq
}

func TestAppendAndRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	l := open(t, path)
	for i := range 500 {
		if seq := add(t, l, i); seq != uint64(i+2) { // 1 is the header
			t.Fatalf("record %d got sequence number %d", i, seq)
		}
	}
	for _, since := range []uint64{0, 1, 63, 64, 65, 128, 499, 500, 501} {
		got, _, err := l.Since(since, 1000)
		if err != nil || len(got) != int(501-since) {
			t.Fatalf("since %d: %d records, %v", since, len(got), err)
		}
		for i, r := range got {
			if r.Seq != since+uint64(i)+1 {
				t.Fatalf("since %d: record %d has sequence number %d", since, i, r.Seq)
			}
		}
	}
	if got, _, err := l.Since(100, 7); err != nil || len(got) != 7 || got[0].Seq != 101 {
		t.Errorf("limit: %d records, %v", len(got), err)
	}
	records, err := Read(path)
	if err != nil || len(records) != 501 || records[500].Exit.Status != 499 {
		t.Errorf("%d records, %v", len(records), err)
	}
}

// TestFollow: a reader that waits on the channel between reads misses nothing.
func TestFollow(t *testing.T) {
	l := open(t, filepath.Join(t.TempDir(), "ledger"))
	const n = 2000
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for since := uint64(0); since < n+1; {
			got, more, err := l.Since(since, 10)
			if err != nil {
				t.Error(err)
				return
			}
			for _, r := range got {
				if since++; r.Seq != since {
					t.Errorf("got %d, want %d", r.Seq, since)
					return
				}
			}
			if len(got) == 0 {
				<-more
			}
		}
	}()
	for i := range n {
		add(t, l, i)
	}
	wg.Wait()
}

// TestTornTail cuts the file at every byte of its last record: what stands before it is always there.
func TestTornTail(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ledger")
	l := open(t, path)
	add(t, l, 1)
	before := l.end
	add(t, l, 2)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for cut := before; cut < int64(len(whole)); cut++ {
		p := filepath.Join(dir, strconv.FormatInt(cut, 10))
		if err := os.WriteFile(p, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		if records, err := Read(p); err != nil || len(records) != 2 {
			t.Fatalf("cut at %d: %d records, %v", cut, len(records), err)
		}
		r := open(t, p)
		if seq := add(t, r, 3); seq != 4 { // header, 1, second header, 3
			t.Fatalf("cut at %d: sequence number %d", cut, seq)
		}
	}
}

func TestDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	l := open(t, path)
	add(t, l, 1)
	at := l.end
	add(t, l, 2)
	add(t, l, 3)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[at+frameHead+1] ^= 0xff
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	records, err := Read(path)
	if !errdefs.IsDataLoss(err) || len(records) != 2 {
		t.Errorf("%d records, %v", len(records), err)
	}
	if _, err := Open(path, ledger.Header{}); !errdefs.IsDataLoss(err) {
		t.Errorf("open: %v", err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(after, data) {
		t.Error("a damaged ledger was changed")
	}
}

func FuzzScan(f *testing.F) {
	path := filepath.Join(f.TempDir(), "ledger")
	l := open(f, path)
	add(f, l, 1)
	data, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(data[:len(data)-3])
	f.Add([]byte("mgrledg1\x00\x00\x00\x00"))
	if err := l.Compact(1, func(*ledger.Record) bool { return false }); err != nil {
		f.Fatal(err)
	}
	if data, err = os.ReadFile(path); err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		// Whoever opens it refuses it, or goes on with a number that there was not.
		path := filepath.Join(t.TempDir(), "ledger")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if l, err := Open(path, ledger.Header{}); err == nil {
			if records, err := Read(path); err != nil || records[len(records)-1].Seq != l.Last() {
				t.Errorf("%d records, the last is %d, %v", len(records), l.Last(), err)
			}
			_ = l.Close()
		} else if !errdefs.IsDataLoss(err) {
			t.Errorf("open: %v", err)
		}
		end, err := scan(bytes.NewReader(data), func(*ledger.Record, int64) error { return nil })
		if end > int64(len(data)) {
			t.Errorf("end %d of %d bytes, %v", end, len(data), err)
		}
	})
}
